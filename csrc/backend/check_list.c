/* One function per op that lays out inputs and makes the call, and the sizes that it is called with: odd ones, the
 * borders of tiles, and shapes of Qwen3.5-35B-A3B and Qwen3.5-397B-A17B where speed is asked for. */
#include "backend/check_list.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { FLOAT = sizeof(float), MOST_COPIES = 8, COPIES_BYTES = 256 << 20 };

/* What the inputs of a call hold. */
static float *ones(fm_maker *m, int64_t n) { return fm_make_floats(m, n, -1, 1); }

/* One of several copies when timed: a decoder finds no weight in a cache either. */
static fm_mat fresh_mat(fm_maker *m, const fm_case *k, int64_t n_rows, int64_t n_cols)
{
    const int copies = k->copies > 1 ? k->copies : 1;
    const int64_t before = m->bytes_moved;
    fm_mat out = {0};
    for (int i = 0; i < copies; i++) {
        m->bytes_moved = before;
        const fm_mat one = fm_make_mat(m, k, n_rows, n_cols);
        if (i == m->rep % copies)
            out = one;
    }
    return out;
}

static void moved(fm_maker *m, int64_t floats) { m->bytes_moved += floats * FLOAT; }

/* ---- the calls: d[] as said at each ------------------------------------------------------------------- */

static fm_status call_embed(fm_maker *m, const fm_case *k, fm_backend *b) /* rows of W, cols */
{
    const fm_mat W = fm_make_mat(m, k, k->d[0], k->d[1]);
    const int32_t ids[] = {(int32_t)k->d[0] - 1, 0, (int32_t)k->d[0] / 2};
    float *y = ones(m, 3 * k->d[1]);
    return b ? b->v->embed(b, &W, ids, 3, y, k->d[1]) : FM_OK;
}

static fm_status call_matmul(fm_maker *m, const fm_case *k, fm_backend *b) /* n, out, cols, 1: bias and add */
{
    const int64_t n = k->d[0], out = k->d[1], cols = k->d[2];
    const fm_mat W = fresh_mat(m, k, out, cols);
    const bool more = k->d[3] != 0;
    float *x = ones(m, n * (cols + 3)), *bias = ones(m, out), *y = ones(m, n * (out + 1));
    moved(m, n * (cols + out));
    const fm_matmul_item item = {&W, more ? bias : NULL, y, out + 1, more, true};
    return b ? b->v->matmul(b, x, cols + 3, n, &item, 1) : FM_OK;
}

enum { MAX_JOBS = 16, MAX_ROWS = 256 };

static fm_status call_experts(fm_maker *m, const fm_case *k, fm_backend *b) /* jobs, rows of job 0, 1.., hidden, width */
{
    const int64_t hidden = k->d[3], width = k->d[4];
    fm_expert_job jobs[MAX_JOBS];
    int32_t rows[MAX_JOBS * MAX_ROWS];
    int64_t n = 0;
    for (int64_t j = 0; j < k->d[0]; j++) {
        fm_expert_job *job = &jobs[j];
        job->gate = fresh_mat(m, k, width, hidden);
        job->up = fresh_mat(m, k, width, hidden);
        job->down = fresh_mat(m, k, hidden, width);
        job->rows = rows + n;
        job->n = j == 0 ? k->d[1] : k->d[2];
        job->out0 = n;
        for (int64_t i = 0; i < job->n; i++, n++)
            rows[n] = (int32_t)((7 * n + 3) % k->d[1]);
    }
    const fm_expert_args a = {.x = ones(m, k->d[1] * hidden), .n_x = k->d[1], .jobs = jobs, .n_jobs = (int)k->d[0],
                              .gate = ones(m, n * width), .up = ones(m, n * width), .out = ones(m, n * hidden)};
    moved(m, k->d[1] * hidden + n * (2 * width + hidden));
    return b ? b->v->experts(b, &a) : FM_OK;
}

static fm_status call_rmsnorm(fm_maker *m, const fm_case *k, fm_backend *b) /* n, cols */
{
    const int64_t n = k->d[0], cols = k->d[1];
    float *x = ones(m, n * (cols + 1)), *w = ones(m, cols), *y = ones(m, n * cols);
    return b ? b->v->rmsnorm(b, x, cols + 1, w, 1e-6f, y, cols, n, cols) : FM_OK;
}

static fm_status call_clip(fm_maker *m, const fm_case *k, fm_backend *b) /* n */
{
    float *x = ones(m, k->d[0]);
    return b ? b->v->clip(b, x, k->d[0], 0.5f) : FM_OK;
}

