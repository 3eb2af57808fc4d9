/* Measures reading: method x direct or cached x block size x depth. Blocks are read in random
 * order, none twice in a run; before a cached run the file's pages are dropped and looked for with
 * mincore. The data is checked against the pattern that was written. One JSON line per
 * configuration, then the best one. */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/mem.h"
#include "bench.h"
#include "io/io.h"
#include "io/io_list.h"

enum { MAX_LIST = 16, MAX_SAMPLES = 1 << 20 };
static const char *const method_names[] = {
#define X(name) #name,
    FM_IO_LIST(X)
#undef X
};

typedef struct settings {
    const char *path, *methods, *modes;
    int64_t file_bytes, blocks[MAX_LIST], run_bytes;
    int depths[MAX_LIST], n_blocks, n_depths, n_runs;
    double seconds;
    bool own_file; /* written by us: the data can be checked */
} settings;

typedef struct config {
    const char *method;
    bool direct;
    int64_t block;
    int depth;
} config;

typedef struct result {
    bench_series gbps, p50_us, p99_us, cpu_s_per_gb;
    int64_t n_reads, bytes, resident_bytes;
} result;

static uint8_t *memory; /* the largest block x the largest depth */
static int64_t *samples;

static void die(const char *what)
{
    fprintf(stderr, "bench_io: %s: %s\n", what, fm_last_error()->message);
    exit(1);
}

/* The 8 bytes that belong at word w of the file. */
static uint64_t pattern(uint64_t w)
{
    w = (w ^ w >> 30) * UINT64_C(0xBF58476D1CE4E5B9) + 1;
    return w ^ w >> 27;
}

static bool is_pattern(const void *data, int64_t off)
{
    uint64_t got;
    memcpy(&got, data, sizeof(got));
    return got == pattern((uint64_t)off / 8);
}

/* Writes the file unless one of the right size and pattern is there from an earlier run. */
static void make_file(const settings *s)
{
    enum { CHUNK = 1 << 20 };
    struct stat st;
    uint64_t word = 0;
    const int fd = open(s->path, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0 || fstat(fd, &st) != 0) {
        perror(s->path);
        exit(1);
    }
    if (st.st_size == s->file_bytes && pread(fd, &word, 8, s->file_bytes - 8) == 8 &&
        word == pattern((uint64_t)s->file_bytes / 8 - 1)) {
        close(fd);
        return;
    }
    fprintf(stderr, "bench_io: writing %s (%.1f GiB)\n", s->path,
            (double)s->file_bytes / (1 << 30));
    uint64_t *const chunk = malloc(CHUNK);
    for (int64_t off = 0; chunk != NULL && off < s->file_bytes; off += CHUNK) {
        for (int64_t i = 0; i < CHUNK / 8; i++)
            chunk[i] = pattern((uint64_t)(off / 8 + i));
        if (pwrite(fd, chunk, CHUNK, off) != CHUNK) {
            perror(s->path);
            exit(1);
        }
    }
    free(chunk);
    if (ftruncate(fd, s->file_bytes) != 0 || fsync(fd) != 0 || close(fd) != 0) {
        perror(s->path);
        exit(1);
    }
}

/* Bytes of the file in the page cache; -1 when the system does not tell. */
static int64_t resident_bytes(const char *path, int64_t bytes)
{
    const int64_t page = fm_page_bytes(), n_pages = (bytes + page - 1) / page;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    void *const map = fd < 0 ? MAP_FAILED : mmap(NULL, (size_t)bytes, PROT_READ, MAP_SHARED, fd, 0);
    unsigned char *const pages = calloc(1, (size_t)n_pages);
    int64_t n = -1;
    if (map != MAP_FAILED && pages != NULL && mincore(map, (size_t)bytes, (void *)pages) == 0) {
        n = 0;
        for (int64_t i = 0; i < n_pages; i++)
            n += (pages[i] & 1) * page;
    }
    free(pages);
    if (map != MAP_FAILED)
        munmap(map, (size_t)bytes);
    if (fd >= 0)
        close(fd);
    return n;
}

/* A walk that meets every block once, far apart: a full-period generator modulo 2^k. */
typedef struct walk {
    uint64_t state, mask, n;
    int64_t left;
} walk;

