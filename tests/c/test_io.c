/* Every method, buffered and direct: the right bytes, the right errors, at every edge. */
#include "io_fixture.h"

#include <errno.h>
#include <sys/stat.h>
#include <sys/wait.h>

#include "base/crc32c.h"

enum { FILE_BYTES = 5 * 4096 + 123 };
static char path[4096];

static void buffered_edges(fm_io *io)
{
    const int64_t edges[] = {0,    1,    2,    4094, 4095,           4096,
                             4097, 8191, 8192, 8193, FILE_BYTES - 1, FILE_BYTES};
    for (int a = 0; a < FM_COUNT(edges); a++)
        for (int b = a + 1; b < FM_COUNT(edges); b++)
            for (size_t shift = 0; shift < 3; shift++) {
                const size_t n = (size_t)(edges[b] - edges[a]);
                uint8_t *const dst = calloc(1, n + 8);
                const fm_io_req r = read_one(io, edges[a], n, n, dst + shift);
                CHECK_INT(r.status, FM_OK);
                CHECK_INT(r.done_bytes, n);
                CHECK(bytes_match(dst + shift, edges[a], n));
                CHECK(dst[shift + n] == 0 && (shift == 0 || dst[shift - 1] == 0));
                free(dst);
            }
}

static void direct_edges(fm_io *io)
{
    const int64_t n_blocks = (FILE_BYTES + 4095) / 4096;
    void *dst = NULL;
    REQUIRE(fm_region_alloc((size_t)n_blocks * 4096, false, &dst) == FM_OK);
    for (int64_t first = 0; first < n_blocks; first++)
        for (int64_t last = first + 1; last <= n_blocks; last++) {
            const int64_t off = first * 4096, end = last * 4096;
            const size_t bytes = (size_t)(end - off);
            const size_t wanted = (size_t)((end < FILE_BYTES ? end : FILE_BYTES) - off);
            memset(dst, 0, bytes);
            fm_io_req r = read_one(io, off, bytes, wanted, dst);
            CHECK_INT(r.status, FM_OK);
            CHECK(r.done_bytes >= wanted && bytes_match(dst, off, wanted));
            if (last == n_blocks) { /* the window past the end, asked for in full */
                r = read_one(io, off, bytes, 0, dst);
                CHECK_INT(r.status, FM_ERR_IO);
                CHECK_INT(r.err, 0);
                CHECK_INT(r.done_bytes, wanted);
            }
        }
    fm_region_free(dst, (size_t)n_blocks * 4096);
}

static void end_of_file(fm_io *io, size_t align)
{
    void *dst = NULL;
    const int64_t off = align == 1 ? FILE_BYTES - 10 : 5 * 4096, past = 64 * 4096;
    const size_t bytes = align == 1 ? 20 : 8192;
    REQUIRE(fm_region_alloc(8192, false, &dst) == FM_OK);
    fm_io_req r = read_one(io, off, bytes, bytes, dst);
    CHECK_INT(r.status, FM_ERR_IO);
    CHECK_INT(r.err, 0);
    CHECK_INT(r.done_bytes, FILE_BYTES - off);
    CHECK_INT(fm_io_fail(io, &r, "layer 3"), FM_ERR_IO);
    CHECK_CONTAINS(fm_last_error()->message, "ends early");
    CHECK_CONTAINS(fm_last_error()->message, "layer 3");
    CHECK(strcmp(fm_last_error()->path, path) == 0);
    r = read_one(io, past, bytes, bytes, dst);
    CHECK(r.status == FM_ERR_IO && r.err == 0 && r.done_bytes == 0);
    fm_region_free(dst, 8192);
}

static void checksums(fm_io *io)
{
    void *dst = NULL;
    REQUIRE(fm_region_alloc(8192, false, &dst) == FM_OK);
    fm_io_req r = {.bytes = 8192, .bytes_wanted = 8000, .dst = dst, .crc_skip = 7};
    fm_io_req *const list[1] = {&r}, *done[1];
    int n = 0;
    r.crc_bytes = 7993;
    REQUIRE(fm_io_submit(io, list, 1) == FM_OK);
    REQUIRE(fm_io_wait(io, done, 1, 1, -1, &n) == FM_OK);
    CHECK_INT(r.crc, fm_crc32c(0, (uint8_t *)dst + 7, 7993));
    CHECK(r.ns_queued >= 0 && r.ns_read > 0 && r.ns_crc >= 0);
    r.crc_bytes = 7994;
    CHECK_INT(fm_io_submit(io, list, 1), FM_ERR_ARG);
    fm_region_free(dst, 8192);
}