static fm_status call_swiglu(fm_maker *m, const fm_case *k, fm_backend *b) /* n */
{
    float *gate = fm_make_floats(m, k->d[0], -90, 90), *up = ones(m, k->d[0]);
    return b ? b->v->swiglu(b, gate, up, gate, k->d[0]) : FM_OK;
}

static fm_status call_add_gated(fm_maker *m, const fm_case *k, fm_backend *b) /* n, cols, 1: gate */
{
    const int64_t n = k->d[0], cols = k->d[1];
    float *x = ones(m, n * cols), *gate = fm_make_floats(m, n, -9, 9), *y = ones(m, n * cols);
    return b ? b->v->add_gated(b, x, k->d[2] ? gate : NULL, y, n, cols) : FM_OK;
}

static fm_status call_combine(fm_maker *m, const fm_case *k, fm_backend *b) /* hidden */
{
    static const int32_t start[] = {0, 3, 3, 8}, index[] = {4, 0, 7, 1, 3, 0, 2, 4};
    static const float weight[] = {0.3f, 0.1f, 0.6f, 1, -0.5f, 0.01f, 0.2f, 0.7f};
    const int64_t H = k->d[0];
    fm_combine_args a = {.y = ones(m, 3 * H), .n = 3, .hidden = H, .part = ones(m, 8 * H), .start = start,
                         .index = index, .weight = weight, .n_parts = 8};
    return b ? b->v->combine(b, &a) : FM_OK;
}

static fm_status call_nonfinite(fm_maker *m, const fm_case *k, fm_backend *b) /* n, cols, bad row or -1 */
{
    const int64_t n = k->d[0], cols = k->d[1];
    float *x = ones(m, n * cols);
    int64_t row;
    if (b && k->d[2] >= 0)
        x[k->d[2] * cols + cols - 1] = INFINITY;
    return b ? b->v->find_nonfinite(b, x, n, cols, &row) : FM_OK;
}

static fm_status call_rope(fm_maker *m, const fm_case *k, fm_backend *b) /* n, heads, head dim, rot, pos0 */
{
    enum { MAX_HALF = 128 };
    double freq[MAX_HALF];
    const int64_t rot = k->d[3], ld = k->d[1] * k->d[2];
    for (int64_t i = 0; i < rot / 2; i++)
        freq[i] = pow(1e7, -2.0 * (double)i / (double)rot);
    const fm_span span = {0, k->d[0], k->d[4]};
    const fm_rope_args a = {ones(m, k->d[0] * ld), ld, k->d[2], k->d[1], rot, freq, &span, 1};
    return b ? b->v->rope(b, &a) : FM_OK;
}

static fm_status call_attention(fm_maker *m, const fm_case *k, fm_backend *b) /* n, pos0, heads, kv heads, dim, 1: gate */
{
    const int64_t n = k->d[0], heads = k->d[2], nkv = k->d[3], hd = k->d[4], all = k->d[1] + n;
    const fm_span span = {0, n, k->d[1]};
    fm_kv kv = {.capacity = all + 5};
    kv.k = ones(m, nkv * kv.capacity * hd);
    kv.v = ones(m, nkv * kv.capacity * hd);
    float *q = fm_make_floats(m, n * heads * 2 * hd, -2, 2), *fresh = ones(m, n * nkv * hd);
    const fm_attention_args a = {
        .a = {.n_heads = heads, .n_kv_heads = nkv, .head_dim = hd, .scale = 1 / sqrtf((float)hd), .q = q,
              .gate = q && k->d[5] ? q + hd : NULL, .ld_q = heads * 2 * hd, .ld_q_head = 2 * hd,
              .y = ones(m, n * heads * hd), .ld_y = heads * hd},
        .k = fresh, .v = fresh, .ld_kv = nkv * hd, .spans = &span, .kv = &kv, .n_spans = 1};
    moved(m, 2 * nkv * all * hd + n * heads * 3 * hd);
    return b ? b->v->attention(b, &a) : FM_OK;
}

static fm_status call_conv(fm_maker *m, const fm_case *k, fm_backend *b) /* n, channels, kern */
{
    const int64_t n = k->d[0], n_ch = k->d[1], kern = k->d[2];
    const fm_span span = {0, n, 0};
    const float *in = ones(m, (kern - 1) * n_ch);
    float *out = ones(m, (kern - 1) * n_ch);
    const fm_conv_args a = {.m = ones(m, n * n_ch), .y = ones(m, n * n_ch), .ldm = n_ch, .ldy = n_ch, .n_ch = n_ch,
                            .kern = kern, .w = ones(m, n_ch * kern), .spans = &span, .hist_in = &in,
                            .hist_out = &out, .n_spans = 1};
    return b ? b->v->conv(b, &a) : FM_OK;
}

