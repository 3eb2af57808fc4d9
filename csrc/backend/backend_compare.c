/* Every op: the judge into copies, the device as asked, then element by element. What may be read was there before the
 * op; what is written in place is copied first. */
#include "backend/backend_compare.h"

#include <inttypes.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "backend/compare_bound.h"
#include "base/mem.h"

enum { MAX_TEMPS = 160, TEXT = 160, MAX_ITEMS = MAX_TEMPS / 2 };

typedef struct compare {
    fm_backend base;
    fm_backend_vtable v; /* its name tells that results are compared */
    char name[48];
    fm_backend *dev, *cpu;
    fm_pool *pool;
    void *temps[MAX_TEMPS]; /* of the op at work */
    int n_temps;
    int64_t n_ops;
    double worst;
    char what[TEXT]; /* the op at work and its sizes */
} compare;

static const double u = 0x1p-24;

static compare *self(fm_backend *b) { return (compare *)b; }

/* Memory until the op ends; zero at first. */
static fm_status temp_bytes(compare *c, size_t bytes, void **out)
{
    if (c->n_temps == MAX_TEMPS)
        return fm_fail(FM_ERR_UNSUPPORTED, "FLASHMOE_COMPARE: %s needs more than %d copies", c->what, MAX_TEMPS);
    FM_TRY(fm_alloc(bytes, out));
    c->temps[c->n_temps++] = *out;
    return FM_OK;
}

static fm_status temp(compare *c, int64_t n, float **out)
{
    void *p;
    FM_TRY(temp_bytes(c, (size_t)n * sizeof(float), &p));
    *out = p;
    return FM_OK;
}

static FM_PRINTF(2, 3) fm_status begin_op(compare *c, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    vsnprintf(c->what, sizeof c->what, fmt, args);
    va_end(args);
    c->n_ops++;
    return c->dev->v->sync(c->dev); /* the judge reads what the device wrote */
}

static fm_status end_op(compare *c, fm_status s)
{
    while (c->n_temps > 0)
        fm_free(c->temps[--c->n_temps]);
    return s;
}

/* The device's turn. */
#define ON_DEVICE(c, call)                                                                         \
    do {                                                                                           \
        FM_TRY((c)->dev->v->call);                                                                 \
        FM_TRY((c)->dev->v->sync((c)->dev));                                                       \
    } while (0)

/* ---- comparing ------------------------------------------------------------------------------------- */

static fm_status differs(compare *c, const char *part, int64_t row, int64_t col, double got, double want, double bound)
{
    char layer[32] = "";
    if (c->base.layer >= 0)
        snprintf(layer, sizeof layer, " in layer %" PRId32, c->base.layer);
    c->worst = fmax(c->worst, bound > 0 && isfinite(got) ? fabs(got - want) / bound : INFINITY);
    return fm_fail(FM_ERR_BACKEND,
                   "FLASHMOE_COMPARE: op %" PRId64 "%s, %s: %s[%" PRId64 ", %" PRId64 "] is %.9g on '%s' and %.9g on '%s'; "
                   "they differ by %.3g, at most %.3g is allowed",
                   c->n_ops, layer, c->what, part, row, col, got, c->dev->v->name, want, c->cpu->v->name,
                   fabs(got - want), bound);
}

/* A block [n, n_cols] of each; bound NULL: equal. Devices may flush subnormal numbers. */
typedef struct block {
    const char *part;
    const float *got, *want, *bound;
    int64_t ld_got, ld, n, n_cols; /* ld: of want and bound */
} block;

static fm_status check(compare *c, block b)
{
    for (int64_t r = 0; r < b.n; r++)
        for (int64_t i = 0; i < b.n_cols; i++) {
            const double got = b.got[r * b.ld_got + i], want = b.want[r * b.ld + i];
            const double bound = b.bound ? b.bound[r * b.ld + i] + 0x1p-120 : 0, off = fabs(got - want);
            if (got == want || (!isfinite(got) && !isfinite(want)))
                continue; /* what overflows here may be NaN there */
            if (!(off <= bound))
                return differs(c, b.part, r, i, got, want, bound);
            c->worst = fmax(c->worst, off / bound);
        }
    return FM_OK;
}

