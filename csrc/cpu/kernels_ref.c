/* The reference kernels: obvious loops, f64 accumulation. The in-tree judge of every faster variant; written
 * for reading, not for speed. Any n is fine: no accumulator overflows. */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "cpu/kernels_impl.h"
#include "quant/quant_plain.h"

enum { TILE = 512 }; /* decoded weights on the stack */

static double sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

static double silu(double x) { return x * sigmoid(x); }

static double softplus(double x) { return fmax(x, 0) + log1p(exp(-fabs(x))); }

static size_t act_bytes_none(int64_t n, int64_t n_cols)
{
    (void)n;
    (void)n_cols;
    return 0;
}

static void act_prepare_none(const fm_act *act, int64_t n, int64_t r0, int64_t r1)
{
    (void)act;
    (void)n;
    (void)r0;
    (void)r1;
}

static fm_quant_row mat_row(const fm_mat *W, int64_t r)
{
    const fm_quant_row row = {
        .codes = W->codes + r * W->codes_stride,
        .scales = W->scales ? W->scales + r * W->scales_stride : NULL,
        .biases = W->biases ? W->biases + r * W->scales_stride : NULL,
        .group = W->group,
        .scale_format = W->scale_format,
    };
    return row;
}

/* Columns c0 .. c0+n of a row. Tiles start at multiples of TILE, so of every legal group and of whole bytes. */
static void decode_tile(const fm_mat *W, int64_t r, int64_t c0, int64_t n, float *w)
{
    const fm_quant_traits *t = fm_quant_get(W->format);
    fm_quant_row row = mat_row(W, r);
    row.codes += c0 * t->bits / 8;
    if (t->affine) {
        const int64_t skip = c0 / W->group * (fm_quant_get(W->scale_format)->bits / 8);
        row.scales += skip;
        row.biases += skip;
    }
    t->decode_ref(&row, n, w);
}

static void matmul_any(const fm_mat *W, const fm_act *x, int64_t n, float *y, int64_t ldy, int64_t r0, int64_t r1)
{
    enum { BATCH = 16 };
    float w[TILE];
    for (int64_t r = r0; r < r1; r++)
        for (int64_t i0 = 0; i0 < n; i0 += BATCH) {
            const int64_t nb = n - i0 < BATCH ? n - i0 : BATCH;
            double sum[BATCH] = {0};
            for (int64_t c0 = 0; c0 < W->n_cols; c0 += TILE) {
                const int64_t nc = W->n_cols - c0 < TILE ? W->n_cols - c0 : TILE;
                decode_tile(W, r, c0, nc, w);
                for (int64_t i = 0; i < nb; i++) {
                    const int64_t xr = x->rows ? x->rows[i0 + i] : x->row0 + i0 + i;
                    const float *v = x->x + xr * x->ldx + c0;
                    double s = 0;
                    for (int64_t c = 0; c < nc; c++)
                        s += (double)w[c] * v[c];
                    sum[i] += s;
                }
            }
            for (int64_t i = 0; i < nb; i++)
                y[(i0 + i) * ldy + r] = (float)sum[i];
        }
}

static void decode_row_any(const fm_mat *W, int64_t r, float *y)
{
    const fm_quant_row row = mat_row(W, r);
    fm_quant_get(W->format)->decode_ref(&row, W->n_cols, y);
}

static void rmsnorm_ref(const float *x, const float *w, float eps, float *y, int64_t n_cols)
{
    double sum = 0;
    for (int64_t c = 0; c < n_cols; c++)
        sum += (double)x[c] * x[c];
    const double scale = 1 / sqrt(sum / (double)n_cols + eps);
    for (int64_t c = 0; c < n_cols; c++)
        y[c] = (float)(x[c] * scale * w[c]);
}

static void swiglu_ref(const float *gate, const float *up, float *y, int64_t n)
{
    for (int64_t c = 0; c < n; c++)
        y[c] = (float)(silu(gate[c]) * up[c]);
}

static void axpy_ref(float a, const float *x, float *y, int64_t n)
{
    for (int64_t c = 0; c < n; c++)
        y[c] += a * x[c];
}

