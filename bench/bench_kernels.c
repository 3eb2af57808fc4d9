/* Measures the CPU kernels on the expert shapes of real models: weights streamed from memory by one row of x (GB/s,
 * beside the read bandwidth measured between the runs), products with many rows (GFLOP/s, beside the register-loop
 * peaks), attention and DeltaNet; attention of a token whose K and V come from memory (as the weights). A row of each
 * product is checked against the reference first.
 *   bench_kernels [--variant NAME] [--numeric exact|fast] [--threads N] [--runs N] [--mbytes N] [--only WORD] */
#include <getopt.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "base/platform.h"
#include "bench.h"
#include "bench_roof.h"
#include "cpu/kernels.h"

typedef struct settings {
    const char *variant, *only;
    fm_numeric numeric;
    int threads, runs;
    int64_t bytes; /* of weights; larger than any cache */
} settings;

typedef struct shape {
    const char *name;
    int64_t n_rows, n_cols;
} shape;

static const shape shapes[] = {
    {"35b gate/up", 512, 2048},
    {"35b down", 2048, 512},
    {"397b gate/up", 1024, 4096},
    {"397b down", 4096, 1024},
};

static const fm_quant formats[] = {FM_QUANT_AFFINE2, FM_QUANT_AFFINE3, FM_QUANT_AFFINE4, FM_QUANT_AFFINE8,
                                   FM_QUANT_BF16};
static const fm_quant kv_formats[] = {FM_QUANT_F32, FM_QUANT_F16, FM_QUANT_BF16};

typedef struct rig {
    const settings *s;
    fm_kernels k;
    fm_pool *pool;
    uint8_t *weights;
    float *x, *y;
    void *prepared;
    double peak_fma, peak_int8, peak_tiles;
} rig;

enum { MAX_N = 512, MAX_COLS = 4096, MAX_OUT = 4096, GROUP = 64, TASK_BYTES = 320 << 10 };

static void die(const char *what)
{
    fprintf(stderr, "bench_kernels: %s: %s\n", what, fm_last_error()->message);
    exit(1);
}

static void must(fm_status s, const char *what)
{
    if (s != FM_OK)
        die(what);
}

static float noise(uint64_t *r)
{
    *r = *r * UINT64_C(6364136223846793005) + 1442695040888963407u;
    return (float)(int32_t)(*r >> 32) * 4.6566e-10f;
}

/* ---- products ----------------------------------------------------------------------------------- */

typedef struct product {
    const rig *r;
    fm_quant q;
    shape s;
    int64_t n, n_mats, mat_bytes, codes_bytes, scales_bytes, task_rows;
    fm_act act;
} product;

static fm_mat matrix(const product *p, int64_t i)
{
    const uint8_t *at = p->r->weights + i * p->mat_bytes;
    const bool affine = fm_quant_get(p->q)->affine;
    return fm_mat_make(p->q, affine ? GROUP : 0, FM_QUANT_BF16, p->s.n_rows, p->s.n_cols, at,
                       affine ? at + p->codes_bytes : NULL, affine ? at + p->codes_bytes + p->scales_bytes : NULL);
}

static void product_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const product *p = ctx;
    const int64_t per = p->s.n_rows / p->task_rows;
    const fm_mat W = matrix(p, task / per);
    const int64_t r0 = task % per * p->task_rows;
    p->r->k.matmul[p->q](&W, &p->act, p->n, p->r->y, p->s.n_rows, r0, r0 + p->task_rows);
}

static double product_seconds(product *p)
{
    const int64_t start = fm_clock_ns();
    fm_parallel_for(p->r->pool, p->n_mats * (p->s.n_rows / p->task_rows), product_task, p);
    return (double)(fm_clock_ns() - start) * 1e-9;
}