/* ---- rows -------------------------------------------------------------------------------------------- */

static const char *format_name(const fm_mat *W) { return fm_quant_get(W->format)->name; }

static fm_status embed(compare *c, const fm_mat *W, const int32_t *ids, int64_t n, float *y, int64_t ldy)
{
    float *want, *bound;
    const int64_t H = W->n_cols;
    FM_TRY(temp(c, n * H, &want));
    FM_TRY(temp(c, n * H, &bound));
    FM_TRY(c->cpu->v->embed(c->cpu, W, ids, n, want, H));
    for (int64_t i = 0; i < n; i++)
        FM_TRY(fm_bound_row(W, ids[i], bound + i * H));
    ON_DEVICE(c, embed(c->dev, W, ids, n, y, ldy));
    return check(c, (block){"y", y, want, bound, ldy, H, n, H});
}

static fm_status op_embed(fm_backend *b, const fm_mat *W, const int32_t *ids, int64_t n, float *y, int64_t ldy)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "embed of %" PRId64 " ids, %s [%" PRId64 ", %" PRId64 "]", n, format_name(W), W->n_rows, W->n_cols));
    return end_op(c, embed(c, W, ids, n, y, ldy));
}

static fm_status rmsnorm(compare *c, const float *x, int64_t ldx, const float *w, float eps, float *y, int64_t ldy,
                         int64_t n, int64_t n_cols)
{
    float *want, *bound;
    FM_TRY(temp(c, n * n_cols, &want));
    FM_TRY(temp(c, n * n_cols, &bound));
    FM_TRY(c->cpu->v->rmsnorm(c->cpu, x, ldx, w, eps, want, n_cols, n, n_cols));
    for (int64_t i = 0; i < n * n_cols; i++)
        bound[i] = (float)(16 * u) * fabsf(want[i]);
    ON_DEVICE(c, rmsnorm(c->dev, x, ldx, w, eps, y, ldy, n, n_cols));
    return check(c, (block){"y", y, want, bound, ldy, n_cols, n, n_cols});
}

static fm_status op_rmsnorm(fm_backend *b, const float *x, int64_t ldx, const float *w, float eps, float *y,
                            int64_t ldy, int64_t n, int64_t n_cols)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "rmsnorm of [%" PRId64 ", %" PRId64 "]", n, n_cols));
    return end_op(c, rmsnorm(c, x, ldx, w, eps, y, ldy, n, n_cols));
}

static fm_status clip(compare *c, float *x, int64_t n, float limit)
{
    float *want;
    FM_TRY(temp(c, n, &want));
    memcpy(want, x, (size_t)n * sizeof *x);
    FM_TRY(c->cpu->v->clip(c->cpu, want, n, limit));
    ON_DEVICE(c, clip(c->dev, x, n, limit));
    return check(c, (block){"x", x, want, NULL, n, n, 1, n});
}

static fm_status op_clip(fm_backend *b, float *x, int64_t n, float limit)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "clip of %" PRId64 " numbers", n));
    return end_op(c, clip(c, x, n, limit));
}

static fm_status swiglu(compare *c, const float *gate, const float *up, float *y, int64_t n)
{
    float *want, *bound;
    FM_TRY(temp(c, n, &want));
    FM_TRY(temp(c, n, &bound));
    FM_TRY(c->cpu->v->swiglu(c->cpu, gate, up, want, n));
    for (int64_t i = 0; i < n; i++)
        bound[i] = (float)(32 * u) * fabsf(want[i]) + 0x1p-119f * fabsf(up[i]);
    ON_DEVICE(c, swiglu(c->dev, gate, up, y, n));
    return check(c, (block){"y", y, want, bound, n, n, 1, n});
}

static fm_status op_swiglu(fm_backend *b, const float *gate, const float *up, float *y, int64_t n)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "swiglu of %" PRId64 " numbers", n));
    return end_op(c, swiglu(c, gate, up, y, n));
}