static void wrong_arguments(fm_io *io, size_t align)
{
    void *dst = NULL;
    fm_io_req *done[4];
    int n = -1;
    REQUIRE(fm_region_alloc(8192, false, &dst) == FM_OK);
    const fm_io_req good = {.off = 0, .bytes = 4096, .dst = dst};
    fm_io_req bad[12], first = good;
    int n_bad = 0;
    for (int i = 0; i < FM_COUNT(bad); i++)
        bad[i] = good;
    bad[n_bad++].file = 1;
    bad[n_bad++].file = -1;
    bad[n_bad++].off = -4096;
    bad[n_bad++].off = INT64_MAX / 4096 * 4096;
    bad[n_bad++].bytes = 0;
    bad[n_bad++].bytes = SIZE_MAX / 4096 * 4096;
    bad[n_bad++].bytes_wanted = 4097;
    bad[n_bad++].dst = NULL;
    bad[n_bad++].priority = 2;
    if (align > 1) {
        bad[n_bad++].off = 512;
        bad[n_bad++].bytes = 4095;
        bad[n_bad++].dst = (uint8_t *)dst + 1;
    }
    for (int i = 0; i < n_bad; i++) {
        fm_io_req *const list[2] = {&first, &bad[i]};
        CHECK_INT(fm_io_submit(io, list, 2), FM_ERR_ARG);
    }
    /* Nothing was queued: nothing may be waited for, and a poll finds nothing. */
    CHECK_INT(fm_io_wait(io, done, 4, 1, -1, &n), FM_ERR_ARG);
    CHECK_INT(n, -1);
    CHECK(fm_io_wait(io, done, 4, 0, 0, &n) == FM_OK && n == 0);
    CHECK_INT(fm_io_wait(io, done, 0, 0, 0, &n), FM_ERR_ARG);
    CHECK_INT(fm_io_submit(io, NULL, 0), FM_OK);
    fm_region_free(dst, 8192);
}

static void one_variant(io_variant v)
{
    fm_io *const io = open_variant(v, 0, NULL, path);
    if (io == NULL) {
        fprintf(stderr, "note: %s%s: %s\n", v.method, v.direct ? " direct" : "",
                fm_last_error()->message);
        return;
    }
    const fm_io_caps caps = fm_io_get_caps(io);
    CHECK(strcmp(caps.method, v.method) == 0 && caps.direct == v.direct);
    CHECK_INT(caps.align, v.direct ? FM_IO_ALIGN : 1);
    CHECK_INT(fm_io_file_bytes(io, 0), FILE_BYTES);
    CHECK(strcmp(fm_io_file_path(io, 0), path) == 0);
    if (v.direct)
        direct_edges(io);
    else
        buffered_edges(io);
    end_of_file(io, caps.align);
    checksums(io);
    wrong_arguments(io, caps.align);

    uint8_t small[100];
    CHECK_INT(fm_io_read_sync(io, 0, 4000, 100, small), FM_OK);
    CHECK(bytes_match(small, 4000, 100));
    CHECK_INT(fm_io_read_sync(io, 0, FILE_BYTES - 99, 100, small), FM_ERR_IO);
    CHECK_INT(fm_io_read_sync(io, 0, -1, 100, small), FM_ERR_ARG);
    CHECK_INT(fm_io_read_sync(io, 1, 0, 100, small), FM_ERR_ARG);
    fm_io_forget(io, 0, 0, FILE_BYTES);
    fm_io_counters c;
    fm_io_get_counters(io, &c);
    CHECK(c.n_reads > 10 && c.bytes_read > FILE_BYTES && c.n_failed >= 3 && c.ns_read > 0);
    fm_io_close(io);
}

static void every_variant(void)
{
    for (int i = 0; i < FM_COUNT(io_variants); i++)
        one_variant(io_variants[i]);
}

enum { STRIDE = 3 * 4096, N_BUFFERS = 4 };

/* Reads one block into a buffer and says whether the kernel had the buffer registered. */
static bool read_registered(fm_io *io, uint8_t *dst, int64_t off, size_t bytes)
{
    fm_io_counters before, after;
    fm_io_get_counters(io, &before);
    memset(dst, 0, bytes);
    const fm_io_req r = read_one(io, off, bytes, 0, dst);
    CHECK_INT(r.status, FM_OK);
    CHECK(bytes_match(dst, off, bytes));
    fm_io_get_counters(io, &after);
    return after.n_registered > before.n_registered;
}

/* Registered or not, reads are the same: inside a buffer, across two, outside, after buffers were dropped, and where
 * the kernel refuses one. */