/* Random codes, scales near 1/100: every matrix differs, none holds odd numbers. */
static void fill(const product *p)
{
    uint64_t r = 1;
    for (int64_t i = 0; i < p->n_mats * p->mat_bytes; i += 8) {
        r = r * UINT64_C(6364136223846793005) + 1442695040888963407u;
        uint64_t v = p->q == FM_QUANT_BF16 ? (r & 0x807f807f807f807full) | 0x3c003c003c003c00ull : r;
        if (fm_quant_get(p->q)->affine && i % p->mat_bytes >= p->codes_bytes)
            v = (r & 0x007f007f007f007full) | 0x3c003c003c003c00ull;
        memcpy(p->r->weights + i, &v, 8);
    }
}

static void check(const product *p)
{
    fm_kernels ref;
    must(fm_kernels_variant("ref", &ref), "ref");
    const fm_mat W = matrix(p, p->n_mats - 1);
    float *want = p->r->y + MAX_N * MAX_OUT;
    p->r->k.matmul[p->q](&W, &p->act, p->n, p->r->y, p->s.n_rows, 0, p->s.n_rows);
    ref.matmul[p->q](&W, &p->act, 1, want, p->s.n_rows, 0, p->s.n_rows);
    double diff = 0, size = 0;
    for (int64_t c = 0; c < p->s.n_rows; c++) {
        diff += pow((double)p->r->y[c] - (double)want[c], 2);
        size += pow((double)want[c], 2);
    }
    if (!(sqrt(diff / size) < (p->r->s->numeric == FM_NUMERIC_FAST ? 2e-4 : 1e-5))) {
        fprintf(stderr, "bench_kernels: %s %s: wrong result\n", p->r->k.name, fm_quant_get(p->q)->name);
        exit(1);
    }
}

static void run_product(rig *r, fm_quant q, shape s, int64_t n)
{
    const bool affine = fm_quant_get(q)->affine;
    product p = {.r = r, .q = q, .s = s, .n = n, .codes_bytes = fm_quant_codes_bytes(q, s.n_cols) * s.n_rows};
    p.scales_bytes = affine ? fm_quant_scales_bytes(q, s.n_cols, GROUP, FM_QUANT_BF16) * s.n_rows : 0;
    p.mat_bytes = p.codes_bytes + 2 * p.scales_bytes;
    p.n_mats = r->s->bytes / p.mat_bytes / (n > 1 ? n : 1);
    p.n_mats = p.n_mats < 4 ? 4 : p.n_mats;
    p.task_rows = n == 1 ? 32 : s.n_rows / 4;
    while (n == 1 && 2 * p.task_rows * (p.mat_bytes / s.n_rows) <= TASK_BYTES && s.n_rows % (2 * p.task_rows) == 0)
        p.task_rows *= 2;
    p.act = (fm_act){.x = r->x, .ldx = s.n_cols, .n_cols = s.n_cols, .prepared = r->prepared};
    r->k.act_prepare(&p.act, n, 0, n);
    fill(&p);
    check(&p);
    bench_series gbps = {.n = 0}, roof = {.n = 0}, share = {.n = 0}, gflops = {.n = 0};
    const int64_t bytes = p.n_mats * p.mat_bytes;
    for (int i = -1; i < r->s->runs; i++) { /* the first warms up */
        const double read = roof_read_seconds(r->pool, r->weights, bytes), t = product_seconds(&p);
        if (i < 0)
            continue;
        bench_add(&gbps, (double)bytes / t / 1e9);
        bench_add(&roof, (double)bytes / read / 1e9);
        bench_add(&share, read / t);
        bench_add(&gflops, 2.0 * (double)(s.n_rows * s.n_cols * n * p.n_mats) / t / 1e9);
    }
    bench_json_begin("kernels");
    bench_json_text("op", n == 1 ? "matvec" : "matmul");
    bench_json_text("variant", r->k.name);
    bench_json_text("numeric", r->s->numeric == FM_NUMERIC_FAST ? "fast" : "exact");
    bench_json_text("format", fm_quant_get(q)->name);
    bench_json_text("shape", s.name);
    bench_json_int("n", n);
    bench_json_int("threads", r->s->threads);
    bench_json_int("bytes", bytes);
    if (n == 1) {
        bench_json_series("gbps", &gbps);
        bench_json_series("read_gbps", &roof);
        bench_json_series("share_of_read", &share);
    } else {
        bench_json_series("gflops", &gflops);
        bench_json_real("share_of_int8", r->peak_int8 > 0 ? bench_median(&gflops) / r->peak_int8 : NAN);
        bench_json_real("share_of_fma", bench_median(&gflops) / r->peak_fma);
    }
    bench_json_end();
}