static fm_status add_gated(compare *c, const float *x, const float *gate, float *y, int64_t n, int64_t n_cols)
{
    float *want, *bound;
    FM_TRY(temp(c, n * n_cols, &want));
    FM_TRY(temp(c, n * n_cols, &bound));
    memcpy(want, y, (size_t)(n * n_cols) * sizeof *y);
    FM_TRY(c->cpu->v->add_gated(c->cpu, x, gate, want, n, n_cols));
    for (int64_t i = 0; i < n * n_cols; i++) /* the gate has the bound of swiglu's */
        bound[i] = (float)(4 * u) * fabsf(y[i]) + (float)(36 * u) * fabsf(x[i]);
    ON_DEVICE(c, add_gated(c->dev, x, gate, y, n, n_cols));
    return check(c, (block){"y", y, want, bound, n_cols, n_cols, n, n_cols});
}

static fm_status op_add_gated(fm_backend *b, const float *x, const float *gate, float *y, int64_t n, int64_t n_cols)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "add_gated of [%" PRId64 ", %" PRId64 "]", n, n_cols));
    return end_op(c, add_gated(c, x, gate, y, n, n_cols));
}

static fm_status combine(compare *c, const fm_combine_args *a)
{
    const int64_t H = a->hidden;
    float *want, *bound;
    FM_TRY(temp(c, a->n * H, &want));
    FM_TRY(temp(c, a->n * H, &bound));
    memcpy(want, a->y, (size_t)(a->n * H) * sizeof *want);
    fm_combine_args w = *a;
    w.y = want;
    FM_TRY(c->cpu->v->combine(c->cpu, &w));
    for (int64_t r = 0; r < a->n; r++)
        for (int64_t i = 0; i < H; i++) {
            double sum = fabsf(a->y[r * H + i]);
            for (int32_t e = a->start[r]; e < a->start[r + 1]; e++)
                sum += fabs((double)a->weight[e] * a->part[a->index[e] * H + i]);
            bound[r * H + i] = (float)(4 * u * (a->start[r + 1] - a->start[r]) * sum);
        }
    ON_DEVICE(c, combine(c->dev, a));
    return check(c, (block){"y", a->y, want, bound, H, H, a->n, H});
}

static fm_status op_combine(fm_backend *b, const fm_combine_args *a)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "combine of [%" PRId64 ", %" PRId64 "]", a->n, a->hidden));
    return end_op(c, combine(c, a));
}

static fm_status op_find_nonfinite(fm_backend *b, const float *x, int64_t n, int64_t n_cols, int64_t *row)
{
    compare *c = self(b);
    int64_t want;
    FM_TRY(begin_op(c, "find_nonfinite in [%" PRId64 ", %" PRId64 "]", n, n_cols));
    FM_TRY(c->cpu->v->find_nonfinite(c->cpu, x, n, n_cols, &want));
    FM_TRY(c->dev->v->find_nonfinite(c->dev, x, n, n_cols, row));
    return *row == want ? FM_OK : differs(c, "row", 0, 0, (double)*row, (double)want, 0);
}

/* ---- matrices ------------------------------------------------------------------------------------------ */

static fm_status matmul(compare *c, const float *x, int64_t ldx, int64_t n, const fm_matmul_item *items, int n_items)
{
    float *want[MAX_ITEMS], *bound[MAX_ITEMS];
    char op[TEXT];
    for (int i = 0; i < n_items; i++) {
        const fm_matmul_item *it = &items[i];
        const int64_t out = it->W->n_rows;
        FM_TRY(temp(c, n * out, &want[i]));
        FM_TRY(temp(c, n * out, &bound[i]));
        for (int64_t r = 0; r < n; r++)
            for (int64_t k = 0; k < out; k++) {
                const float before = it->add ? it->y[r * it->ldy + k] : 0;
                want[i][r * out + k] = before;
                bound[i][r * out + k] = fabsf(before) + (it->bias ? fabsf(it->bias[k]) : 0);
            }
        const fm_matmul_item judged = {it->W, it->bias, want[i], out, it->add, true};
        FM_TRY(c->cpu->v->matmul(c->cpu, x, ldx, n, &judged, 1));
        FM_TRY(fm_bound_matmul(c->pool, it->W, x, ldx, NULL, n, bound[i]));
    }
    ON_DEVICE(c, matmul(c->dev, x, ldx, n, items, n_items));
    memcpy(op, c->what, sizeof op);
    for (int i = 0; i < n_items; i++) {
        const fm_mat *W = items[i].W;
        snprintf(c->what, sizeof c->what, "%.60s, matrix %d of %d, %s [%" PRId64 ", %" PRId64 "]%s%s", op, i + 1, n_items,
                 format_name(W), W->n_rows, W->n_cols, items[i].bias ? " + bias" : "", items[i].add ? ", added" : "");
        FM_TRY(check(c, (block){"y", items[i].y, want[i], bound[i], items[i].ldy, W->n_rows, n, W->n_rows}));
    }
    return FM_OK;
}