static walk walk_start(int64_t n_blocks, uint64_t seed)
{
    walk w = {.state = seed, .mask = 1, .n = (uint64_t)n_blocks, .left = n_blocks};
    while (w.mask < w.n)
        w.mask *= 2;
    w.mask--;
    return w;
}

static int64_t walk_next(walk *w)
{
    w->left--;
    do
        w->state = (w->state * 0x5851f42d4c957f2d + 0x14057b7ef767814f) & w->mask;
    while (w->state >= w->n);
    return (int64_t)w->state;
}

static void submit_next(fm_io *io, const config *c, walk *w, fm_io_req *r)
{
    r->off = walk_next(w) * c->block;
    if (fm_io_submit(io, &r, 1) != FM_OK)
        die("submit");
}

static void take(fm_io *io, const settings *s, const config *c, const fm_io_req *r, int64_t *n)
{
    if (fm_io_fail(io, r, c->method) != FM_OK)
        die("read");
    const uint8_t *const p = r->dst;
    if (s->own_file &&
        !(is_pattern(p, r->off) && is_pattern(p + r->bytes - 8, r->off + c->block - 8) &&
          is_pattern(p + r->bytes / 2, r->off + c->block / 2))) {
        fprintf(stderr, "bench_io: %s read wrong bytes at %lld\n", c->method, (long long)r->off);
        exit(1);
    }
    if (*n < MAX_SAMPLES)
        samples[*n] = r->ns_queued + r->ns_read;
    ++*n;
}

/* Keeps depth requests in flight until the time or the bytes are used up. */
static void one_run(fm_io *io, const settings *s, const config *c, uint64_t seed, result *out)
{
    fm_io_req reqs[c->depth], *done[c->depth];
    walk w = walk_start(s->file_bytes / c->block, seed);
    int64_t n = 0, n_started = 0;
    const int64_t max = s->run_bytes / c->block;
    const double cpu = bench_cpu_seconds();
    const int64_t start = fm_clock_ns(), deadline = start + (int64_t)(s->seconds * 1e9);
    for (; n_started < c->depth && w.left > 0 && n_started < max; n_started++) {
        fm_io_req *const r = &reqs[n_started];
        *r = (fm_io_req){.bytes = (size_t)c->block, .dst = memory + n_started * c->block};
        submit_next(io, c, &w, r);
    }
    while (n < n_started) {
        int n_done = 0;
        if (fm_io_wait(io, done, c->depth, 1, -1, &n_done) != FM_OK)
            die("wait");
        for (int i = 0; i < n_done; i++) {
            take(io, s, c, done[i], &n);
            if (w.left > 0 && n_started < max && fm_clock_ns() < deadline) {
                submit_next(io, c, &w, done[i]);
                n_started++;
            }
        }
    }
    const double ns = (double)(fm_clock_ns() - start), gb = (double)(n * c->block) * 1e-9;
    const int64_t n_samples = n < MAX_SAMPLES ? n : MAX_SAMPLES;
    bench_add(&out->gbps, gb / (ns * 1e-9));
    bench_add(&out->cpu_s_per_gb, (bench_cpu_seconds() - cpu) / gb);
    bench_add(&out->p50_us, (double)bench_percentile(samples, n_samples, 50) * 1e-3);
    bench_add(&out->p99_us, (double)bench_percentile(samples, n_samples, 99) * 1e-3);
    out->n_reads += n;
    out->bytes += n * c->block;
}

/* Drops the file's pages, while no method has it mapped (mapped pages stay); notes what remains. */
static void drop_pages(const settings *s, result *out)
{
    const fm_io_opts plain = FM_IO_OPTS_INIT;
    fm_io *io = NULL;
    if (fm_io_open(&plain, &s->path, 1, &io) != FM_OK)
        die("open");
    fm_io_forget(io, 0, 0, s->file_bytes);
    fm_io_close(io);
    const int64_t resident = resident_bytes(s->path, s->file_bytes);
    out->resident_bytes = resident > out->resident_bytes ? resident : out->resident_bytes;
}

