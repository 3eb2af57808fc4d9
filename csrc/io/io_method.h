/* Private to io/: what a read method implements, and what io.c gives it. io.c checks requests,
 * numbers them, counts what is in flight and finishes short reads; a method queues, reads and
 * delivers. */
#ifndef FM_IO_IO_METHOD_H
#define FM_IO_IO_METHOD_H

#include <stdatomic.h>
#include <sys/types.h>

#include "io/io.h"
#include "io/io_file.h"
#include "io/io_list.h"

/* One raw read: the rest of a request, or a piece of it. */
typedef struct fm_io_part {
    int fd;
    int64_t off;
    size_t bytes;
    uint8_t *dst;
} fm_io_part;

typedef struct fm_io_method {
    const char *name;
    bool can_direct;
    bool one_reaper; /* one thread at a time sees the parts of all, so nothing there may sleep */
    /* io has its files open and caps set; *state is handed to the other calls. */
    fm_status (*open)(fm_io *io, const fm_io_opts *opts, void **state);
    void (*close)(void *state);
    /* Checked requests. On failure none is queued. */
    fm_status (*submit)(void *state, fm_io_req *const *reqs, int n);
    /* As fm_io_wait, arguments checked. */
    fm_status (*wait)(void *state, fm_io_req **done, int max_done, int min_done, int64_t timeout_ns,
                      int *n_done);
    void (*cancel)(void *state, fm_io_req *req);
    void (*promote)(void *state, fm_io_req *req);
    /* As fm_io_set_buffers and fm_io_drop_buffers; NULL where a method has no use for them. */
    void (*set_buffers)(void *state, void *base, size_t stride, int64_t n);
    void (*drop_buffers)(void *state, int64_t first);
} fm_io_method;

/* Fault injection looks into every raw read and every finished request through this. */
typedef struct fm_io_tap {
    void *ctx;
    /* result is bytes or -errno; returns what the method shall see instead. Any thread. */
    int64_t (*on_part)(void *ctx, const fm_io_req *req, const fm_io_part *part, int64_t result);
    /* After the last byte, before the checksum. */
    void (*on_data)(void *ctx, const fm_io_req *req);
} fm_io_tap;

struct fm_io {
    const fm_io_method *method;
    void *state;
    fm_io_caps caps;
    fm_io_file *files;
    int n_files;
    pid_t pid;
    fm_io_tap tap; /* ctx NULL: none */
    atomic_int n_in_flight;
    atomic_int_fast64_t n_submitted;
    atomic_int_fast64_t n_reads, bytes_read, n_failed, ns_read, n_registered;
};

enum { FM_IO_IDLE = 0, FM_IO_QUEUED = 1, FM_IO_RUNNING = 2, FM_IO_DONE = 3 }; /* fm_io_req.state */

#define X(name) extern const fm_io_method fm_io_method_##name;
FM_IO_LIST(X)
#undef X

const fm_io_method *fm_io_method_find(const char *name, size_t name_len); /* NULL: unknown */

/* The life of a request inside a method, in this order; a method may be on any thread. */
void fm_io_start(fm_io_req *req);
fm_io_part fm_io_next_part(const fm_io *io, const fm_io_req *req);
/* result: bytes or -errno of that part. true: finished (status set); false: not yet. */
bool fm_io_advance(const fm_io *io, fm_io_req *req, const fm_io_part *part, int64_t result);
void fm_io_stop(fm_io_req *req);              /* the last byte is there: the clock stops */
void fm_io_finish(fm_io *io, fm_io_req *req); /* checksum and counters; then it may be delivered */

#endif