static fm_status op_matmul(fm_backend *b, const float *x, int64_t ldx, int64_t n, const fm_matmul_item *items,
                           int n_items)
{
    compare *c = self(b);
    if (n_items > MAX_ITEMS)
        return fm_fail(FM_ERR_ARG, "FLASHMOE_COMPARE: %d matrices in one call, at most %d", n_items, MAX_ITEMS);
    FM_TRY(begin_op(c, "matmul of %" PRId64 " rows", n));
    return end_op(c, matmul(c, x, ldx, n, items, n_items));
}

static fm_status experts(compare *c, const fm_expert_args *a)
{
    if (a->n_jobs == 0)
        return FM_OK;
    const int64_t H = a->jobs[0].gate.n_cols, width = a->jobs[0].gate.n_rows;
    char op[TEXT];
    int64_t end = 0;
    for (int j = 0; j < a->n_jobs; j++)
        end = a->jobs[j].out0 + a->jobs[j].n > end ? a->jobs[j].out0 + a->jobs[j].n : end;
    fm_expert_args judged = *a;
    float *bound;
    FM_TRY(temp(c, end * width, &judged.gate));
    FM_TRY(temp(c, end * width, &judged.up));
    FM_TRY(temp(c, end * H, &judged.out));
    FM_TRY(temp(c, end * H, &bound));
    FM_TRY(c->cpu->v->experts(c->cpu, &judged));
    for (int j = 0; j < a->n_jobs; j++)
        FM_TRY(fm_bound_expert(c->pool, &a->jobs[j], a->x, bound));
    ON_DEVICE(c, experts(c->dev, a));
    memcpy(op, c->what, sizeof op);
    for (int j = 0; j < a->n_jobs; j++) {
        const fm_expert_job *job = &a->jobs[j];
        const int64_t at = job->out0 * H;
        snprintf(c->what, sizeof c->what, "%.60s, job %d of %d, gate %s [%" PRId64 ", %" PRId64 "], down %s", op, j + 1,
                 a->n_jobs, format_name(&job->gate), width, H, format_name(&job->down));
        FM_TRY(check(c, (block){"out", a->out + at, judged.out + at, bound + at, H, H, job->n, H}));
    }
    return FM_OK;
}

static fm_status op_experts(fm_backend *b, const fm_expert_args *a)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "experts on %" PRId64 " rows", a->n_x));
    return end_op(c, experts(c, a));
}

/* ---- mixers ---------------------------------------------------------------------------------------------- */

static int64_t rows_of(const fm_span *spans, int n_spans)
{
    int64_t end = 0;
    for (int s = 0; s < n_spans; s++)
        end = spans[s].row0 + spans[s].n > end ? spans[s].row0 + spans[s].n : end;
    return end;
}

