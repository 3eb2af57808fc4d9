/* The reference kernels: obvious loops, f64 accumulation. The in-tree judge of every faster variant; written
 * for reading, not for speed. Any n is fine: no accumulator overflows. */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "cpu/kernels_impl.h"

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

/* Online softmax: one pass over the positions, no scratch that grows with the context. */
static void attend_ref(const fm_attn_args *a, int64_t row, int64_t kv_head, const float *K, const float *V,
                       int64_t n_pos)
{
    enum { MAX_PART = 64 }; /* the output is made in parts, so that any head_dim fits the stack */
    const int64_t per_kv = a->n_heads / a->n_kv_heads, hd = a->head_dim;
    for (int64_t h = kv_head * per_kv; h < (kv_head + 1) * per_kv; h++) {
        const float *q = a->q + row * a->ld_q + h * a->ld_q_head;
        const float *gate = a->gate ? a->gate + row * a->ld_q + h * a->ld_q_head : NULL;
        float *y = a->y + row * a->ld_y + h * hd;
        double top = -INFINITY, total = 0;
        for (int64_t p0 = 0; p0 < hd; p0 += MAX_PART) {
            const int64_t np = hd - p0 < MAX_PART ? hd - p0 : MAX_PART;
            double out[MAX_PART] = {0};
            top = -INFINITY;
            total = 0;
            for (int64_t t = 0; t < n_pos; t++) {
                double s = 0;
                for (int64_t d = 0; d < hd; d++)
                    s += (double)q[d] * K[t * hd + d];
                s *= a->scale;
                if (s > top) {
                    const double shrink = exp(top - s);
                    total *= shrink;
                    for (int64_t d = 0; d < np; d++)
                        out[d] *= shrink;
                    top = s;
                }
                const double p = exp(s - top);
                total += p;
                for (int64_t d = 0; d < np; d++)
                    out[d] += p * V[t * hd + p0 + d];
            }
            for (int64_t d = 0; d < np; d++) {
                const double g = gate ? sigmoid(gate[p0 + d]) : 1;
                y[p0 + d] = (float)(out[d] / total * g);
            }
        }
    }
}

static void attend_rows_ref(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, const float *K,
                            const float *V, int64_t n_before)
{
    for (int64_t r = r0; r < r1; r++)
        attend_ref(a, r, kv_head, K, V, n_before + r + 1);
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
    k->attend = attend_ref;
    k->attend_rows = attend_rows_ref;
    k->conv_silu = conv_silu_ref;
    k->delta_scratch = delta_scratch_ref;
    k->delta = delta_ref;
    k->route = route_ref;
}
