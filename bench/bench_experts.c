/* Measures the expert path alone: a synthetic file of experts of a chosen geometry, random routing, hint -> claim ->
 * compute -> release, layer after layer as decode does it. Prints tokens/s, device GB/s, hit rate, and eta: bytes that
 * had to come from the device per second over the device's own speed measured in the same run (fm_io_probe). */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "backend/backend.h"
#include "base/clock.h"
#include "base/mem.h"
#include "bench.h"
#include "io/io_probe.h"
#include "store/expert_layout.h"
#include "store/experts.h"

typedef struct settings {
    const char *path, *method, *policy;
    int64_t hidden, width;
    int layers, experts, k, bits, slots, tokens, runs, threads, rows;
    double skew; /* popularity ~ rank^-skew; 0: uniform */
    bool direct, fast;
} settings;

typedef struct rig {
    const settings *s;
    fm_model_desc desc;
    fm_expert_desc *layers;
    fm_pool *pool;
    fm_io *io;
    fm_backend *be;
    fm_experts *experts;
    float *x, *gate, *up, *out;
    int32_t *rows;
    double *cdf; /* [experts] */
    uint64_t rng;
} rig;

static void die(const char *what)
{
    fprintf(stderr, "bench_experts: %s: %s\n", what, fm_last_error()->message);
    exit(1);
}

static void must(fm_status s, const char *what)
{
    if (s != FM_OK)
        die(what);
}

static uint64_t next_random(uint64_t *r)
{
    *r += UINT64_C(0x9E3779B97F4A7C15);
    uint64_t z = *r;
    z = (z ^ z >> 30) * UINT64_C(0xBF58476D1CE4E5B9);
    z = (z ^ z >> 27) * UINT64_C(0x94D049BB133111EB);
    return z ^ z >> 31;
}

static void *take(size_t bytes)
{
    void *p;
    must(fm_alloc(bytes, &p), "memory");
    return p;
}

static fm_quant affine_of(int bits)
{
    char name[16];
    fm_quant q = FM_QUANT_AFFINE4;
    snprintf(name, sizeof name, "affine%d", bits);
    if (!fm_quant_find_name(name, &q))
        die(name);
    return q;
}

static void describe(rig *r, fm_desc_file *file, int64_t stride)
{
    const settings *s = r->s;
    static char *const names[9] = {"gate", "gate", "gate", "up", "up", "up", "down", "down", "down"};
    r->layers = take((size_t)s->layers * sizeof *r->layers);
    for (int l = 0; l < s->layers; l++) {
        fm_expert_desc *e = &r->layers[l];
        const fm_quant q = affine_of(s->bits);
        const fm_format in = {q, 64, FM_QUANT_BF16, s->width, s->hidden}, out = {q, 64, FM_QUANT_BF16, s->hidden, s->width};
        *e = (fm_expert_desc){.layer = l, .n_experts = s->experts, .role = {in, in, out}, .n_sources = 9};
        memcpy((void *)e->source, names, sizeof names);
        fm_segment seg[FM_MAX_SEGMENTS];
        const int n = fm_expert_segments(e, seg);
        int32_t *files = take((size_t)(s->experts * n) * sizeof(int32_t));
        int64_t *offs = take((size_t)(s->experts * n) * sizeof(int64_t));
        for (int x = 0; x < s->experts; x++)
            for (int64_t g = 0, at = ((int64_t)l * s->experts + x) * stride; g < n; at += seg[g++].n_bytes)
                offs[x * n + g] = at;
        e->seg_file = files;
        e->seg_off = offs;
    }
    r->desc = (fm_model_desc){file, 1, NULL, 0, r->layers, s->layers};
}

/* Random codes; scales and biases small and finite, so that the compute is the real one. */
static void make_file(const settings *s, int64_t stride, int64_t bytes)
{
    const int fd = open(s->path, O_RDWR | O_CREAT, 0644);
    if (fd < 0) {
        perror(s->path);
        exit(1);
    }
    if (lseek(fd, 0, SEEK_END) >= bytes) {
        close(fd);
        return;
    }
    uint16_t *record = take((size_t)stride);
    uint64_t rng = 7;
    for (int64_t i = 0; i < stride / 2; i++) /* as codes anything; as bf16: +-2^-8 .. 2^-5 */
        record[i] = (uint16_t)((next_random(&rng) & 0x81ff) | 0x3b00);
    for (int64_t at = 0; at < bytes; at += stride)
        if (pwrite(fd, record, (size_t)stride, at) != stride) {
            perror(s->path);
            exit(1);
        }
    fsync(fd);
    close(fd);
    free(record);
}

static int32_t draw(rig *r)
{
    const double u = (double)(next_random(&r->rng) >> 11) * 0x1p-53;
    int lo = 0, hi = r->s->experts - 1;
    while (lo < hi) {
        const int mid = (lo + hi) / 2;
        if (r->cdf[mid] > u)
            hi = mid;
        else
            lo = mid + 1;
    }
    return lo;
}