static fm_status rope(compare *c, const fm_rope_args *a)
{
    const int64_t rows = rows_of(a->spans, a->n_spans), head = (a->n_heads - 1) * a->ld_head + a->rot;
    const int64_t size = rows > 0 ? (rows - 1) * a->ld + head : 0;
    fm_rope_args judged = *a;
    float *bound;
    FM_TRY(temp(c, rows * a->ld + head, &judged.x));
    FM_TRY(temp(c, rows * a->ld + head, &bound));
    memcpy(judged.x, a->x, (size_t)size * sizeof *bound);
    for (int64_t r = 0; r < rows; r++) /* in no span, or between the heads: bound 0 */
        for (int64_t h = 0; h < a->n_heads; h++)
            for (int64_t i = 0; i < a->rot; i++) {
                const int64_t at = r * a->ld + h * a->ld_head + i, twin = i < a->rot / 2 ? a->rot / 2 : -(a->rot / 2);
                bound[at] = (float)(8 * u) * (fabsf(a->x[at]) + fabsf(a->x[at + twin]));
            }
    FM_TRY(c->cpu->v->rope(c->cpu, &judged));
    ON_DEVICE(c, rope(c->dev, a));
    for (int64_t r = 0; r < rows; r++) {
        const int64_t at = r * a->ld, n = size - at < a->ld ? size - at : a->ld;
        FM_TRY(check(c, (block){"x", a->x + at, judged.x + at, bound + at, n, n, 1, n}));
    }
    return FM_OK;
}

static fm_status op_rope(fm_backend *b, const fm_rope_args *a)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "rope of %" PRId64 " rows, %" PRId64 " heads, rot %" PRId64, rows_of(a->spans, a->n_spans),
                    a->n_heads, a->rot));
    return end_op(c, rope(c, a));
}

/* The judge's own caches, each as long as it needs to be. */
static fm_status copy_caches(compare *c, const fm_attention_args *a, fm_kv *out)
{
    const int64_t hd = a->a.head_dim;
    int64_t total = 0;
    float *at;
    for (int s = 0; s < a->n_spans; s++)
        total += a->a.n_kv_heads * (a->spans[s].pos0 + a->spans[s].n) * hd;
    FM_TRY(temp(c, 2 * total, &at));
    for (int s = 0; s < a->n_spans; s++) {
        const int64_t before = a->spans[s].pos0, all = before + a->spans[s].n, size = a->a.n_kv_heads * all * hd;
        float *k = at, *v = at + size;
        const float *from_k = a->kv[s].k, *from_v = a->kv[s].v;
        out[s] = (fm_kv){k, v, all, FM_QUANT_F32};
        at += 2 * size;
        for (int64_t g = 0; g < a->a.n_kv_heads; g++) {
            const int64_t to = g * all * hd, from = g * a->kv[s].capacity * hd;
            memcpy(k + to, from_k + from, (size_t)(before * hd) * sizeof(float));
            memcpy(v + to, from_v + from, (size_t)(before * hd) * sizeof(float));
        }
    }
    return FM_OK;
}

static fm_status check_attention(compare *c, const fm_attention_args *a, int s, const fm_kv *kv, const float *want,
                                 float *bound)
{
    const int64_t hd = a->a.head_dim, all = kv->capacity, per = a->a.n_heads / a->a.n_kv_heads * hd;
    const fm_span *sp = &a->spans[s];
    const float *k = a->kv[s].k, *v = a->kv[s].v, *our_k = kv->k, *our_v = kv->v;
    for (int64_t g = 0; g < a->a.n_kv_heads; g++) {
        const int64_t ours = g * all * hd, theirs = g * a->kv[s].capacity * hd, at = sp->row0 * a->a.ld_y + g * per;
        FM_TRY(check(c, (block){"K cache", k + theirs, our_k + ours, NULL, hd, hd, all, hd}));
        FM_TRY(check(c, (block){"V cache", v + theirs, our_v + ours, NULL, hd, hd, all, hd}));
        float most = 0;
        for (int64_t i = 0; i < all * hd; i++)
            most = fmaxf(most, fabsf(our_v[ours + i]));
        for (int64_t r = 0; r < sp->n; r++)
            for (int64_t i = 0; i < per; i++)
                bound[at + r * a->a.ld_y + i] = 0x1p-17f * most;
        FM_TRY(check(c, (block){"y", a->a.y + at, want + at, bound + at, a->a.ld_y, a->a.ld_y, sp->n, per}));
    }
    return FM_OK;
}