static void rope_ref(float *x, const float *cs_cos, const float *cs_sin, int64_t rot)
{
    const int64_t half = rot / 2;
    for (int64_t i = 0; i < half; i++) {
        const float lo = x[i], hi = x[i + half];
        x[i] = lo * cs_cos[i] - hi * cs_sin[i];
        x[i + half] = hi * cs_cos[i] + lo * cs_sin[i];
    }
}

static void kv_store_ref(fm_quant format, const float *x, int64_t n, void *out)
{
    fm_quant_get(format)->encode_ref(x, n, 0, FM_QUANT_F32, out, NULL, NULL);
}

/* Where a query's numbers are; i counts rows first, then the heads of the KV head. */
typedef struct query {
    const float *q, *gate;
    float *y;
    int64_t n_pos;
} query;

static query query_at(const fm_attn_args *a, int64_t r0, int64_t kv_head, int64_t n_before, int64_t i)
{
    const int64_t per = a->n_heads / a->n_kv_heads, r = r0 + i / per, h = kv_head * per + i % per;
    const int64_t at = r * a->ld_q + h * a->ld_q_head;
    const query q = {a->q + at, a->gate ? a->gate + at : NULL, a->y + r * a->ld_y + h * a->head_dim, n_before + r + 1};
    return q;
}

/* Online softmax: one pass over the positions t0 <= t < t1 per MAX_PART dims, so that any head_dim fits the stack. */
static void attend_span(const fm_attn_args *a, const float *q, const fm_kv_head *kv, int64_t t0, int64_t t1, float *out)
{
    enum { MAX_PART = 64 };
    const int64_t hd = a->head_dim;
    double top = -INFINITY, total = 0;
    for (int64_t p0 = 0; p0 < hd; p0 += MAX_PART) {
        const int64_t np = hd - p0 < MAX_PART ? hd - p0 : MAX_PART;
        double sum[MAX_PART] = {0};
        top = -INFINITY;
        total = 0;
        for (int64_t t = t0; t < t1; t++) {
            double s = 0;
            for (int64_t d = 0; d < hd; d++)
                s += (double)q[d] * fm_plain_load(kv->format, kv->k, t * hd + d);
            s *= a->scale;
            if (s > top) {
                const double shrink = exp(top - s);
                total *= shrink;
                for (int64_t d = 0; d < np; d++)
                    sum[d] *= shrink;
                top = s;
            }
            const double p = exp(s - top);
            total += p;
            for (int64_t d = 0; d < np; d++)
                sum[d] += p * fm_plain_load(kv->format, kv->v, t * hd + p0 + d);
        }
        for (int64_t d = 0; d < np; d++)
            out[p0 + d] = (float)sum[d];
    }
    out[fm_attn_part_floats(hd) - 16] = (float)top;
    out[fm_attn_part_floats(hd) - 15] = (float)total;
}

static void attend_part_ref(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, const fm_kv_head *kv,
                            int64_t n_before, int64_t part, float *out)
{
    const int64_t n = (r1 - r0) * (a->n_heads / a->n_kv_heads), t0 = part * FM_ATTN_PART;
    for (int64_t i = 0; i < n; i++) {
        const query q = query_at(a, r0, kv_head, n_before, i);
        const int64_t t1 = q.n_pos < t0 + FM_ATTN_PART ? q.n_pos : t0 + FM_ATTN_PART;
        if (t1 > t0)
            attend_span(a, q.q, kv, t0, t1, out + i * fm_attn_part_floats(a->head_dim));
    }
}

/* Adds a part to what q->y holds of the parts before. */
static void fold(const query *q, int64_t hd, const float *part, double *top, double *total)
{
    const int64_t at = fm_attn_part_floats(hd) - 16;
    const double now = fmax(*top, part[at]), keep = exp(*top - now), add = exp(part[at] - now);
    for (int64_t d = 0; d < hd; d++)
        q->y[d] = (float)(q->y[d] * keep + part[d] * add);
    *total = *total * keep + part[at + 1] * add;
    *top = now;
}

static void finish(const query *q, int64_t hd, double total)
{
    for (int64_t d = 0; d < hd; d++)
        q->y[d] = (float)(q->y[d] / total * (q->gate ? sigmoid(q->gate[d]) : 1));
}