static fm_status call_delta(fm_maker *m, const fm_case *k, fm_backend *b) /* n, key heads, value heads, dk, dv */
{
    const int64_t n = k->d[0], hk = k->d[1], hv = k->d[2], dk = k->d[3], dv = k->d[4];
    const int64_t width = 2 * hk * dk + hv * dv, state = hv * dk * dv;
    const fm_span span = {0, n, 0};
    const float *in = fm_make_floats(m, state, -0.3f, 0.3f);
    float *out = ones(m, state);
    const fm_delta_batch a = {
        .a = {.n_k_heads = hk, .n_v_heads = hv, .dk = dk, .dv = dv, .qkv = ones(m, n * width), .z = ones(m, n * hv * dv),
              .a = ones(m, n * hv), .b = fm_make_floats(m, n * hv, -3, 3), .A_log = fm_make_floats(m, hv, -4, 2),
              .dt_bias = ones(m, hv), .norm_w = ones(m, dv), .eps = 1e-6f, .y = ones(m, n * hv * dv), .ld_qkv = width,
              .ld_z = hv * dv, .ld_ab = hv, .ld_y = hv * dv},
        .spans = &span, .S_in = &in, .S_out = &out, .n_spans = 1};
    moved(m, 2 * state + n * (width + 2 * hv * dv));
    return b ? b->v->delta(b, &a) : FM_OK;
}

static fm_status call_route(fm_maker *m, const fm_case *k, fm_backend *b) /* n, experts, k, sigmoid, renorm, groups */
{
    const int64_t n = k->d[0], E = k->d[1];
    fm_route_args a = {.n_experts = E, .k = k->d[2], .sigmoid = (int)k->d[3], .renorm = (int)k->d[4], .eps = 1e-20f,
                       .scale = 2.5f, .n_group = k->d[5], .topk_group = k->d[5] / 2};
    float *logits = fm_make_floats(m, n * E, -6, 6), *bias = fm_make_floats(m, E, -0.1f, 0.1f);
    int32_t *ids = fm_make_bytes(m, n * a.k * FLOAT);
    float *weights = ones(m, n * a.k);
    a.bias = a.sigmoid ? bias : NULL;
    for (int64_t i = 0; b && i < n * E; i += 5)
        logits[i] = rintf(logits[i]); /* ties: the lower id first */
    return b ? b->v->route(b, &a, logits, n, ids, weights) : FM_OK;
}

/* ---- the list -------------------------------------------------------------------------------------------- */

typedef fm_status call_fn(fm_maker *m, const fm_case *k, fm_backend *b);

typedef struct list {
    fm_case *out;
    int n;
    bool small;
} list;

/* A case with nothing but its op and sizes; the caller sets formats. Past the end the last one is made again. */
static FM_PRINTF(5, 6) fm_case *add(list *l, const char *op, call_fn *call, const int64_t d[8], const char *fmt, ...)
{
    fm_case *k = &l->out[l->n < FM_CHECK_MAX_CASES ? l->n++ : l->n - 1];
    memset(k, 0, sizeof *k);
    k->op = op;
    k->call = call;
    memcpy(k->d, d, sizeof k->d);
    k->scale_format = FM_QUANT_BF16;
    va_list args;
    va_start(args, fmt);
    vsnprintf(k->sizes, sizeof k->sizes, fmt, args);
    va_end(args);
    return k;
}

#define D(...) (const int64_t[8]){__VA_ARGS__}
#define I PRId64

static bool is_affine(int q) { return fm_quant_get((fm_quant)q)->affine; }

/* Sets a case's weights and says so. */
static void with_format(fm_case *k, int q, int32_t group, int odd)
{
    char sizes[sizeof k->sizes];
    memcpy(sizes, k->sizes, sizeof sizes);
    k->format = (fm_quant)q;
    k->group = group;
    k->odd = odd;
    snprintf(k->sizes, sizeof k->sizes, "%s%s%.0d %.60s%s", fm_quant_get((fm_quant)q)->name, is_affine(q) ? " g" : "",
             is_affine(q) ? group : 0, sizes, odd ? ", unaligned" : "");
}