static fm_status attention(compare *c, const fm_attention_args *a)
{
    const int64_t rows = rows_of(a->spans, a->n_spans), size = rows * a->a.ld_y + a->a.n_heads * a->a.head_dim;
    fm_attention_args judged = *a;
    float *bound;
    void *kv;
    FM_TRY(temp(c, size, &judged.a.y));
    FM_TRY(temp(c, size, &bound));
    FM_TRY(temp_bytes(c, (size_t)a->n_spans * sizeof(fm_kv), &kv));
    judged.kv = kv;
    FM_TRY(copy_caches(c, a, kv));
    FM_TRY(c->cpu->v->attention(c->cpu, &judged));
    ON_DEVICE(c, attention(c->dev, a));
    for (int s = 0; s < a->n_spans; s++)
        FM_TRY(check_attention(c, a, s, &judged.kv[s], judged.a.y, bound));
    return FM_OK;
}

static fm_status op_attention(fm_backend *b, const fm_attention_args *a)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "attention of %d spans, the first of %" PRId64 " rows after %" PRId64 ", %" PRId64 "/%" PRId64
                       " heads of %" PRId64, a->n_spans, a->spans[0].n, a->spans[0].pos0, a->a.n_heads,
                    a->a.n_kv_heads, a->a.head_dim));
    return end_op(c, attention(c, a));
}

static fm_status conv(compare *c, const fm_conv_args *a)
{
    const int64_t rows = rows_of(a->spans, a->n_spans), past = a->kern - 1, n_ch = a->n_ch;
    fm_conv_args judged = *a;
    float *bound, *hist;
    void *outs;
    judged.ldy = n_ch;
    FM_TRY(temp(c, rows * n_ch, &judged.y));
    FM_TRY(temp(c, rows * n_ch, &bound));
    FM_TRY(temp(c, a->n_spans * past * n_ch, &hist));
    FM_TRY(temp_bytes(c, (size_t)a->n_spans * sizeof(float *), &outs));
    for (int s = 0; s < a->n_spans; s++) {
        ((float **)outs)[s] = hist + s * past * n_ch;
        const fm_span *sp = &a->spans[s];
        for (int64_t t = 0; t < sp->n; t++)
            for (int64_t i = 0; i < n_ch; i++) {
                double sum = 0;
                for (int64_t j = 0; j < a->kern; j++)
                    sum += fabs((double)a->w[i * a->kern + j] *
                                (t + j < past ? a->hist_in[s][(t + j) * n_ch + i]
                                              : a->m[(sp->row0 + t + j - past) * a->ldm + i]));
                bound[(sp->row0 + t) * n_ch + i] = (float)(64 * u * sum) + 0x1p-119f;
            }
    }
    judged.hist_out = outs;
    FM_TRY(c->cpu->v->conv(c->cpu, &judged));
    ON_DEVICE(c, conv(c->dev, a));
    for (int s = 0; s < a->n_spans; s++) {
        const int64_t r = a->spans[s].row0;
        FM_TRY(check(c, (block){"y", a->y + r * a->ldy, judged.y + r * n_ch, bound + r * n_ch, a->ldy, n_ch,
                                a->spans[s].n, n_ch}));
        FM_TRY(check(c, (block){"state", a->hist_out[s], judged.hist_out[s], NULL, n_ch, n_ch, past, n_ch}));
    }
    return FM_OK;
}

static fm_status op_conv(fm_backend *b, const fm_conv_args *a)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "conv of %d spans, the first of %" PRId64 " rows, %" PRId64 " channels", a->n_spans, a->spans[0].n,
                    a->n_ch));
    return end_op(c, conv(c, a));
}

static float largest(const float *x, int64_t ld, int64_t n, int64_t n_cols)
{
    float most = 0;
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < n_cols; i++)
            most = fmaxf(most, fabsf(x[r * ld + i]));
    return most;
}

