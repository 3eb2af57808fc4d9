/* Owns: the plain method: pread on worker threads, through the page cache or past it. Works
 * wherever files do, and is what the others are compared with. */
#include <errno.h>
#include <unistd.h>

#include "io/io_method.h"
#include "io/io_pool.h"

static int64_t read_part(void *ctx, const fm_io_req *req, const fm_io_part *part)
{
    (void)ctx, (void)req;
    const ssize_t n = pread(part->fd, part->dst, part->bytes, part->off);
    return n < 0 ? -errno : n;
}

static fm_status open_pread(fm_io *io, const fm_io_opts *opts, void **state)
{
    return fm_io_pool_open(io, opts->n_workers, read_part, NULL, state);
}

const fm_io_method fm_io_method_pread = {
    .name = "pread",
    .can_direct = true,
    .open = open_pread,
    .close = fm_io_pool_close,
    .submit = fm_io_pool_submit,
    .wait = fm_io_pool_wait,
    .cancel = fm_io_pool_cancel,
    .promote = fm_io_pool_promote,
};
