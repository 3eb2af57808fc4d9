/* Owns: the thread-local error message. Formats into a local buffer first, because the arguments
 * may point into the message that is being replaced. */
#include "base/status.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { MESSAGE_BYTES = 2048, PATH_BYTES = 4096 };

typedef struct thread_error {
    fm_error err;
    char message[MESSAGE_BYTES];
    char path[PATH_BYTES];
} thread_error;

static _Thread_local thread_error last;

const char *fm_status_name(fm_status s)
{
    const char *name = "UNKNOWN";
    switch (s) {
#define X(id, value)                                                                               \
    case FM_##id:                                                                                  \
        name = #id;                                                                                \
        break;
        FM_STATUS_LIST(X)
#undef X
    }
    return strncmp(name, "ERR_", 4) == 0 ? name + 4 : name;
}

const fm_error *fm_last_error(void)
{
    last.err.message = last.message;
    last.err.path = last.path;
    return &last.err;
}

static void copy_text(char *dst, size_t dst_bytes, const char *src)
{
    const size_t n = strnlen(src, dst_bytes - 1);
    memmove(dst, src, n);
    dst[n] = '\0';
}

/* strerror_r returns int (POSIX, macOS) or char * (GNU): take whichever this build has. */
static inline const char *text_from_int(int rc, const char *buf)
{
    return rc == 0 ? buf : "unknown error";
}
static inline const char *text_from_ptr(const char *p, const char *buf)
{
    (void)buf;
    return p;
}
#define ERRNO_TEXT(err, buf)                                                                       \
    _Generic(strerror_r(err, buf, sizeof(buf)), int: text_from_int, char *: text_from_ptr)(        \
        strerror_r(err, buf, sizeof(buf)), buf)

static fm_status fail(fm_status s, int err, const char *path, const char *fmt, va_list args)
{
    char text[MESSAGE_BYTES];
    char reason[256] = "";
    int used = 0;
    if (vsnprintf(text, sizeof(text), fmt, args) < 0)
        copy_text(text, sizeof(text), fmt);
    copy_text(last.path, sizeof(last.path), path);
    last.err.status = s;
    last.err.err = err;
    /* A message about a file always names it, whether the caller wrote the path or not. */
    if (last.path[0] != '\0' && strstr(text, last.path) == NULL)
        used = snprintf(last.message, sizeof(last.message), "%.1024s: ", last.path);
    copy_text(last.message + used, sizeof(last.message) - (size_t)used, text);
    if (err != 0) {
        const size_t n = strlen(last.message);
        snprintf(last.message + n, sizeof(last.message) - n, ": %s", ERRNO_TEXT(err, reason));
    }
    return s;
}

fm_status fm_fail(fm_status s, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    fail(s, 0, "", fmt, args);
    va_end(args);
    return s;
}

fm_status fm_fail_path(fm_status s, int err, const char *path, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    fail(s, err, path ? path : "", fmt, args);
    va_end(args);
    return s;
}