static fm_status check_delta(compare *c, const fm_delta_batch *a, int s, const float *y, const float *S, float *bound)
{
    const int64_t dv = a->a.dv, head = a->a.dk * dv, n = a->spans[s].n, row = a->spans[s].row0 * a->a.ld_y;
    for (int64_t h = 0; h < a->a.n_v_heads; h++) {
        const int64_t at = h * head, col = row + h * dv;
        const float before = largest(a->S_in[s] + at, head, 1, head), after = largest(S + at, head, 1, head);
        const float state = 4e-6f * fmaxf(before, after), out = 2e-5f * largest(y + col, a->a.ld_y, n, dv);
        for (int64_t i = 0; i < head; i++)
            bound[i] = state;
        FM_TRY(check(c, (block){"state", a->S_out[s] + at, S + at, bound, dv, dv, a->a.dk, dv}));
        for (int64_t t = 0; t < n; t++) {
            const int64_t to = col + t * a->a.ld_y;
            for (int64_t i = 0; i < dv; i++)
                bound[i] = out;
            FM_TRY(check(c, (block){"y", a->a.y + to, y + to, bound, dv, dv, 1, dv}));
        }
    }
    return FM_OK;
}

static fm_status delta(compare *c, const fm_delta_batch *a)
{
    const int64_t rows = rows_of(a->spans, a->n_spans), head = a->a.dk * a->a.dv, state = a->a.n_v_heads * head;
    fm_delta_batch judged = *a;
    float *bound, *states;
    void *outs;
    FM_TRY(temp(c, rows * a->a.ld_y, &judged.a.y));
    FM_TRY(temp(c, head, &bound));
    FM_TRY(temp(c, a->n_spans * state, &states));
    FM_TRY(temp_bytes(c, (size_t)a->n_spans * sizeof(float *), &outs));
    for (int s = 0; s < a->n_spans; s++)
        ((float **)outs)[s] = states + s * state;
    judged.S_out = outs;
    FM_TRY(c->cpu->v->delta(c->cpu, &judged));
    ON_DEVICE(c, delta(c->dev, a));
    for (int s = 0; s < a->n_spans; s++)
        FM_TRY(check_delta(c, a, s, judged.a.y, judged.S_out[s], bound));
    return FM_OK;
}

static fm_status op_delta(fm_backend *b, const fm_delta_batch *a)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "delta of %d spans, the first of %" PRId64 " rows, %" PRId64 "/%" PRId64 " heads of %" PRId64 "x%" PRId64,
                    a->n_spans, a->spans[0].n, a->a.n_v_heads, a->a.n_k_heads, a->a.dk, a->a.dv));
    return end_op(c, delta(c, a));
}

/* ---- router ------------------------------------------------------------------------------------------------ */

/* Sigmoids of two devices differ in their last bits, and then so may the order of experts that are as good as equal;
 * softmax compares the logits themselves. */
static bool near_tie(const fm_route_args *a, const float *logits, int32_t x, int32_t y)
{
    if (!a->sigmoid || x < 0 || x >= a->n_experts)
        return false;
    const double sx = 1 / (1 + exp(-(double)logits[x])) + (a->bias ? a->bias[x] : 0);
    const double sy = 1 / (1 + exp(-(double)logits[y])) + (a->bias ? a->bias[y] : 0);
    return fabs(sx - sy) <= 0x1p-20;
}

static fm_status route(compare *c, const fm_route_args *a, const float *logits, int64_t n, int32_t *ids, float *weights)
{
    float *want, *bound;
    void *want_ids;
    FM_TRY(temp(c, n * a->k, &want));
    FM_TRY(temp(c, n * a->k, &bound));
    FM_TRY(temp_bytes(c, (size_t)(n * a->k) * sizeof(int32_t), &want_ids));
    int32_t *judged = want_ids;
    FM_TRY(c->cpu->v->route(c->cpu, a, logits, n, judged, want));
    for (int64_t i = 0; i < n * a->k; i++) /* logits span some 2^5: exp of a difference is off by as many u */
        bound[i] = 0x1p-18f * fabsf(want[i]);
    ON_DEVICE(c, route(c->dev, a, logits, n, ids, weights));
    for (int64_t r = 0; r < n; r++) {
        bool same = true;
        for (int64_t j = r * a->k; j < (r + 1) * a->k; j++) {
            same &= ids[j] == judged[j];
            if (ids[j] != judged[j] && !near_tie(a, logits + r * a->n_experts, ids[j], judged[j]))
                return differs(c, "ids", r, j - r * a->k, ids[j], judged[j], 0);
        }
        if (same)
            FM_TRY(check(c, (block){"weights", weights + r * a->k, want + r * a->k, bound + r * a->k, a->k, a->k, 1, a->k}));
    }
    return FM_OK;
}

