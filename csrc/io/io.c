/* Owns: opening a method by name, checking requests, continuing partial reads, checksums, counters
 * and the wording of failures. Refuses to know how bytes are fetched: that is the method's. */
#include "io/io.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/crc32c.h"
#include "base/env.h"
#include "base/mem.h"
#include "io/io_method.h"

/* Larger single reads are refused by macOS and cut by Linux. A multiple of every alignment. */
#define MAX_PART ((size_t)1 << 30)

static const fm_io_method *const methods[] = {
#define X(name) &fm_io_method_##name,
    FM_IO_LIST(X)
#undef X
};

#define X(name) " " #name
static const char known_methods[] = FM_IO_LIST(X);
#undef X

const fm_io_method *fm_io_method_find(const char *name, size_t name_len)
{
    for (int i = 0; i < FM_COUNT(methods); i++)
        if (strncmp(methods[i]->name, name, name_len) == 0 && methods[i]->name[name_len] == '\0')
            return methods[i];
    return NULL;
}

static fm_status open_io(fm_io *io, const fm_io_opts *opts, const char *const *paths, int n_paths)
{
    void *files = NULL;
    FM_TRY(fm_alloc((size_t)n_paths * sizeof(fm_io_file), &files));
    io->files = files;
    for (; io->n_files < n_paths; io->n_files++)
        FM_TRY(fm_io_file_open(paths[io->n_files], opts->direct, &io->files[io->n_files]));
    return io->method->open(io, opts, &io->state);
}

fm_status fm_io_open(const fm_io_opts *opts, const char *const *paths, int n_paths, fm_io **out)
{
    fm_io_opts o = *opts;
    void *memory = NULL;
    const char *const env_fault = fm_env_get(FM_ENV_FAULT);
    *out = NULL;
    if (o.method == NULL)
        o.method = "pread";
    const fm_io_method *method = fm_io_method_find(o.method, strlen(o.method));
    if (method == NULL)
        return fm_fail(FM_ERR_UNSUPPORTED, "I/O method '%s' does not exist; there are:%s", o.method,
                       known_methods);
    if (env_fault != NULL && o.fault == NULL) {
        method = &fm_io_method_fault; /* which opens o.method beneath itself */
        o.fault = env_fault;
    }
    if (o.direct && !method->can_direct)
        return fm_fail(FM_ERR_UNSUPPORTED, "I/O method '%s' has no direct mode", o.method);
    if (n_paths < 1 || o.n_workers < 0)
        return fm_fail(FM_ERR_ARG, "I/O: %d files, %d workers", n_paths, o.n_workers);
    FM_TRY(fm_alloc(sizeof(fm_io), &memory));
    fm_io *const io = memory;
    io->method = method;
    io->caps = (fm_io_caps){method->name, o.direct, o.direct ? FM_IO_ALIGN : 1};
    io->pid = getpid();
    const fm_status s = open_io(io, &o, paths, n_paths);
    if (s != FM_OK) {
        fm_io_close(io);
        return s;
    }
    *out = io;
    return FM_OK;
}

void fm_io_close(fm_io *io)
{
    if (io == NULL)
        return;
    /* A forked child has none of the method's threads: it only gives its copies back. */
    if (io->state != NULL && io->pid == getpid())
        io->method->close(io->state);
    for (int i = 0; i < io->n_files; i++)
        fm_io_file_close(&io->files[i]);
    fm_free(io->files);
    fm_free(io);
}

fm_io_caps fm_io_get_caps(const fm_io *io)
{
    return io->caps;
}
int64_t fm_io_file_bytes(const fm_io *io, int32_t file)
{
    return io->files[file].bytes;
}
const char *fm_io_file_path(const fm_io *io, int32_t file)
{
    return io->files[file].path;
}

static size_t wanted(const fm_io_req *r)
{
    return r->bytes_wanted ? r->bytes_wanted : r->bytes;
}