/* ---- attention and DeltaNet: 35B geometry --------------------------------------------------------- */

typedef struct sequence {
    const rig *r;
    fm_attn_args attn;
    fm_delta_args delta;
    fm_kv_head kv;
    float *S_in, *S_out, *scratch;
    int64_t n, n_before, scratch_floats, stride;
} sequence;

static void attn_task(void *ctx, int64_t task, int worker)
{
    const sequence *q = ctx;
    const int64_t block = 16, r0 = (q->n - 1) / block * block - task / 2 * block;
    const int64_t r1 = r0 + block < q->n ? r0 + block : q->n;
    q->r->k.attend_rows(&q->attn, r0, r1, task % 2, &q->kv, q->n_before, q->scratch + worker * q->scratch_floats);
}

static void attn_part_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const sequence *q = ctx;
    q->r->k.attend_part(&q->attn, 0, 1, task % 2, &q->kv, q->n_before, task / 2, q->scratch + task * q->stride);
}

static void delta_task(void *ctx, int64_t h, int worker)
{
    const sequence *q = ctx;
    q->r->k.delta(&q->delta, h % 32, q->n, q->S_in + h * 16384, q->S_out + h * 16384,
                  q->scratch + worker * q->scratch_floats);
}

static void run_op(rig *r, const char *op, int64_t n, int64_t tasks, fm_task_fn *fn, void *ctx, double bytes,
                   double flops)
{
    bench_series gbps = {.n = 0}, gflops = {.n = 0}, us = {.n = 0};
    for (int i = -1; i < r->s->runs; i++) {
        const int64_t start = fm_clock_ns();
        fm_parallel_for(r->pool, tasks, fn, ctx);
        const double t = (double)(fm_clock_ns() - start) * 1e-9;
        if (i < 0)
            continue;
        bench_add(&gbps, bytes / t / 1e9);
        bench_add(&gflops, flops / t / 1e9);
        bench_add(&us, t * 1e6 / (double)n);
    }
    bench_json_begin("kernels");
    bench_json_text("op", op);
    bench_json_text("variant", r->k.name);
    bench_json_int("n", n);
    bench_json_int("threads", r->s->threads);
    bench_json_series("us_per_row", &us);
    bench_json_series("gbps", &gbps);
    bench_json_series("gflops", &gflops);
    bench_json_end();
}

static float *floats(int64_t n)
{
    void *p;
    uint64_t r = 7;
    must(fm_region_alloc((size_t)n * sizeof(float), true, &p), "memory");
    for (int64_t i = 0; i < n; i++)
        ((float *)p)[i] = noise(&r);
    return p;
}