static fm_status op_route(fm_backend *b, const fm_route_args *a, const float *logits, int64_t n, int32_t *ids,
                          float *weights)
{
    compare *c = self(b);
    FM_TRY(begin_op(c, "route of %" PRId64 " rows, %" PRId64 " of %" PRId64 " experts", n, a->k, a->n_experts));
    return end_op(c, route(c, a, logits, n, ids, weights));
}

/* ---- memory, commands, opening ------------------------------------------------------------------------------ */

static void op_close(fm_backend *b)
{
    compare *c = self(b);
    fm_backend_close(c->cpu);
    fm_backend_close(c->dev);
    fm_free(c);
}

static fm_caps op_caps(const fm_backend *b)
{
    const fm_backend *dev = ((const compare *)b)->dev;
    fm_caps caps = dev->v->caps(dev);
    caps.pipelined = false; /* an op is judged when it is called: its result must be there */
    caps.any_memory = false; /* both sides must know what an op writes */
    caps.kv_formats = 0; /* caches are compared as f32 */
    return caps;
}

static fm_status op_alloc(fm_backend *b, size_t bytes, fm_usage usage, void **out)
{
    return self(b)->dev->v->alloc(self(b)->dev, bytes, usage, out);
}

static void op_free(fm_backend *b, void *p, size_t bytes, fm_usage usage)
{
    self(b)->dev->v->free(self(b)->dev, p, bytes, usage);
}

static fm_status op_begin(fm_backend *b) { return self(b)->dev->v->begin(self(b)->dev); }

static void op_flush(fm_backend *b) { self(b)->dev->v->flush(self(b)->dev); }

static fm_status op_sync(fm_backend *b) { return self(b)->dev->v->sync(self(b)->dev); }

static const fm_backend_vtable compare_vtable = {
    .version = FM_BACKEND_VERSION,
    .close = op_close,
    .caps = op_caps,
    .alloc = op_alloc,
    .free = op_free,
    .begin = op_begin,
    .flush = op_flush,
    .sync = op_sync,
    .embed = op_embed,
    .rmsnorm = op_rmsnorm,
    .matmul = op_matmul,
    .clip = op_clip,
    .rope = op_rope,
    .attention = op_attention,
    .conv = op_conv,
    .delta = op_delta,
    .swiglu = op_swiglu,
    .route = op_route,
    .experts = op_experts,
    .combine = op_combine,
    .add_gated = op_add_gated,
    .find_nonfinite = op_find_nonfinite,
};

fm_status fm_backend_compare_open(fm_backend *device, fm_backend *judge, fm_pool *pool, fm_backend **out)
{
    *out = NULL;
    const fm_caps d = device->v->caps(device), j = judge->v->caps(judge);
    if (!d.unified_memory || !j.unified_memory || j.asynchronous)
        return fm_fail(FM_ERR_UNSUPPORTED, "'%s' cannot judge '%s': it must work at once, and on the same memory",
                       judge->v->name, device->v->name);
    void *p;
    FM_TRY(fm_alloc(sizeof(compare), &p));
    compare *c = p;
    c->v = compare_vtable;
    snprintf(c->name, sizeof c->name, "%s, compared with %s", device->v->name, judge->v->name);
    c->v.name = c->name;
    c->base.v = &c->v;
    c->base.layer = -1;
    c->dev = device;
    c->cpu = judge;
    c->pool = pool;
    *out = &c->base;
    return FM_OK;
}

fm_backend *fm_backend_compare_device(fm_backend *b) { return self(b)->dev; }

double fm_backend_compare_worst(fm_backend *b)
{
    const double worst = self(b)->worst;
    self(b)->worst = 0;
    return worst;
}