static fm_status check_request(const fm_io *io, const fm_io_req *r)
{
    const size_t align = io->caps.align;
    if (r->file < 0 || r->file >= io->n_files)
        return fm_fail(FM_ERR_ARG, "read: file %d of %d", (int)r->file, io->n_files);
    if (r->bytes == 0 || r->bytes > INT64_MAX / 2 || r->off < 0 || r->off > INT64_MAX / 2 ||
        r->dst == NULL || r->bytes_wanted > r->bytes)
        return fm_fail(FM_ERR_ARG,
                       "%s: read of %zu bytes (%zu wanted) at offset %" PRId64 " into %p",
                       io->files[r->file].path, r->bytes, r->bytes_wanted, r->off, r->dst);
    if (r->priority != 0 && r->priority != 1)
        return fm_fail(FM_ERR_ARG, "read: priority %d, known are 0 and 1", (int)r->priority);
    if (r->crc_bytes > wanted(r) || r->crc_skip > wanted(r) - r->crc_bytes)
        return fm_fail(FM_ERR_ARG, "read: checksum over %zu bytes from %zu, wanted are %zu",
                       r->crc_bytes, r->crc_skip, wanted(r));
    if ((uint64_t)r->off % align != 0 || r->bytes % align != 0 || (uintptr_t)r->dst % align != 0)
        return fm_fail(FM_ERR_ARG,
                       "%s: direct read of %zu bytes at offset %" PRId64
                       " into %p: all three must be multiples of %zu",
                       io->files[r->file].path, r->bytes, r->off, r->dst, align);
    return FM_OK;
}

fm_status fm_io_submit(fm_io *io, fm_io_req *const *reqs, int n)
{
    if (n < 0)
        return fm_fail(FM_ERR_ARG, "read: %d requests", n);
    if (n == 0)
        return FM_OK;
    if (io->pid != getpid())
        return fm_fail(FM_ERR_STATE, "read: this process was forked after the files were opened");
    for (int i = 0; i < n; i++)
        FM_TRY(check_request(io, reqs[i]));
    const int64_t seq = atomic_fetch_add(&io->n_submitted, n), now = fm_clock_ns();
    for (int i = 0; i < n; i++) {
        fm_io_req *const r = reqs[i];
        r->status = FM_OK;
        r->err = 0;
        r->done_bytes = 0;
        r->crc = 0;
        r->submitted_ns = now;
        r->ns_queued = now; /* a point in time until the request starts */
        r->ns_read = r->ns_crc = 0;
        r->next = NULL;
        r->seq = seq + i + 1;
        r->state = FM_IO_QUEUED;
    }
    atomic_fetch_add(&io->n_in_flight, n);
    const fm_status s = io->method->submit(io->state, reqs, n);
    if (s != FM_OK)
        atomic_fetch_sub(&io->n_in_flight, n);
    return s;
}

fm_status fm_io_wait(fm_io *io, fm_io_req **done, int max_done, int min_done, int64_t timeout_ns,
                     int *n_done)
{
    const int n_in_flight = atomic_load(&io->n_in_flight);
    int n = 0;
    if (min_done < 0 || max_done < 1 || min_done > max_done || min_done > n_in_flight)
        return fm_fail(FM_ERR_ARG, "wait for %d to %d reads, %d in flight", min_done, max_done,
                       n_in_flight);
    if (io->pid != getpid())
        return fm_fail(FM_ERR_STATE, "wait: this process was forked after the files were opened");
    FM_TRY(io->method->wait(io->state, done, max_done, min_done, timeout_ns, &n));
    atomic_fetch_sub(&io->n_in_flight, n);
    *n_done = n;
    return FM_OK;
}

fm_status fm_io_cancel(fm_io *io, fm_io_req *req)
{
    if (io->pid != getpid())
        return fm_fail(FM_ERR_STATE, "cancel: this process was forked after the files were opened");
    io->method->cancel(io->state, req);
    return FM_OK;
}

fm_status fm_io_promote(fm_io *io, fm_io_req *req)
{
    if (io->pid != getpid())
        return fm_fail(FM_ERR_STATE, "promote: this process was forked after the files were opened");
    io->method->promote(io->state, req);
    return FM_OK;
}

void fm_io_get_counters(const fm_io *io, fm_io_counters *out)
{
    out->n_reads = atomic_load(&io->n_reads);
    out->bytes_read = atomic_load(&io->bytes_read);
    out->n_failed = atomic_load(&io->n_failed);
    out->ns_read = atomic_load(&io->ns_read);
    out->n_registered = atomic_load(&io->n_registered);
}

void fm_io_set_buffers(fm_io *io, void *base, size_t stride, int64_t n)
{
    if (io->method->set_buffers != NULL && io->pid == getpid() && stride > 0 && n > 0)
        io->method->set_buffers(io->state, base, stride, n);
}

void fm_io_drop_buffers(fm_io *io, int64_t first)
{
    if (io->method->drop_buffers != NULL && io->pid == getpid())
        io->method->drop_buffers(io->state, first);
}

void fm_io_start(fm_io_req *req)
{
    const int64_t now = fm_clock_ns();
    req->ns_queued = now - req->ns_queued;
    req->ns_read = now; /* a point in time until the request ends */
}