/* false when this system cannot do it. */
static bool measure(const settings *s, const config *c, result *out)
{
    static uint64_t seed = 1;
    *out = (result){0};
    for (int run = 0; run < s->n_runs; run++) {
        fm_io_opts opts = FM_IO_OPTS_INIT;
        fm_io *io = NULL;
        opts.method = c->method;
        opts.direct = c->direct;
        opts.n_workers = c->depth;
        drop_pages(s, out);
        const fm_status status = fm_io_open(&opts, &s->path, 1, &io);
        if (status == FM_ERR_UNSUPPORTED)
            return false;
        if (status != FM_OK)
            die("open");
        fm_io_set_buffers(io, memory, (size_t)c->block, c->depth); /* as an engine's slots */
        one_run(io, s, c, seed += 7919, out);
        fm_io_close(io);
    }
    return true;
}

/* Direct reads go past the page cache; cached ones are cold if less than 1 % was found there. */
static bool is_cold(const settings *s, const config *c, const result *r)
{
    return c->direct || (r->resident_bytes >= 0 && r->resident_bytes <= s->file_bytes / 100);
}

static void print(const settings *s, const char *bench, const config *c, const result *r)
{
    bench_json_begin(bench);
    bench_json_text("method", c->method);
    bench_json_bool("direct", c->direct);
    bench_json_int("block_bytes", c->block);
    bench_json_int("depth", c->depth);
    bench_json_series("gb_per_s", &r->gbps);
    bench_json_real("p50_us", bench_median(&r->p50_us));
    bench_json_real("p99_us", bench_median(&r->p99_us));
    bench_json_real("cpu_s_per_gb", bench_median(&r->cpu_s_per_gb));
    bench_json_int("n_reads", r->n_reads);
    bench_json_int("bytes_read", r->bytes);
    bench_json_int("file_bytes", s->file_bytes);
    bench_json_int("resident_bytes_before", r->resident_bytes);
    bench_json_bool("cold", is_cold(s, c, r));
    bench_json_bool("data_checked", s->own_file);
    bench_json_end();
}

/* The fastest cold one; within 3 % the one that costs less CPU. */
static bool is_better(const result *a, const result *b)
{
    const double x = bench_median(&a->gbps), y = bench_median(&b->gbps);
    if (b->n_reads == 0 || x > 1.03 * y)
        return true;
    return x > 0.97 * y && bench_median(&a->cpu_s_per_gb) < bench_median(&b->cpu_s_per_gb);
}

static bool listed(const char *list, const char *name)
{
    const size_t len = strlen(name);
    for (const char *p = list; p != NULL && *p != '\0';
         p = strchr(p, ',') ? strchr(p, ',') + 1 : NULL)
        if (strncmp(p, name, len) == 0 && (p[len] == ',' || p[len] == '\0'))
            return true;
    return false;
}

static void run_all(const settings *s)
{
    result best = {0}, r;
    config best_config = {0};
    for (int m = 0; m < FM_COUNT(method_names); m++)
        for (int direct = 0; direct < 2 && listed(s->methods, method_names[m]); direct++)
            for (int b = 0; b < s->n_blocks && listed(s->modes, direct ? "direct" : "cached"); b++)
                for (int d = 0; d < s->n_depths; d++) {
                    const config c = {method_names[m], direct != 0, s->blocks[b], s->depths[d]};
                    if (!measure(s, &c, &r)) {
                        fprintf(stderr, "bench_io: left out: %s\n", fm_last_error()->message);
                        b = s->n_blocks;
                        break;
                    }
                    print(s, "io", &c, &r);
                    if (is_cold(s, &c, &r) && is_better(&r, &best)) {
                        best = r;
                        best_config = c;
                    }
                }
    if (best.n_reads > 0)
        print(s, "io_best", &best_config, &best);
}

static int parse_list(const char *text, int64_t *out)
{
    int n = 0;
    char item[32];
    for (const char *p = text; p != NULL && *p != '\0' && n < MAX_LIST;) {
        const size_t len = strcspn(p, ",");
        snprintf(item, sizeof(item), "%.*s", (int)len, p);
        out[n] = bench_parse_bytes(item);
        if (out[n++] < 1)
            return -1;
        p = p[len] == ',' ? p + len + 1 : NULL;
    }
    return n > 0 ? n : -1;
}