static void registered_buffers(void)
{
    for (int i = 0; i < FM_COUNT(io_variants); i++) {
        fm_io *const io = open_variant(io_variants[i], 0, NULL, path);
        void *region = NULL;
        if (io == NULL)
            continue;
        REQUIRE(fm_region_alloc((N_BUFFERS + 1) * STRIDE, false, &region) == FM_OK);
        uint8_t *const b = region;
        fm_io_set_buffers(io, b, STRIDE, N_BUFFERS);
        const bool registers = read_registered(io, b, 0, STRIDE);
        if (strcmp(io_variants[i].method, "uring") == 0 && !registers)
            fprintf(stderr, "note: uring registers no buffers here\n");
        CHECK(!registers || strcmp(io_variants[i].method, "uring") == 0);
        CHECK(read_registered(io, b + 4096, 8192, 4096) == registers);
        CHECK(read_registered(io, b + 3 * STRIDE, 4096, STRIDE) == registers);
        CHECK(!read_registered(io, b + STRIDE - 4096, 0, 8192));
        CHECK(!read_registered(io, b + 4 * STRIDE, 0, 4096));
        fm_io_drop_buffers(io, 2);
        fm_region_drop(b + 2 * STRIDE, 2 * STRIDE);
        for (size_t k = 0; k < 2 * STRIDE; k++) /* given back, not kept by the kernel */
            REQUIRE(b[2 * STRIDE + k] == 0);
        CHECK(read_registered(io, b + 3 * STRIDE, 0, STRIDE) == registers);
        /* a buffer of which a part is not there is refused, and read without */
        fm_region_free(b + 2 * STRIDE + 8192, 4096);
        CHECK(!read_registered(io, b + 2 * STRIDE, 4096, 8192));
        CHECK(!read_registered(io, b + STRIDE, 0, 4096));
        CHECK(read_registered(io, b, 0, 4096) == registers);
        fm_io_drop_buffers(io, 0);
        fm_io_close(io);
        fm_region_free(b, 2 * STRIDE + 8192);
        fm_region_free(b + 3 * STRIDE, 2 * STRIDE);
    }
}

static void refuse(const fm_io_opts *opts, const char *file, fm_status want, const char *text)
{
    fm_io *io = (fm_io *)&io;
    CHECK_INT(fm_io_open(opts, &file, 1, &io), want);
    CHECK(io == NULL);
    CHECK_CONTAINS(fm_last_error()->message, text);
}

static void refused_at_open(void)
{
    fm_io_opts opts = FM_IO_OPTS_INIT;
    char fifo[4096 + 8];
    refuse(&opts, "/nonexistent/x", FM_ERR_IO, "/nonexistent/x");
    CHECK_INT(fm_last_error()->err, ENOENT);
    refuse(&opts, "/tmp", FM_ERR_IO, "not a regular file");
    snprintf(fifo, sizeof(fifo), "%s.fifo", path);
    if (mkfifo(fifo, 0600) == 0) {
        refuse(&opts, fifo, FM_ERR_IO, "not a regular file");
        unlink(fifo);
    }
    opts.direct = true;
    refuse(&opts, "/proc/version", FM_ERR_UNSUPPORTED, "direct I/O");
    opts.direct = false;
    opts.n_workers = 100000;
    refuse(&opts, path, FM_ERR_ARG, "100000");
    opts.n_workers = -1;
    refuse(&opts, path, FM_ERR_ARG, "-1");
    opts.n_workers = 0;
    opts.method = "tape";
    refuse(&opts, path, FM_ERR_UNSUPPORTED, "pread");
    const char *const scripts[] = {"tape:eio@1",
                                   "fault:eio@1",
                                   "eio",
                                   "eio@",
                                   "eio@0",
                                   "eio@x",
                                   "eio@1+2",
                                   "melt@3",
                                   "delay=",
                                   "delay=5ms",
                                   "reorder=1",
                                   "seed=",
                                   "eio@99999999999999999999",
                                   ",",
                                   "eio@1,,eio@2"};
    opts.method = "fault";
    for (int i = 0; i < FM_COUNT(scripts); i++) {
        opts.fault = scripts[i];
        refuse(&opts, path, FM_ERR_ARG, "fault script");
    }
    fm_io_close(NULL);
}

#if !defined(__SANITIZE_THREAD__)
static void forked_child(void)
{
    fm_io *const io = open_variant(io_variants[0], 0, NULL, path);
    uint8_t dst[16];
    int code = -1;
    CHECK_INT(read_one(io, 0, 16, 0, dst).status, FM_OK);
    const pid_t pid = fork();
    if (pid == 0) {
        fm_io_req r = {.bytes = 16, .dst = dst}, *const list[1] = {&r};
        alarm(20);
        CHECK_INT(fm_io_submit(io, list, 1), FM_ERR_STATE);
        fm_io_close(io);
        _exit(harness_n_failed == 0 ? 0 : 1);
    }
    REQUIRE(pid > 0 && waitpid(pid, &code, 0) == pid);
    CHECK(WIFEXITED(code) && WEXITSTATUS(code) == 0);
    CHECK_INT(read_one(io, 0, 16, 0, dst).status, FM_OK);
    fm_io_close(io);
}
#else
static void forked_child(void)
{
} /* TSan does not follow a fork of a threaded program */
#endif

int main(void)
{
    make_file(path, sizeof(path), FILE_BYTES);
    RUN(every_variant);
    RUN(registered_buffers);
    RUN(refused_at_open);
    RUN(forked_child);
    unlink(path);
    TEST_EXIT();
}
