/* Owns: the table of CPU kernels, one slot per op, with contract and error bound on the slot.
 * Table = the reference, then every supported variant overlays what it implements: no slot is ever NULL.
 * Slots take row ranges or heads, never single dots; the caller (backend_cpu.c) hands them to threads.
 *
 * One rule for all: the result of a row (token) depends neither on n nor on the other rows, so a batch
 * equals its members bit for bit. Bounds are checked in tests/test_kernels.py against float64.
 * S = sum of |terms| of the output element; u = 2^-24. */
#ifndef FM_CPU_KERNELS_H
#define FM_CPU_KERNELS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/status.h"
#include "cpu/cpu_list.h"
#include "quant/quant.h"

/* A weight matrix where it lies; areas may be unaligned (quant/quant.h). */
typedef struct fm_mat {
    fm_quant format, scale_format;
    int32_t group;
    int64_t n_rows, n_cols;
    const uint8_t *codes, *scales, *biases;
    int64_t codes_stride, scales_stride; /* bytes per row */
} fm_mat;

/* Input rows of matmul: x as given, and what act_prepare made of it in the caller's buffer. */
typedef struct fm_act {
    const float *x;      /* [n, n_cols] f32, rows ldx apart */
    int64_t ldx, n_cols;
    const int32_t *rows; /* matmul's row i is x row rows[i]; NULL: row row0 + i */
    void *prepared;      /* act_bytes(n, n_cols) bytes, 64-byte aligned; variant's own layout */
    int64_t row0;
} fm_act;

typedef struct fm_route_args {
    int64_t n_experts, k;
    int sigmoid;              /* score: 0 softmax over all experts, 1 sigmoid */
    int renorm;               /* divide the k weights by their sum + eps */
    float eps, scale;
    int64_t n_group, topk_group; /* <= 1 group: off */
    const float *bias;        /* [n_experts] added for the choice only; NULL: none */
} fm_route_args;

typedef struct fm_delta_args {
    int64_t n_k_heads, n_v_heads, dk, dv;
    const float *qkv; /* [n, 2*hk*dk + hv*dv] after conv + SiLU, rows ld_qkv apart */
    const float *z;   /* [n, hv*dv] */
    const float *a, *b;             /* [n, hv], rows ld_ab apart */
    const float *A_log, *dt_bias;   /* [hv] */
    const float *norm_w;            /* [dv] */
    float eps;                      /* of the output norm */
    float *y;                       /* [n, hv*dv] */
    int64_t ld_qkv, ld_z, ld_ab, ld_y;
} fm_delta_args;

typedef struct fm_attn_args {
    int64_t n_heads, n_kv_heads, head_dim;
    float scale;
    const float *q;    /* row r, head h at q + r*ld_q + h*ld_q_head */
    const float *gate; /* the same strides; NULL: no output gate */
    int64_t ld_q, ld_q_head;
    float *y;          /* [n, n_heads*head_dim], rows ld_y apart */
    int64_t ld_y;
} fm_attn_args;

/* One KV head's cache: k, v [n_pos, head_dim] contiguous, f32, f16 or bf16. */
typedef struct fm_kv_head {
    const void *k, *v;
    fm_quant format;
} fm_kv_head;

enum {
    FM_ATTN_PASS = 128, /* queries (rows x heads of a KV head) that share one pass over K and V */
    /* Positions of a part. Every query is summed part by part, so its bits are the same whoever computes the parts. Less
     * costs more starts and more to put together, more shares short contexts among fewer threads. */
    FM_ATTN_PART = 1024,
    FM_ATTN_FEW_ROWS = 4, /* of a span: up to here the CPU backend divides the positions among threads */
};

/* A query's share of one part: unnormalised output [head_dim], then at head_dim rounded up to 16 the largest score and
 * the sum of exp(score - largest). Floats from one query to the next: */
static inline int64_t fm_attn_part_floats(int64_t head_dim) { return (head_dim + 15) / 16 * 16 + 16; }

/* Numeric mode of matmul with affine weights. Everything else is the same in both.
 * EXACT: activations and sums in f32.
 * FAST: activations rounded to 15-bit integers (two int8 terms) in blocks of 64 columns, one f32 scale per block
 *   (max|x| / 16256), dot products in int32 (exact), scale and bias applied in f32. With xs the block's scale,
 *   |x' - x| <= xs/2 per element, so the error adds  sum over blocks of xs/2 * sum |W[r,c]|  to EXACT's; typically
 *   4e-5 of |x| |w|. Non-finite x gives non-finite y. Plain weights, and variants that have no FAST kernels (ref),
 *   compute as EXACT. */
typedef enum fm_numeric { FM_NUMERIC_EXACT, FM_NUMERIC_FAST, FM_NUMERIC_COUNT } fm_numeric;