/* Both KV heads read the same K, V: counted once. Times of decode are per token, of prefill per row. */
static void run_attention(rig *r, sequence *q, float *out)
{
    static const int64_t contexts[] = {4096, 32768};
    const int64_t hd = 256, most = 32768;
    float *kv = floats(2 * most * hd), *qg = floats(MAX_N * 16 * 2 * hd);
    uint8_t *stored = (uint8_t *)floats(2 * most * hd);
    q->stride = 8 * fm_attn_part_floats(hd);
    q->scratch_floats = FM_ATTN_PASS * fm_attn_part_floats(hd);
    q->scratch = floats(q->scratch_floats * r->s->threads + 2 * most / FM_ATTN_PART * q->stride);
    q->attn = (fm_attn_args){.n_heads = 16, .n_kv_heads = 2, .head_dim = hd, .scale = 0.0625f, .q = qg, .gate = qg + hd,
                             .ld_q = 16 * 2 * hd, .ld_q_head = 2 * hd, .y = out, .ld_y = 4096};
    for (int f = 0; f < FM_COUNT(kv_formats); f++)
        for (int i = 0; i < FM_COUNT(contexts); i++) {
            char name[64];
            const int64_t cap = contexts[i], bytes = cap * hd * fm_quant_get(kv_formats[f])->bits / 8;
            r->k.kv_store(kv_formats[f], kv, cap * hd, stored);
            r->k.kv_store(kv_formats[f], kv + cap * hd, cap * hd, stored + bytes);
            q->kv = (fm_kv_head){stored, stored + bytes, kv_formats[f]};
            q->n = 1;
            q->n_before = cap - 1;
            snprintf(name, sizeof name, "attention decode, %dk %s", (int)(cap / 1024), fm_quant_get(kv_formats[f])->name);
            run_op(r, name, 1, 2 * cap / FM_ATTN_PART, attn_part_task, q, 2.0 * (double)bytes,
                   16.0 * 4 * (double)(cap * hd));
            q->n = 64;
            q->n_before = cap - q->n;
            snprintf(name, sizeof name, "attention prefill, 64 to %dk %s", (int)(cap / 1024),
                     fm_quant_get(kv_formats[f])->name);
            run_op(r, name, q->n, q->n / 16 * 2, attn_task, q, 0,
                   16.0 * 4 * (double)(q->n * (q->n_before + q->n / 2) * hd));
        }
    q->kv = (fm_kv_head){kv, kv + most * hd, FM_QUANT_F32};
    q->n = MAX_N;
    q->n_before = 0;
    run_op(r, "attention prefill, first 512", MAX_N, MAX_N / 16 * 2, attn_task, q, 0,
           16.0 * 2 * MAX_N * (double)(MAX_N * hd));
}

/* ---- attention of a token, its K and V from memory -------------------------------------------------- */

enum { KV_LAYERS = 3, KV_HEADS = 2, KV_CONTEXT = 32768, KV_DIM = 256 };

typedef struct cached {
    const rig *r;
    fm_attn_args attn;
    fm_kv_head kv[KV_LAYERS][KV_HEADS];
    float *parts;
    int64_t stride;
    int layer;
} cached;

static void cached_task(void *ctx, int64_t task, int worker)
{
    (void)worker;
    const cached *c = ctx;
    const int64_t n = KV_CONTEXT / FM_ATTN_PART, g = task / n; /* as the CPU backend divides them */
    c->r->k.attend_part(&c->attn, 0, 1, g, &c->kv[c->layer][g], KV_CONTEXT - 1, task % n, c->parts + task * c->stride);
}