static void choose(rig *r, int layer, int32_t *ids)
{
    for (int j = 0; j < r->s->k;) {
        /* Each layer has its own favourites. */
        const int32_t id = (int32_t)(((int64_t)draw(r) * 2654435761u + (int64_t)layer * 40503) % r->s->experts);
        bool twice = false;
        for (int i = 0; i < j; i++)
            twice |= ids[i] == id;
        if (!twice)
            ids[j++] = id;
    }
}

static void run_layer(rig *r, int layer)
{
    int32_t ids[64];
    bool claimed[64] = {false}, ran[64] = {false};
    fm_mat mats[64][FM_ROLE_COUNT];
    fm_expert_job jobs[64];
    choose(r, layer, ids);
    must(fm_experts_hint(r->experts, layer, ids, r->s->k, FM_HINT_DEMAND), "hint");
    for (int left = r->s->k; left > 0;) {
        int n_new, n = 0;
        must(fm_experts_claim(r->experts, layer, ids, r->s->k, claimed, mats, NULL, &n_new), "claim");
        for (int i = 0; i < r->s->k; i++)
            if (claimed[i] && !ran[i]) {
                ran[i] = true;
                jobs[n++] = (fm_expert_job){mats[i][0], mats[i][1], mats[i][2], r->rows, r->s->rows, (int64_t)i * r->s->rows};
            }
        const fm_expert_args a = {r->x, r->s->rows, jobs, n, r->gate, r->up, r->out};
        must(r->be->v->experts(r->be, &a), "experts");
        left -= n_new;
    }
    fm_experts_release(r->experts, layer, ids, r->s->k, claimed, NULL);
}

static void open_rig(rig *r, int64_t *record)
{
    const settings *s = r->s;
    fm_expert_desc probe = {.n_experts = 1};
    const fm_quant q = affine_of(s->bits);
    probe.role[0] = probe.role[1] = (fm_format){q, 64, FM_QUANT_BF16, s->width, s->hidden};
    probe.role[2] = (fm_format){q, 64, FM_QUANT_BF16, s->hidden, s->width};
    fm_segment seg[FM_MAX_SEGMENTS];
    const int n = fm_expert_segments(&probe, seg);
    for (int i = 0; i < n; i++)
        *record += seg[i].n_bytes;
    const int64_t stride = (int64_t)fm_round_up((size_t)*record, FM_IO_ALIGN), bytes = stride * s->experts * s->layers;
    make_file(s, stride, bytes);
    static fm_desc_file file;
    file = (fm_desc_file){s->path, bytes};
    describe(r, &file, stride);
    must(fm_pool_open(s->threads, &r->pool), "threads");
    const fm_io_opts io = {s->method, s->direct, 0, NULL};
    must(fm_io_open(&io, &s->path, 1, &r->io), "io");
    const fm_backend_opts be = {"cpu", r->pool, s->fast ? FM_NUMERIC_FAST : FM_NUMERIC_EXACT};
    must(fm_backend_open(&be, &r->be), "backend");
    fm_experts_opts o = {.n_slots = s->slots};
    must(fm_cache_policy_find(s->policy, &o.policy), "policy");
    must(fm_experts_open(&r->desc, r->io, r->be, &o, &r->experts), "experts");
    r->x = take((size_t)(s->rows * s->hidden) * 4);
    r->gate = take((size_t)(s->k * s->rows * s->width) * 4);
    r->up = take((size_t)(s->k * s->rows * s->width) * 4);
    r->out = take((size_t)(s->k * s->rows * s->hidden) * 4);
    r->rows = take((size_t)s->rows * 4);
    r->cdf = take((size_t)s->experts * sizeof(double));
    for (int i = 0; i < s->rows; i++)
        r->rows[i] = i;
    for (int64_t i = 0; i < s->rows * s->hidden; i++)
        r->x[i] = (float)((double)(next_random(&r->rng) >> 40) * 0x1p-23 - 1);
    double sum = 0;
    for (int i = 0; i < s->experts; i++)
        r->cdf[i] = sum += pow(i + 1, -s->skew);
    for (int i = 0; i < s->experts; i++)
        r->cdf[i] /= sum;
}

