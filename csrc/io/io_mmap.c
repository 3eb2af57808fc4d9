/* Owns: reading by copying out of a memory map, the baseline that others are compared with. The
 * kernel is asked for the whole range first; without that it would fault it in page by page. A file
 * cut short while it is mapped is noticed before the copy; in the instant between, the copy would
 * die of SIGBUS. */
#include <errno.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "base/mem.h"
#include "io/io_method.h"
#include "io/io_pool.h"

typedef struct mapped {
    fm_io *io;
    void *pool;
    uint8_t *maps[]; /* by file; NULL for an empty one */
} mapped;

static int64_t read_part(void *ctx, const fm_io_req *req, const fm_io_part *part)
{
    const mapped *const m = ctx;
    const int64_t mapped_bytes = m->io->files[req->file].bytes;
    struct stat st;
    if (fstat(part->fd, &st) != 0)
        return -errno;
    const int64_t end = st.st_size < mapped_bytes ? st.st_size : mapped_bytes;
    if (part->off >= end)
        return 0;
    const int64_t left = end - part->off;
    const size_t n = (int64_t)part->bytes < left ? part->bytes : (size_t)left;
    uint8_t *const from = m->maps[req->file] + part->off;
    const size_t skew = (uintptr_t)from % (size_t)fm_page_bytes();
    (void)madvise(from - skew, n + skew, MADV_WILLNEED);
    memcpy(part->dst, from, n);
    return (int64_t)n;
}

static void close_mmap(void *state)
{
    mapped *const m = state;
    if (m->pool != NULL)
        fm_io_pool_close(m->pool);
    for (int i = 0; i < m->io->n_files; i++)
        if (m->maps[i] != NULL)
            munmap(m->maps[i], (size_t)m->io->files[i].bytes);
    fm_free(m);
}

static fm_status map_files(mapped *m)
{
    for (int i = 0; i < m->io->n_files; i++) {
        const fm_io_file *const f = &m->io->files[i];
        if (f->bytes == 0)
            continue;
        void *const p = mmap(NULL, (size_t)f->bytes, PROT_READ, MAP_SHARED, f->fd, 0);
        if (p == MAP_FAILED)
            return fm_fail_path(FM_ERR_IO, errno, f->path, "cannot map");
        m->maps[i] = p;
    }
    return FM_OK;
}

static fm_status open_mmap(fm_io *io, const fm_io_opts *opts, void **state)
{
    void *memory = NULL;
    FM_TRY(fm_alloc(sizeof(mapped) + (size_t)io->n_files * sizeof(uint8_t *), &memory));
    mapped *const m = memory;
    m->io = io;
    fm_status s = map_files(m);
    if (s == FM_OK)
        s = fm_io_pool_open(io, opts->n_workers, read_part, m, &m->pool);
    if (s != FM_OK) {
        close_mmap(m);
        return s;
    }
    *state = m;
    return FM_OK;
}

static fm_status submit_mmap(void *state, fm_io_req *const *reqs, int n)
{
    return fm_io_pool_submit(((mapped *)state)->pool, reqs, n);
}

static fm_status wait_mmap(void *state, fm_io_req **done, int max_done, int min_done,
                           int64_t timeout_ns, int *n_done)
{
    return fm_io_pool_wait(((mapped *)state)->pool, done, max_done, min_done, timeout_ns, n_done);
}

static void cancel_mmap(void *state, fm_io_req *req)
{
    fm_io_pool_cancel(((mapped *)state)->pool, req);
}

static void promote_mmap(void *state, fm_io_req *req)
{
    fm_io_pool_promote(((mapped *)state)->pool, req);
}

const fm_io_method fm_io_method_mmap = {
    .name = "mmap",
    .can_direct = false,
    .open = open_mmap,
    .close = close_mmap,
    .submit = submit_mmap,
    .wait = wait_mmap,
    .cancel = cancel_mmap,
    .promote = promote_mmap,
};