static void attend_merge_ref(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, int64_t n_before,
                             const float *parts, int64_t stride)
{
    const int64_t n = (r1 - r0) * (a->n_heads / a->n_kv_heads), hd = a->head_dim;
    for (int64_t i = 0; i < n; i++) {
        const query q = query_at(a, r0, kv_head, n_before, i);
        double top = -INFINITY, total = 0;
        memset(q.y, 0, (size_t)hd * sizeof *q.y);
        for (int64_t p = 0; p * FM_ATTN_PART < q.n_pos; p++)
            fold(&q, hd, parts + p * stride + i * fm_attn_part_floats(hd), &top, &total);
        finish(&q, hd, total);
    }
}

static void attend_rows_ref(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, const fm_kv_head *kv,
                            int64_t n_before, float *scratch)
{
    const int64_t n = (r1 - r0) * (a->n_heads / a->n_kv_heads), hd = a->head_dim;
    for (int64_t i = 0; i < n; i++) {
        const query q = query_at(a, r0, kv_head, n_before, i);
        double top = -INFINITY, total = 0;
        memset(q.y, 0, (size_t)hd * sizeof *q.y);
        for (int64_t t = 0; t < q.n_pos; t += FM_ATTN_PART) {
            attend_span(a, q.q, kv, t, q.n_pos < t + FM_ATTN_PART ? q.n_pos : t + FM_ATTN_PART, scratch);
            fold(&q, hd, scratch, &top, &total);
        }
        finish(&q, hd, total);
    }
}

static void conv_silu_ref(const float *m, int64_t ldm, const float *w, int64_t kern, const float *hist_in,
                          float *hist_out, float *y, int64_t ldy, int64_t n, int64_t n_ch, int64_t c0, int64_t c1)
{
    const int64_t hist = kern - 1;
    for (int64_t c = c0; c < c1; c++) {
        for (int64_t t = 0; t < n; t++) {
            double s = 0;
            for (int64_t j = 0; j < kern; j++) {
                const int64_t src = t - hist + j; /* < 0: before this call */
                s += (double)w[c * kern + j] * (src < 0 ? hist_in[(src + hist) * n_ch + c] : m[src * ldm + c]);
            }
            y[t * ldy + c] = (float)silu(s);
        }
        for (int64_t j = 0; j < hist; j++) {
            const int64_t src = n - hist + j;
            hist_out[j * n_ch + c] = src < 0 ? hist_in[(src + hist) * n_ch + c] : m[src * ldm + c];
        }
    }
}

static int64_t delta_scratch_ref(const fm_delta_args *a, int64_t n)
{
    (void)n;
    return 2 * a->dk + 2 * a->dv;
}

static void l2_normalise(const float *x, int64_t n, double scale, float *y)
{
    double sum = 0;
    for (int64_t i = 0; i < n; i++)
        sum += (double)x[i] * x[i];
    const double f = scale / sqrt(sum + 1e-6); /* fixed, on the sum: not rms_norm_eps */
    for (int64_t i = 0; i < n; i++)
        y[i] = (float)(x[i] * f);
}

static void delta_ref(const fm_delta_args *a, int64_t h, int64_t n, const float *S_in, float *S_out, float *scratch)
{
    const int64_t dk = a->dk, dv = a->dv, kh = h / (a->n_v_heads / a->n_k_heads);
    float *q = scratch, *k = q + dk, *d = k + dk, *o = d + dv;
    memcpy(S_out, S_in, (size_t)(dk * dv) * sizeof *S_out);
    for (int64_t t = 0; t < n; t++) {
        const float *row = a->qkv + t * a->ld_qkv;
        l2_normalise(row + kh * dk, dk, 1 / sqrt((double)dk), q);
        l2_normalise(row + (a->n_k_heads + kh) * dk, dk, 1, k);
        const float *v = row + 2 * a->n_k_heads * dk + h * dv;
        const double beta = sigmoid(a->b[t * a->ld_ab + h]);
        const double g = -exp(a->A_log[h]) * softplus((double)a->a[t * a->ld_ab + h] + a->dt_bias[h]);
        const double alpha = exp(g);
        for (int64_t j = 0; j < dv; j++) {
            double s = 0;
            for (int64_t i = 0; i < dk; i++)
                s += (double)k[i] * S_out[i * dv + j];
            d[j] = (float)(beta * (v[j] - alpha * s));
        }
        double norm = 0;
        for (int64_t j = 0; j < dv; j++) {
            double s = 0;
            for (int64_t i = 0; i < dk; i++) {
                S_out[i * dv + j] = (float)(alpha * S_out[i * dv + j] + (double)k[i] * d[j]);
                s += (double)q[i] * S_out[i * dv + j];
            }
            o[j] = (float)s;
            norm += s * s;
        }
        const double f = 1 / sqrt(norm / (double)dv + a->eps);
        for (int64_t j = 0; j < dv; j++)
            a->y[t * a->ld_y + h * dv + j] = (float)(o[j] * f * a->norm_w[j] * silu(a->z[t * a->ld_z + h * dv + j]));
    }
}