static void run_cached(rig *r, fm_quant format)
{
    const int64_t n = (int64_t)KV_CONTEXT * KV_DIM, bytes = n * fm_quant_get(format)->bits / 8, noise_n = 1 << 20;
    cached c = {.r = r, .stride = 8 * fm_attn_part_floats(KV_DIM)};
    float *q = floats(8 * KV_HEADS * KV_DIM), *noise = floats(noise_n);
    c.parts = floats(KV_CONTEXT / FM_ATTN_PART * KV_HEADS * c.stride);
    c.attn = (fm_attn_args){.n_heads = 8 * KV_HEADS, .n_kv_heads = KV_HEADS, .head_dim = KV_DIM, .scale = 0.0625f, .q = q,
                            .ld_q = 8 * KV_HEADS * KV_DIM, .ld_q_head = KV_DIM, .y = r->y, .ld_y = 8 * KV_HEADS * KV_DIM};
    void *p;
    must(fm_region_alloc((size_t)bytes * 2 * KV_LAYERS * KV_HEADS, true, &p), "memory");
    for (int i = 0; i < 2 * KV_LAYERS * KV_HEADS; i++) {
        uint8_t *at = (uint8_t *)p + i * bytes;
        for (int64_t j = 0; j < n; j += noise_n)
            r->k.kv_store(format, noise, noise_n, at + j * (bytes / n));
        fm_kv_head *kv = &c.kv[i / 2 / KV_HEADS][i / 2 % KV_HEADS];
        kv->format = format;
        *(i % 2 ? &kv->v : &kv->k) = at;
    }
    const double all = (double)bytes * 2 * KV_LAYERS * KV_HEADS;
    bench_series gbps = {.n = 0}, roof = {.n = 0}, share = {.n = 0};
    for (int i = -1; i < r->s->runs; i++) { /* what is read between them takes K and V out of the caches */
        const double read = roof_read_seconds(r->pool, r->weights, r->s->bytes);
        const int64_t start = fm_clock_ns();
        for (c.layer = 0; c.layer < KV_LAYERS; c.layer++)
            fm_parallel_for(r->pool, KV_CONTEXT / FM_ATTN_PART * KV_HEADS, cached_task, &c);
        const double t = (double)(fm_clock_ns() - start) * 1e-9;
        if (i < 0)
            continue;
        bench_add(&gbps, all / t / 1e9);
        bench_add(&roof, (double)r->s->bytes / read / 1e9);
        bench_add(&share, all / t / ((double)r->s->bytes / read));
    }
    bench_json_begin("kernels");
    bench_json_text("op", "attention of a token, 3 layers of 32k positions");
    bench_json_text("variant", r->k.name);
    bench_json_text("format", fm_quant_get(format)->name);
    bench_json_int("threads", r->s->threads);
    bench_json_series("gbps", &gbps);
    bench_json_series("read_gbps", &roof);
    bench_json_series("share_of_read", &share);
    bench_json_end();
    fm_region_free(p, (size_t)bytes * 2 * KV_LAYERS * KV_HEADS);
}

static void run_sequence(rig *r)
{
    const int64_t layers = 8;
    sequence q = {.r = r};
    float *out = floats(MAX_N * 4096);
    run_attention(r, &q, out);
    float *qkv = floats(MAX_N * 8192), *z = floats(MAX_N * 4096), *ab = floats(2 * MAX_N * 32), *w = floats(1024);
    q.delta = (fm_delta_args){.n_k_heads = 16, .n_v_heads = 32, .dk = 128, .dv = 128, .qkv = qkv, .z = z, .a = ab,
                              .b = ab + MAX_N * 32, .A_log = w, .dt_bias = w + 32, .norm_w = w + 64, .eps = 1e-6f,
                              .y = out, .ld_qkv = 8192, .ld_z = 4096, .ld_ab = 32, .ld_y = 4096};
    q.S_in = floats(layers * 32 * 16384);
    q.S_out = floats(layers * 32 * 16384);
    q.scratch_floats = r->k.delta_scratch(&q.delta, MAX_N) + 16;
    q.scratch = floats(q.scratch_floats * r->s->threads);
    q.n = 1;
    run_op(r, "delta decode, 8 layers", 1, layers * 32, delta_task, &q, (double)(layers * 32) * 131072, 0);
    q.n = MAX_N;
    run_op(r, "delta prefill, one layer", MAX_N, 32, delta_task, &q, 0, 32.0 * MAX_N * 7 * 16384);
}

static void usage(void)
{
    fprintf(stderr, "bench_kernels [--variant NAME] [--numeric exact|fast] [--threads N] [--runs N] [--mbytes N] "
                    "[--only peaks|matvec|matmul|sequence|attention]\n");
    exit(2);
}

