/* Private to io/: worker threads over two priority queues, for methods whose read blocks. The
 * functions are fm_io_method slots; state is the pool. */
#ifndef FM_IO_IO_POOL_H
#define FM_IO_IO_POOL_H

#include "io/io_method.h"

/* Reads one part; returns bytes or -errno. */
typedef int64_t fm_io_read_fn(void *ctx, const fm_io_req *req, const fm_io_part *part);

/* n_workers 0 = default. */
fm_status fm_io_pool_open(fm_io *io, int n_workers, fm_io_read_fn *read, void *ctx, void **state);
void fm_io_pool_close(void *state);
fm_status fm_io_pool_submit(void *state, fm_io_req *const *reqs, int n);
fm_status fm_io_pool_wait(void *state, fm_io_req **done, int max_done, int min_done,
                          int64_t timeout_ns, int *n_done);
void fm_io_pool_cancel(void *state, fm_io_req *req);
void fm_io_pool_promote(void *state, fm_io_req *req);

#endif