/* Keep the groups whose two best choices sum highest; the others' choices become -inf. */
static void route_mask_groups(const fm_route_args *a, float *choice)
{
    const int64_t per = a->n_experts / a->n_group;
    double best[256];
    assert(a->n_group <= 256);
    for (int64_t g = 0; g < a->n_group; g++) {
        float top1 = -INFINITY, top2 = -INFINITY;
        for (int64_t e = g * per; e < (g + 1) * per; e++) {
            if (choice[e] > top1) {
                top2 = top1;
                top1 = choice[e];
            } else if (choice[e] > top2)
                top2 = choice[e];
        }
        best[g] = (double)top1 + (per > 1 ? top2 : 0);
    }
    for (int64_t g = 0; g < a->n_group; g++) {
        int64_t better = 0;
        for (int64_t o = 0; o < a->n_group; o++)
            better += best[o] > best[g] || (best[o] == best[g] && o < g);
        if (better >= a->topk_group)
            for (int64_t e = g * per; e < (g + 1) * per; e++)
                choice[e] = -INFINITY;
    }
}

static void route_ref(const fm_route_args *a, const float *logits, int32_t *ids, float *weights, float *scratch)
{
    float *choice = scratch;
    for (int64_t e = 0; e < a->n_experts; e++) {
        const float s = a->sigmoid ? (float)sigmoid(logits[e]) : logits[e]; /* softmax keeps the order */
        choice[e] = a->bias ? s + a->bias[e] : s;
        if (isnan(choice[e])) /* the caller refuses such logits; stay in bounds until then */
            choice[e] = -INFINITY;
    }
    if (a->n_group > 1)
        route_mask_groups(a, choice);
    for (int64_t j = 0; j < a->k; j++) {
        int64_t best = -1;
        for (int64_t e = 0; e < a->n_experts; e++) {
            if (isnan(choice[e])) /* taken before (marked below) */
                continue;
            if (best < 0 || choice[e] > choice[best])
                best = e;
        }
        ids[j] = (int32_t)best;
        choice[best] = NAN;
    }
    double max = -INFINITY, all = 0, sum = 0;
    for (int64_t e = 0; e < a->n_experts; e++)
        max = fmax(max, logits[e]);
    if (!a->sigmoid && !a->renorm)
        for (int64_t e = 0; e < a->n_experts; e++)
            all += exp(logits[e] - max);
    double p[64];
    assert(a->k <= FM_COUNT(p));
    for (int64_t j = 0; j < a->k; j++) {
        p[j] = a->sigmoid ? sigmoid(logits[ids[j]]) : exp(logits[ids[j]] - max);
        sum += p[j];
    }
    const double div = a->renorm ? sum + a->eps : a->sigmoid ? 1 : all;
    for (int64_t j = 0; j < a->k; j++)
        weights[j] = (float)(p[j] / div * a->scale);
}

bool fm_kernels_supported_ref(void) { return true; }

void fm_kernels_overlay_ref(fm_kernels *k)
{
    k->act_bytes = act_bytes_none;
    k->act_prepare = act_prepare_none;
    for (int q = 0; q < FM_QUANT_COUNT; q++) {
        k->matmul[q] = matmul_any;
        k->decode_row[q] = decode_row_any;
    }
    k->rmsnorm = rmsnorm_ref;
    k->swiglu = swiglu_ref;
    k->axpy = axpy_ref;
    k->rope = rope_ref;
    k->kv_store = kv_store_ref;
    k->attend_rows = attend_rows_ref;
    k->attend_part = attend_part_ref;
    k->attend_merge = attend_merge_ref;
    k->conv_silu = conv_silu_ref;
    k->delta_scratch = delta_scratch_ref;
    k->delta = delta_ref;
    k->route = route_ref;
}
