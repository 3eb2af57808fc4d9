/* What the I/O tests share: a file of known bytes, and the method variants to run against. */
#ifndef FM_TESTS_IO_FIXTURE_H
#define FM_TESTS_IO_FIXTURE_H

#include "harness.h"

#include <unistd.h>

#include "base/mem.h"
#include "base/platform.h"
#include "io/io.h"
#include "io/io_list.h"

typedef struct io_variant {
    const char *method;
    bool direct;
} io_variant;

/* Every method of the list, buffered and direct; those that this system refuses fail to open. */
static const io_variant io_variants[] = {
#define X(name) {#name, false}, {#name, true},
    FM_IO_LIST(X)
#undef X
};

static inline uint8_t file_byte(int64_t off)
{
    const uint64_t z = (uint64_t)off * UINT64_C(0x9E3779B97F4A7C15);
    return (uint8_t)(z >> 56 ^ z >> 24);
}

/* Writes bytes known ones to a new file beside the test program's; the caller removes it. */
static inline void make_file(char *path, size_t path_bytes, int64_t bytes)
{
    const char *const dir = getenv("TMPDIR");
    snprintf(path, path_bytes, "%s/fm_io_XXXXXX", dir != NULL && dir[0] ? dir : "/tmp");
    const int fd = mkstemp(path);
    uint8_t *const data = malloc((size_t)bytes + 1);
    for (int64_t i = 0; i < bytes; i++)
        data[i] = file_byte(i);
    if (fd < 0 || write(fd, data, (size_t)bytes) != bytes || fsync(fd) != 0) {
        perror(path);
        exit(1);
    }
    free(data);
    close(fd);
}

static inline bool bytes_match(const void *dst, int64_t off, size_t n)
{
    const uint8_t *const p = dst;
    for (size_t i = 0; i < n; i++)
        if (p[i] != file_byte(off + (int64_t)i))
            return false;
    return true;
}

/* NULL with a note when this system cannot do it; any other failure is one of the test. */
static inline fm_io *open_variant(io_variant v, int n_workers, const char *fault, const char *path)
{
    fm_io_opts opts = FM_IO_OPTS_INIT;
    fm_io *io = NULL;
    opts.method = v.method;
    opts.direct = v.direct;
    opts.n_workers = n_workers;
    opts.fault = fault;
    const fm_status s = fm_io_open(&opts, &path, 1, &io);
    if (s == FM_ERR_UNSUPPORTED)
        return NULL;
    CHECK_INT(s, FM_OK);
    return io;
}

/* One request, waited for. */
static inline fm_io_req read_one(fm_io *io, int64_t off, size_t bytes, size_t wanted, void *dst)
{
    fm_io_req r = {.off = off, .bytes = bytes, .bytes_wanted = wanted, .dst = dst, .tag = 77};
    fm_io_req *const list[1] = {&r}, *done[1] = {NULL};
    int n = 0;
    CHECK_INT(fm_io_submit(io, list, 1), FM_OK);
    CHECK_INT(fm_io_wait(io, done, 1, 1, -1, &n), FM_OK);
    CHECK(n == 1 && done[0] == &r && r.tag == 77);
    r.next = NULL;
    return r;
}

#endif