static const char usage[] =
    "usage: bench_io --file PATH [--size 4G] [--methods pread,uring,mmap] [--modes direct,cached]\n"
    "                [--blocks 64K,1M,4M] [--depths 1,4,8,16,32]\n"
    "                [--runs 3] [--seconds 1] [--bytes 8G]\n"
    "PATH is written if need be; an existing file is read as it is with --size 0.\n";

static bool parse(int argc, char **argv, settings *s)
{
    static const struct option options[] = {
        {"file", 1, NULL, 'f'},  {"size", 1, NULL, 's'},    {"methods", 1, NULL, 'm'},
        {"modes", 1, NULL, 'o'}, {"blocks", 1, NULL, 'b'},  {"depths", 1, NULL, 'd'},
        {"runs", 1, NULL, 'r'},  {"seconds", 1, NULL, 't'}, {"bytes", 1, NULL, 'y'},
        {NULL, 0, NULL, 0},
    };
    const char *blocks = "64K,1M,4M", *depths = "1,4,8,16,32";
    int64_t list[MAX_LIST];
    for (int o; (o = getopt_long(argc, argv, "", options, NULL)) != -1;) {
        switch (o) {
        case 'f':
            s->path = optarg;
            break;
        case 's':
            s->file_bytes = bench_parse_bytes(optarg);
            break;
        case 'm':
            s->methods = optarg;
            break;
        case 'o':
            s->modes = optarg;
            break;
        case 'b':
            blocks = optarg;
            break;
        case 'd':
            depths = optarg;
            break;
        case 'r':
            s->n_runs = atoi(optarg);
            break;
        case 't':
            s->seconds = atof(optarg);
            break;
        case 'y':
            s->run_bytes = bench_parse_bytes(optarg);
            break;
        default:
            return false;
        }
    }
    s->n_blocks = parse_list(blocks, s->blocks);
    s->n_depths = parse_list(depths, list);
    for (int i = 0; i < s->n_depths; i++)
        s->depths[i] = list[i] <= 256 ? (int)list[i] : 0;
    for (int i = 0; i < s->n_depths; i++)
        if (s->depths[i] < 1)
            return false;
    for (int i = 0; i < s->n_blocks; i++)
        if (s->blocks[i] % FM_IO_ALIGN != 0)
            return false;
    return s->path != NULL && optind == argc && s->n_blocks > 0 && s->n_depths > 0 &&
           s->n_runs > 0 && s->n_runs <= BENCH_MAX_RUNS && s->file_bytes >= 0 &&
           s->file_bytes % (1 << 20) == 0 && s->run_bytes > 0 && s->seconds > 0;
}

int main(int argc, char **argv)
{
    settings s = {.methods = "pread,uring,mmap",
                  .modes = "direct,cached",
                  .n_runs = 3,
                  .file_bytes = INT64_C(4) << 30,
                  .run_bytes = INT64_C(8) << 30,
                  .seconds = 1};
    void *region = NULL;
    if (!parse(argc, argv, &s)) {
        fputs(usage, stderr);
        return 2;
    }
    struct stat st;
    s.own_file = s.file_bytes > 0;
    if (s.own_file)
        make_file(&s);
    else if (stat(s.path, &st) == 0)
        s.file_bytes = st.st_size;
    size_t bytes = 0;
    for (int b = 0; b < s.n_blocks; b++)
        for (int d = 0; d < s.n_depths; d++) {
            const size_t need = (size_t)s.blocks[b] * (size_t)s.depths[d];
            bytes = need > bytes ? need : bytes;
            if (s.blocks[b] > s.file_bytes) {
                fprintf(stderr, "bench_io: the file is smaller than a block\n");
                return 2;
            }
        }
    samples = malloc(MAX_SAMPLES * sizeof(samples[0]));
    if (samples == NULL || fm_region_alloc(bytes, true, &region) != FM_OK)
        die("memory");
    memory = region;
    run_all(&s);
    fm_region_free(region, bytes);
    free(samples);
    return 0;
}