static void report(const settings *s, const bench_series *tps, const bench_series *gbps, const bench_series *eta,
                   const fm_expert_stats *st, int64_t record)
{
    bench_json_begin("experts");
    bench_json_int("hidden", s->hidden);
    bench_json_int("width", s->width);
    bench_json_int("layers", s->layers);
    bench_json_int("experts", s->experts);
    bench_json_int("k", s->k);
    bench_json_int("bits", s->bits);
    bench_json_int("rows", s->rows);
    bench_json_int("record_bytes", record);
    bench_json_int("slots", s->slots);
    bench_json_real("skew", s->skew);
    bench_json_text("method", s->method);
    bench_json_bool("direct", s->direct);
    bench_json_text("policy", s->policy);
    bench_json_text("numeric", s->fast ? "fast" : "exact");
    bench_json_int("threads", s->threads);
    bench_json_series("tokens_per_s", tps);
    bench_json_series("device_gb_per_s", gbps);
    bench_json_series("device_use", eta);
    bench_json_real("hit_rate", (double)st->hits / (double)(st->hits + st->misses));
    bench_json_end();
}

static void parse(int argc, char **argv, settings *s)
{
    static const struct option options[] = {
        {"path", 1, 0, 'p'},   {"hidden", 1, 0, 'H'}, {"width", 1, 0, 'I'},  {"layers", 1, 0, 'L'}, {"experts", 1, 0, 'E'},
        {"k", 1, 0, 'k'},      {"bits", 1, 0, 'b'},   {"slots", 1, 0, 's'},  {"tokens", 1, 0, 't'}, {"runs", 1, 0, 'r'},
        {"threads", 1, 0, 'j'}, {"rows", 1, 0, 'n'},  {"skew", 1, 0, 'z'},   {"method", 1, 0, 'm'}, {"policy", 1, 0, 'P'},
        {"cached", 0, 0, 'c'}, {"fast", 0, 0, 'f'},   {0, 0, 0, 0}};
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (c) {
        case 'p': s->path = optarg; break;
        case 'H': s->hidden = atoll(optarg); break;
        case 'I': s->width = atoll(optarg); break;
        case 'L': s->layers = atoi(optarg); break;
        case 'E': s->experts = atoi(optarg); break;
        case 'k': s->k = atoi(optarg); break;
        case 'b': s->bits = atoi(optarg); break;
        case 's': s->slots = atoi(optarg); break;
        case 't': s->tokens = atoi(optarg); break;
        case 'r': s->runs = atoi(optarg); break;
        case 'j': s->threads = atoi(optarg); break;
        case 'n': s->rows = atoi(optarg); break;
        case 'z': s->skew = atof(optarg); break;
        case 'm': s->method = optarg; break;
        case 'P': s->policy = optarg; break;
        case 'c': s->direct = false; break;
        case 'f': s->fast = true; break;
        default: exit(2);
        }
    if (s->k < 1 || s->k > 64 || s->k > s->experts || s->slots < s->k || s->layers < 1 || s->rows < 1) {
        fprintf(stderr, "bench_experts: need 1 <= k <= 64, k <= experts, k <= slots\n");
        exit(2);
    }
}

int main(int argc, char **argv)
{
    settings s = {.path = "experts.bin", .method = "pread", .policy = "lru", .hidden = 2048, .width = 512, .layers = 8,
                  .experts = 256, .k = 8, .bits = 4, .slots = 512, .tokens = 16, .runs = 5, .threads = fm_cpu_count(),
                  .rows = 1, .direct = true};
    parse(argc, argv, &s);
    rig r = {.s = &s, .rng = 42};
    int64_t record = 0;
    open_rig(&r, &record);
    for (int t = 0; t < s.tokens; t++) /* fills the slots */
        for (int l = 0; l < s.layers; l++)
            run_layer(&r, l);
    bench_series tps = {.n = 0}, gbps = {.n = 0}, eta = {.n = 0};
    fm_experts_reset_stats(r.experts);
    for (int i = 0; i < s.runs; i++) {
        fm_expert_stats before, after;
        const fm_io_probe_args probe = {&s.path, 1, {s.method, s.direct, 0, NULL}, (size_t)record, 4, 1.0, (uint64_t)i * 977};
        fm_io_probe_result roof;
        must(fm_io_probe(&probe, &roof), "probe"); /* just before, so that the device is equally drained */
        fm_experts_get_stats(r.experts, &before);
        const int64_t t0 = fm_clock_ns();
        for (int t = 0; t < s.tokens; t++)
            for (int l = 0; l < s.layers; l++)
                run_layer(&r, l);
        const double seconds = (double)(fm_clock_ns() - t0) * 1e-9;
        fm_experts_get_stats(r.experts, &after);
        const double speed = (double)(after.bytes_read - before.bytes_read) / seconds * 1e-9;
        bench_add(&tps, s.tokens * s.rows / seconds);
        bench_add(&gbps, speed);
        bench_add(&eta, speed / ((double)roof.bytes / roof.seconds * 1e-9));
    }
    fm_expert_stats st;
    fm_experts_get_stats(r.experts, &st);
    report(&s, &tps, &gbps, &eta, &st, record);
    fm_experts_close(r.experts);
    fm_backend_close(r.be);
    fm_io_close(r.io);
    fm_pool_close(r.pool);
    return 0;
}