static void add_matmul(list *l, int q, int32_t group, int odd, int64_t n, int64_t out, int64_t cols, bool more)
{
    fm_case *k = add(l, "matmul", call_matmul, D(n, out, cols, more), "%" I " x [%" I ", %" I "]%s", n, out, cols,
                     more ? " + bias, added" : "");
    with_format(k, q, group, odd);
}

static void add_experts(list *l, int q, int32_t group, int odd, int64_t jobs, int64_t first, int64_t others, int64_t hidden,
                        int64_t width)
{
    fm_case *k = add(l, "experts", call_experts, D(jobs, first, others, hidden, width),
                     "%" I " of [%" I ", %" I "], %" I "/%" I " rows", jobs, width, hidden, first, others);
    with_format(k, q, group, odd);
}

static void add_matrices(list *l)
{
    const int64_t wide = l->small ? 256 : 2048, ns[] = {1, 4, 5, 33};
    for (int q = 0; q < FM_QUANT_COUNT; q++) {
        const bool affine = is_affine(q);
        for (int i = 0; i < FM_COUNT(ns); i++) {
            add_matmul(l, q, 32, 0, ns[i], 1, affine ? 32 : 31, false);
            add_matmul(l, q, 32, 0, ns[i], 33, affine ? 160 : 129, ns[i] > 1);
            add_matmul(l, q, 64, 0, ns[i], 250, wide, false);
        }
        for (int32_t group = 16; affine && group <= 128; group *= 2)
            add_matmul(l, q, group, 0, 2, 65, 384, false);
        for (int odd = 1; odd < 4; odd++) {
            add_matmul(l, q, 32, odd, odd == 2 ? 9 : 1, 17, affine ? 96 : 77, false);
            fm_case *k = add(l, "embed", call_embed, D(13, affine ? 96 : 77), "[13, %d]", affine ? 96 : 77);
            with_format(k, q, 32, odd - 1);
        }
        add_experts(l, q, 32, 0, 8, 1, 1, l->small ? 64 : 512, 96);
        add_experts(l, q, 32, 1, 3, 7, 2, 96, 64);
        add_experts(l, q, 64, 0, 2, 40, 33, l->small ? 64 : 512, 128);
    }
    for (int scale = 0; scale < 3; scale++) { /* the plain formats come first in the list */
        add_matmul(l, FM_QUANT_COUNT - 1, 64, 0, 3, 40, 192, false);
        l->out[l->n - 1].scale_format = (fm_quant)scale;
        snprintf(l->out[l->n - 1].sizes + strlen(l->out[l->n - 1].sizes), 20, ", %s scales", fm_quant_get((fm_quant)scale)->name);
    }
}

static void add_rows(list *l)
{
    static const int64_t widths[] = {1, 33, 128, 4096};
    for (int i = 0; i < FM_COUNT(widths); i++) {
        const int64_t w = widths[i];
        add(l, "rmsnorm", call_rmsnorm, D(7, w), "[7, %" I "]", w);
        add(l, "swiglu", call_swiglu, D(w), "%" I, w);
        add(l, "clip", call_clip, D(w), "%" I, w);
        add(l, "add_gated", call_add_gated, D(3, w, i % 2), "[3, %" I "]%s", w, i % 2 ? ", gate" : "");
        add(l, "combine", call_combine, D(w), "[3, %" I "]", w);
        add(l, "find_nonfinite", call_nonfinite, D(5, w, i - 1), "[5, %" I "], row %d", w, i - 1);
    }
    add(l, "rope", call_rope, D(3, 5, 32, 8, 0), "3 rows, 5 heads, 8 of 32, from 0");
    add(l, "rope", call_rope, D(2, 4, 256, 64, 200000), "2 rows, 4 heads, 64 of 256, from 200000");
    static const int64_t routes[][6] = {{9, 8, 2, 0, 1, 0}, {5, 64, 6, 0, 0, 0}, {4, 256, 8, 0, 1, 0}, {4, 512, 10, 0, 1, 0},
                                        {5, 128, 8, 1, 1, 0}, {5, 160, 8, 1, 1, 8}};
    for (int i = 0; i < FM_COUNT(routes); i++) {
        const int64_t *r = routes[i];
        add(l, "route", call_route, D(r[0], r[1], r[2], r[3], r[4], r[5]), "%" I " rows, %" I " of %" I "%s%s%s", r[0], r[2], r[1],
            r[3] ? ", sigmoid + bias" : ", softmax", r[4] ? ", renormed" : "", r[5] ? ", 4 of 8 groups" : "");
    }
}

