/* Owns: the status codes and the calling thread's last error message.
 * A message belongs to the thread that failed: worker threads hand status + errno to the waiter,
 * which words the message. The library never prints and never exits. */
#ifndef FM_BASE_STATUS_H
#define FM_BASE_STATUS_H

#include "base/platform.h"

/* X(name, value): gaps are kept for growth; values are stable. */
#define FM_STATUS_LIST(X)                                                                          \
    X(OK, 0)                                                                                       \
    X(ERR_ARG, -10)         /* the caller's argument is wrong */                                   \
    X(ERR_NOMEM, -20)       /* memory, or the memory budget, does not suffice */                   \
    X(ERR_IO, -30)          /* the system refused a read, open, ... (errno, file) */               \
    X(ERR_FORMAT, -40)      /* a model file contradicts itself or its checksum */                  \
    X(ERR_UNSUPPORTED, -50) /* known, but not implemented here */                                  \
    X(ERR_BACKEND, -60)     /* the device failed */                                                \
    X(ERR_STATE, -70)       /* right call, wrong moment */                                         \
    X(ERR_CANCELLED, -80)   /* fm_session_cancel was called */

typedef enum fm_status {
#define X(name, value) FM_##name = value,
    FM_STATUS_LIST(X)
#undef X
} fm_status;

const char *fm_status_name(fm_status s); /* "FORMAT"; never NULL */

/* What the thread's last failed call said. message and path are never NULL; path is "" and err 0
 * unless a file was concerned. Borrowed until this thread's next failing call. */
typedef struct fm_error {
    fm_status status;
    int err; /* errno, 0 if none */
    const char *path;
    const char *message;
} fm_error;

const fm_error *fm_last_error(void);

/* Set the message and return s:  return fm_fail(FM_ERR_FORMAT, "%s: ...", path, ...); */
fm_status fm_fail(fm_status s, const char *fmt, ...) FM_PRINTF(2, 3);
/* The same for a file: path is kept for the caller and put before the message unless that names it;
 * strerror(err) is appended when err != 0. */
fm_status fm_fail_path(fm_status s, int err, const char *path, const char *fmt, ...)
    FM_PRINTF(4, 5);

#define FM_TRY(expr)                                                                               \
    do {                                                                                           \
        const fm_status fm_try_ = (expr);                                                          \
        if (fm_try_ != FM_OK)                                                                      \
            return fm_try_;                                                                        \
    } while (0)

#endif