fm_io_part fm_io_next_part(const fm_io *io, const fm_io_req *req)
{
    /* A direct read that stopped inside a block goes on from the block's start: the offset must
     * stay aligned, and reading a few bytes twice is harmless. */
    const size_t start = req->done_bytes - req->done_bytes % io->caps.align;
    const size_t left = req->bytes - start;
    const fm_io_file *const f = &io->files[req->file];
    return (fm_io_part){.fd = io->caps.direct ? f->fd_direct : f->fd,
                        .off = req->off + (int64_t)start,
                        .bytes = left < MAX_PART ? left : MAX_PART,
                        .dst = (uint8_t *)req->dst + start};
}

bool fm_io_advance(const fm_io *io, fm_io_req *req, const fm_io_part *part, int64_t result)
{
    if (io->tap.ctx != NULL)
        result = io->tap.on_part(io->tap.ctx, req, part, result);
    if (result == -EINTR || result == -EAGAIN)
        return false;
    if (result < 0) {
        req->status = FM_ERR_IO;
        req->err = (int)-result;
        return true;
    }
    const size_t done = (size_t)(part->off - req->off) + (size_t)result;
    if (done <= req->done_bytes) { /* no progress: the file ends here */
        req->status = FM_ERR_IO;
        req->err = 0;
        return true;
    }
    req->done_bytes = done;
    return done >= wanted(req);
}

void fm_io_stop(fm_io_req *req)
{
    req->ns_read = fm_clock_ns() - req->ns_read;
}

void fm_io_finish(fm_io *io, fm_io_req *req)
{
    if (req->status == FM_OK) {
        if (io->tap.ctx != NULL)
            io->tap.on_data(io->tap.ctx, req);
        if (req->crc_bytes > 0) {
            const int64_t start = fm_clock_ns();
            req->crc = fm_crc32c(0, (const uint8_t *)req->dst + req->crc_skip, req->crc_bytes);
            req->ns_crc = fm_clock_ns() - start;
        }
    }
    atomic_fetch_add(&io->n_reads, 1);
    atomic_fetch_add(&io->bytes_read, (int64_t)req->done_bytes);
    atomic_fetch_add(&io->n_failed, req->status != FM_OK);
    atomic_fetch_add(&io->ns_read, req->ns_read);
}

fm_status fm_io_fail(const fm_io *io, const fm_io_req *req, const char *what)
{
    const fm_io_file *const f = &io->files[req->file];
    const char *const sep = what != NULL ? ": " : "";
    what = what != NULL ? what : "";
    if (req->status == FM_OK)
        return FM_OK;
    if (req->status != FM_ERR_IO)
        return fm_fail(req->status, "%s: %s%sread of %zu bytes at offset %" PRId64 ": %s", f->path,
                       what, sep, wanted(req), req->off, fm_status_name(req->status));
    if (req->err != 0)
        return fm_fail_path(FM_ERR_IO, req->err, f->path,
                            "%s: %s%sread of %zu bytes at offset %" PRId64
                            " failed after %zu bytes",
                            f->path, what, sep, wanted(req), req->off, req->done_bytes);
    return fm_fail_path(FM_ERR_IO, 0, f->path,
                        "%s: %s%sfile ends early: read of %zu bytes at offset %" PRId64
                        " gave %zu (the file had %" PRId64 " bytes when opened)",
                        f->path, what, sep, wanted(req), req->off, req->done_bytes, f->bytes);
}

fm_status fm_io_read_sync(fm_io *io, int32_t file, int64_t off, size_t bytes, void *dst)
{
    fm_io_req r = {.file = file, .off = off, .bytes = bytes, .dst = dst, .ns_read = fm_clock_ns()};
    const fm_io_caps buffered = {io->caps.method, false, 1};
    fm_io view = {.files = io->files, .n_files = io->n_files, .caps = buffered};
    if (bytes == 0)
        return FM_OK;
    FM_TRY(check_request(&view, &r));
    for (bool finished = false; !finished;) {
        const fm_io_part part = fm_io_next_part(&view, &r);
        const ssize_t n = pread(part.fd, part.dst, part.bytes, part.off);
        finished = fm_io_advance(&view, &r, &part, n < 0 ? -errno : n);
    }
    fm_io_stop(&r);
    fm_io_finish(io, &r);
    return fm_io_fail(io, &r, NULL);
}

void fm_io_forget(fm_io *io, int32_t file, int64_t off, int64_t bytes)
{
    if (file >= 0 && file < io->n_files && off >= 0 && bytes > 0)
        fm_io_file_forget(&io->files[file], off, bytes);
}