static void add_mixers(list *l)
{
    static const int64_t dims[] = {32, 33, 64, 128, 256}, spans[][2] = {{1, 0}, {1, 37}, {2, 5}, {3, 0}, {40, 0}, {33, 100}};
    for (int i = 0; i < FM_COUNT(dims); i++)
        for (int s = 0; s < FM_COUNT(spans); s++)
            add(l, "attention", call_attention, D(spans[s][0], spans[s][1], 6, 2, dims[i], s % 2),
                "%" I " rows after %" I ", 6/2 heads of %" I "%s", spans[s][0], spans[s][1], dims[i], s % 2 ? ", gate" : "");
    static const int64_t convs[][3] = {{1, 24, 4}, {2, 200, 4}, {40, 70, 4}, {5, 33, 2}};
    for (int i = 0; i < FM_COUNT(convs); i++)
        add(l, "conv", call_conv, D(convs[i][0], convs[i][1], convs[i][2]), "%" I " rows, %" I " channels, %" I " taps", convs[i][0],
            convs[i][1], convs[i][2]);
    static const int64_t heads[][4] = {{1, 2, 16, 16}, {2, 4, 64, 64}, {1, 3, 160, 33}, {1, 2, 128, 128}}, ns[] = {1, 3, 16, 40};
    for (int h = 0; h < FM_COUNT(heads); h++)
        for (int i = 0; i < FM_COUNT(ns); i++)
            add(l, "delta", call_delta, D(ns[i], heads[h][0], heads[h][1], heads[h][2], heads[h][3]),
                "%" I " rows, %" I "/%" I " heads of %" I "x%" I, ns[i], heads[h][1], heads[h][0], heads[h][2], heads[h][3]);
}

static void timed(list *l, const char *model)
{
    fm_case *k = &l->out[l->n - 1];
    const size_t n = strlen(k->sizes);
    fm_maker m = {0};
    (void)k->call(&m, k, NULL); /* measures: laying out cannot fail */
    k->copies = 1 + (int)(COPIES_BYTES / (m.used + 1));
    k->copies = k->copies < MOST_COPIES ? k->copies : MOST_COPIES;
    snprintf(k->sizes + n, sizeof k->sizes - n, " (%s)", model);
}

/* What decoding and reading a prompt spend their time in. */
static void add_speeds(list *l)
{
    const int64_t part = l->small ? 16 : 1;
    static const struct { const char *name; int64_t hidden, width, k, q_rows, heads, v_heads; } models[] = {
        {"35B", 2048, 512, 8, 8192, 16, 32}, {"397B", 4096, 1024, 10, 16384, 32, 64}};
    for (int i = 0; i < FM_COUNT(models); i++) {
        const int64_t H = models[i].hidden / part, W = models[i].width / (l->small ? 8 : 1), hd = 256 / (l->small ? 4 : 1);
        const int64_t heads = models[i].heads / (l->small ? 8 : 1), hv = models[i].v_heads / part, dk = 128 / (l->small ? 8 : 1);
        for (int q = 0; q < FM_QUANT_COUNT; q++) {
            add_experts(l, q, 64, 0, models[i].k, 1, 1, H, W);
            timed(l, models[i].name);
            add_matmul(l, q, 64, 0, 1, models[i].q_rows / part, H, false);
            timed(l, models[i].name);
        }
        for (int q = 0; q < FM_QUANT_COUNT; q++) {
            add_experts(l, q, 64, 0, 4, 64 / part, 64 / part, H, W);
            timed(l, models[i].name);
        }
        add(l, "attention", call_attention, D(1, 4095 / part, heads, 2, hd, 1), "1 row after %" I ", %" I "/2 heads of %" I, 4095 / part, heads, hd);
        timed(l, models[i].name);
        add(l, "attention", call_attention, D(256 / part, 0, heads, 2, hd, 1), "%" I " rows after 0, %" I "/2 heads of %" I, 256 / part, heads, hd);
        timed(l, models[i].name);
        add(l, "delta", call_delta, D(1, hv > 16 ? 16 : 1, hv, dk, dk), "1 row, %" I " heads of %" I "x%" I, hv, dk, dk);
        timed(l, models[i].name);
        add(l, "delta", call_delta, D(256 / part, hv > 16 ? 16 : 1, hv, dk, dk), "%" I " rows, %" I " heads of %" I "x%" I, 256 / part, hv, dk, dk);
        timed(l, models[i].name);
    }
}

int fm_check_list(fm_case *out, bool small)
{
    list l = {out, 0, small};
    add_matrices(&l);
    add_rows(&l);
    add_mixers(&l);
    add_speeds(&l);
    return l.n;
}