typedef struct fm_kernels {
    const char *name;
    fm_numeric numeric; /* act_bytes, act_prepare and matmul are of this mode */

    /* Bytes of fm_act.prepared for n rows; 0 is legal. prepare fills rows r0 <= r < r1 (x rows, not gathered). */
    size_t (*act_bytes)(int64_t n, int64_t n_cols);
    void (*act_prepare)(const fm_act *act, int64_t n, int64_t r0, int64_t r1);

    /* y[i*ldy + r] = sum_c W[r,c] * x[rows[i]][c]   for 0 <= i < n, r0 <= r < r1; y must not alias x.
     * Bound, EXACT: (n_cols/128 + 8) * u * S (S over decoded weights); ref: 2^-23 * S. FAST: see fm_numeric.
     * Best with row ranges that start at multiples of 32 and hold at least 64. Threads: any, on disjoint (i, r). */
    void (*matmul[FM_QUANT_COUNT])(const fm_mat *W, const fm_act *x, int64_t n, float *y, int64_t ldy,
                                   int64_t r0, int64_t r1);
    /* y[0..n_cols) = row r of W, as decode_ref gives it. (F32 scales only: variants round scale*code + bias once,
     * decode_ref twice.) */
    void (*decode_row[FM_QUANT_COUNT])(const fm_mat *W, int64_t r, float *y);

    /* y[c] = x[c] / sqrt(mean(x^2) + eps) * w[c]; y may be x. Bound: 8u * |y|. */
    void (*rmsnorm)(const float *x, const float *w, float eps, float *y, int64_t n_cols);
    /* y[c] = silu(gate[c]) * up[c]; y may be gate or up. Bound: 16u * |y| + 2^-120 * |up|. */
    void (*swiglu)(const float *gate, const float *up, float *y, int64_t n);
    /* y[c] += a * x[c]; y must not overlap x. Bound: 2u * S. */
    void (*axpy)(float a, const float *x, float *y, int64_t n);

    /* In place on one head: pairs (i, i + rot/2), angle pos * inv_freq[i], i < rot/2.
     * cs = cos, sin of the angles: [rot/2] each, made once per row by the caller. Bound: 4u * (|x_i| + |x_j|). */
    void (*rope)(float *x, const float *cs_cos, const float *cs_sin, int64_t rot);

    /* out[0..n) = x in the format (f32, f16, bf16), rounded to nearest even. */
    void (*kv_store)(fm_quant format, const float *x, int64_t n, void *out);
    /* Rows r0 <= r < r1 of one sequence, the n_heads/n_kv_heads query heads that read kv_head: row r attends to
     * positions 0 .. n_before + r; softmax with max subtraction; then * sigmoid(gate). Bound: 2^-18 * max|v| per
     * element, over K and V as stored. A tile of K and V is read once for FM_ATTN_PASS queries: give rows in blocks
     * of that many / (n_heads / n_kv_heads), counted from r0. scratch: FM_ATTN_PASS * fm_attn_part_floats. */
    void (*attend_rows)(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, const fm_kv_head *kv,
                        int64_t n_before, float *scratch);
    /* The same, the positions divided among threads: attend_part sums positions part*FM_ATTN_PART and on for those of
     * the rows that reach them, query i (row by row, then heads) at out + i*fm_attn_part_floats; attend_merge makes y
     * of all parts, part p's queries at parts + p*stride. The bits are attend_rows'. */
    void (*attend_part)(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, const fm_kv_head *kv,
                        int64_t n_before, int64_t part, float *out);
    void (*attend_merge)(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, int64_t n_before,
                         const float *parts, int64_t stride);

    /* Causal depthwise convolution + SiLU over channels c0 <= c < c1 of one sequence's n rows.
     * m [n, n_ch] rows ldm apart; w [n_ch, kern], tap kern-1 = current row; hist_in [kern-1, n_ch] raw rows, oldest
     * first; hist_out the same after the n rows (may not alias hist_in). y [n, n_ch] rows ldy apart, not m.
     * kern <= 16. Bound: 32u * S + 2^-120. */
    void (*conv_silu)(const float *m, int64_t ldm, const float *w, int64_t kern, const float *hist_in,
                      float *hist_out, float *y, int64_t ldy, int64_t n, int64_t n_ch, int64_t c0, int64_t c1);

    /* Gated DeltaNet for value head h of one sequence's rows 0 <= t < n: l2-norm of q and k, gates, recurrence,
     * output norm, silu(z). S_in, S_out [dk, dv] f32 of this head; must not alias; n >= 1.
     * scratch: delta_scratch floats. Any cut of the rows into calls gives the same bits. Source: docs of the formulas
     * in tests/oracle/attention.py. Bound, tested: S 2e-6 of the largest |S| before or after, y 1e-5 of the
     * head's largest |y|. */
    int64_t (*delta_scratch)(const fm_delta_args *a, int64_t n);
    void (*delta)(const fm_delta_args *a, int64_t h, int64_t n, const float *S_in, float *S_out, float *scratch);

    /* ids[0..k) and weights of one row: by falling choice score, equal scores by rising id.
     * logits [n_experts]; scratch [n_experts] floats. k <= 64. NaN sorts as -inf. */
    void (*route)(const fm_route_args *a, const float *logits, int32_t *ids, float *weights, float *scratch);
} fm_kernels;

/* The table for this process: FLASHMOE_CPU's variant, or the best supported. FM_ERR_ARG for a variant that is
 * unknown or not supported here. Filled once; the pointer is good for ever. The short form is EXACT. */
fm_status fm_kernels_get_numeric(fm_numeric numeric, const fm_kernels **out);
fm_status fm_kernels_get(const fm_kernels **out);
/* A given variant's table (tests). Same errors. The short form is EXACT. */
fm_status fm_kernels_variant_numeric(const char *name, fm_numeric numeric, fm_kernels *out);
fm_status fm_kernels_variant(const char *name, fm_kernels *out);
/* Names, weakest first; NULL past the end. supported tells whether CPU and OS can run it. */
const char *fm_kernels_name(int i);
bool fm_kernels_supported(int i);

/* Matrix view from areas; strides follow from the format. */
fm_mat fm_mat_make(fm_quant format, int32_t group, fm_quant scale_format, int64_t n_rows, int64_t n_cols,
                   const void *codes, const void *scales, const void *biases);

#endif