static settings parse(int argc, char **argv)
{
    static const struct option options[] = {
        {"variant", required_argument, NULL, 'v'}, {"numeric", required_argument, NULL, 'm'},
        {"threads", required_argument, NULL, 't'}, {"runs", required_argument, NULL, 'r'},
        {"mbytes", required_argument, NULL, 'b'},  {"only", required_argument, NULL, 'o'},
        {NULL, 0, NULL, 0},
    };
    settings s = {.numeric = FM_NUMERIC_FAST, .threads = fm_cpu_count(), .runs = 7, .bytes = 768 << 20};
    for (int c; (c = getopt_long(argc, argv, "", options, NULL)) != -1;)
        switch (c) {
        case 'v': s.variant = optarg; break;
        case 'm': s.numeric = strcmp(optarg, "exact") == 0 ? FM_NUMERIC_EXACT : FM_NUMERIC_FAST; break;
        case 't': s.threads = atoi(optarg); break;
        case 'r': s.runs = atoi(optarg); break;
        case 'b': s.bytes = (int64_t)atoi(optarg) << 20; break;
        case 'o': s.only = optarg; break;
        default: usage();
        }
    if (optind != argc || s.threads < 1 || s.runs < 1 || s.runs > BENCH_MAX_RUNS || s.bytes < 1 << 20)
        usage();
    return s;
}

static bool wanted(const settings *s, const char *what) { return s->only == NULL || strcmp(s->only, what) == 0; }

int main(int argc, char **argv)
{
    const settings s = parse(argc, argv);
    rig r = {.s = &s};
    const fm_kernels *k;
    void *p;
    must(fm_pool_open(s.threads, &r.pool), "threads");
    if (s.variant != NULL) {
        must(fm_kernels_variant_numeric(s.variant, s.numeric, &r.k), "variant");
    } else {
        must(fm_kernels_get_numeric(s.numeric, &k), "kernels");
        r.k = *k;
    }
    must(fm_region_alloc((size_t)s.bytes + (64 << 20), true, &p), "weights");
    r.weights = p;
    r.x = floats((int64_t)MAX_N * MAX_COLS);
    r.y = floats((int64_t)(MAX_N + 1) * MAX_OUT);
    must(fm_region_alloc(r.k.act_bytes(MAX_N, MAX_COLS) + 64, true, &p), "activations");
    r.prepared = p;
    r.peak_fma = roof_fma(r.pool);
    r.peak_int8 = roof_int8(r.pool);
    r.peak_tiles = roof_tiles(r.pool);
    memset(r.weights, 1, (size_t)s.bytes); /* pages that were never written are one page */
    bench_series read = {.n = 0};
    for (int i = 0; i < s.runs; i++)
        bench_add(&read, (double)s.bytes / roof_read_seconds(r.pool, r.weights, s.bytes) / 1e9);
    bench_json_begin("kernels");
    bench_json_text("op", "peaks");
    bench_json_int("threads", s.threads);
    bench_json_real("fma_gflops", r.peak_fma);
    bench_json_real("int8_gops", r.peak_int8);
    bench_json_real("tiles_gops", r.peak_tiles);
    bench_json_series("read_gbps", &read);
    bench_json_end();
    static const int64_t many[] = {16, 64, 512};
    for (int f = 0; f < FM_COUNT(formats); f++)
        for (int i = 0; i < FM_COUNT(shapes); i++) {
            if (wanted(&s, "matvec"))
                run_product(&r, formats[f], shapes[i], 1);
            for (int j = 0; j < FM_COUNT(many) && wanted(&s, "matmul"); j++)
                run_product(&r, formats[f], shapes[i], many[j]);
        }
    if (wanted(&s, "sequence"))
        run_sequence(&r);
    for (int f = 0; f < FM_COUNT(kv_formats) && wanted(&s, "attention"); f++)
        run_cached(&r, kv_formats[f]);
    fm_pool_close(r.pool);
    return 0;
}
