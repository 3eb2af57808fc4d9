/* Owns: the Gated DeltaNet recurrence over vec.h. Column j of the state needs only column j of v, so a block of
 * columns stays in L1 while all rows (tokens) pass over it, and one pass per token updates the state, reads the
 * output and starts the next token's S^T k. That is 4 FMA-port operations per element, the same as the chunked
 * form of the formulas needs in f32, but its bits do not depend on how the rows are cut into calls. */
#ifndef FM_CPU_VEC_DELTA_H
#define FM_CPU_VEC_DELTA_H

#include "cpu/kernels.h"
#include "cpu/vec_ops.h"

enum {
    DELTA_ROWS = 64,      /* tokens whose q, k, gates are prepared at a time */
    /* Vectors of a column block when many tokens pass: 16 or 32 KiB of state at dk = 128, and sums enough to hide
     * the latency of FMA. */
    DELTA_NV = 4,
    DELTA_AHEAD = 2048, /* bytes; 1024 and 4096 gained less */
};

FM_STATIC int64_t delta_scratch_vec(const fm_delta_args *a, int64_t n)
{
    return (n < DELTA_ROWS ? n : DELTA_ROWS) * (2 * a->dk + 2) + (n > 1 ? DELTA_NV * VL * a->dk : 0);
}

FM_INLINE void delta_normalise(const float *x, int64_t n, double scale, float *y)
{
    const vf f = vf_set((float)(scale / sqrt(sum_squares(x, n) + 1e-6))); /* fixed, on the sum */
    int64_t c = 0;
    for (; c + VL <= n; c += VL)
        vf_store(y + c, vf_load(x + c) * f);
    if (c < n)
        vf_store_part(y + c, vf_load_part(x + c, n - c) * f, n - c);
}

/* q, k [n, dk] normalised; alpha, beta [n]. */
typedef struct delta_rows {
    const float *q, *k, *alpha, *beta;
    const float *v; /* rows ld_v apart */
    float *o;       /* rows ld_o apart */
    float *block;   /* a column block of the state, compact: in place its rows would fall into few cache sets */
    int64_t n, dk, dv, ld_v, ld_o;
} delta_rows;

FM_INLINE vf delta_load(const float *p, int64_t part) { return part == VL ? vf_load(p) : vf_load_part(p, part); }

FM_INLINE void delta_store(float *p, vf v, int64_t part)
{
    if (part == VL)
        vf_store(p, v);
    else
        vf_store_part(p, v, part);
}

/* Columns j .. j + NV*VL of v and o; their state at S, rows ld apart, goes to S_out (may be S) at the same stride.
 * part < VL only with NV = 1. `many`: another token may follow, so prepare its S^T k. */
FM_INLINE void delta_columns(const delta_rows *d, int64_t j, const float *S, float *S_out, int64_t ld, int NV,
                             int64_t part, bool many)
{
    const int64_t dk = d->dk, n = d->n;
    vf u[8] = {{0}};
    for (int64_t i = 0; i < dk; i++)
#pragma GCC unroll 8
        for (int x = 0; x < NV; x++)
            u[x] = vf_fma(vf_set(d->k[i]), delta_load(S + i * ld + x * VL, part), u[x]);
    for (int64_t t = 0; t < n; t++) {
        const float *k = d->k + t * dk, *q = d->q + t * dk, *next = t + 1 < n ? k + dk : k;
        const vf alpha = vf_set(d->alpha[t]), beta = vf_set(d->beta[t]);
        vf delta[8], o[8];
#pragma GCC unroll 8
        for (int x = 0; x < NV; x++) {
            delta[x] = beta * vf_fma(-alpha, u[x], delta_load(d->v + t * d->ld_v + j + x * VL, part));
            o[x] = u[x] = (vf){0};
        }
        for (int64_t i = 0; i < dk; i++) {
            const vf ki = vf_set(k[i]), qi = vf_set(q[i]), ni = vf_set(next[i]);
#pragma GCC unroll 8
            for (int x = 0; x < NV; x++) {
                const int64_t at = i * ld + x * VL;
                const vf s = vf_fma(ki, delta[x], alpha * delta_load(S + at, part));
                if (!many && part == VL)
                    vf_stream(S_out + at, s); /* larger than the caches: reading it first is waste */
                else
                    delta_store(S_out + at, s, part);
                o[x] = vf_fma(qi, s, o[x]);
                if (many)
                    u[x] = vf_fma(ni, s, u[x]);
            }
        }
#pragma GCC unroll 8
        for (int x = 0; x < NV; x++)
            delta_store(d->o + t * d->ld_o + j + x * VL, o[x], part);
        S = S_out;
    }
}

FM_INLINE void delta_copy(const float *from, int64_t ld_from, float *to, int64_t ld_to, int64_t dk)
{
    for (int64_t i = 0; i < dk; i++)
        memcpy(to + i * ld_to, from + i * ld_from, DELTA_NV * VL * sizeof *to);
}

FM_INLINE void delta_state(const delta_rows *d, const float *S_in, float *S_out)
{
    const int64_t dv = d->dv;
    int64_t j = 0;
    if (d->n == 1) /* memory-bound: long rows, in memory order */
        for (; j + 8 * VL <= dv; j += 8 * VL)
            delta_columns(d, j, S_in + j, S_out + j, dv, 8, VL, false);
    else
        for (; j + DELTA_NV * VL <= dv; j += DELTA_NV * VL) {
            delta_copy(S_in + j, dv, d->block, DELTA_NV * VL, d->dk);
            delta_columns(d, j, d->block, d->block, DELTA_NV * VL, DELTA_NV, VL, true);
            delta_copy(d->block, DELTA_NV * VL, S_out + j, dv, d->dk);
        }
    for (; j + VL <= dv; j += VL)
        delta_columns(d, j, S_in + j, S_out + j, dv, 1, VL, true);
    if (j < dv)
        delta_columns(d, j, S_in + j, S_out + j, dv, 1, dv - j, true);
}

FM_INLINE void delta_output(const fm_delta_args *a, int64_t t, int64_t h)
{
    float *y = a->y + t * a->ld_y + h * a->dv;
    const float *z = a->z + t * a->ld_z + h * a->dv;
    const vf f = vf_set((float)(1 / sqrt(sum_squares(y, a->dv) / (double)a->dv + (double)a->eps)));
    for (int64_t c = 0; c < a->dv; c += VL) {
        const int64_t part = a->dv - c < VL ? a->dv - c : VL;
        const vf o = delta_load(y + c, part) * f * delta_load(a->norm_w + c, part);
        delta_store(y + c, o * vf_silu(delta_load(z + c, part)), part);
    }
}

/* A row's pieces of this head: far apart, so no hardware prefetcher sees them coming. */
FM_INLINE void delta_prefetch(const fm_delta_args *a, int64_t h, int64_t kh, int64_t t)
{
    const float *row = a->qkv + t * a->ld_qkv;
    for (int64_t i = 0; i < a->dk; i += 16) {
        __builtin_prefetch(row + kh * a->dk + i);
        __builtin_prefetch(row + (a->n_k_heads + kh) * a->dk + i);
    }
    for (int64_t i = 0; i < a->dv; i += 16) {
        __builtin_prefetch(row + 2 * a->n_k_heads * a->dk + h * a->dv + i, 0, 2);
        __builtin_prefetch(a->z + t * a->ld_z + h * a->dv + i, 0, 2);
        __builtin_prefetch(a->y + t * a->ld_y + h * a->dv + i, 1, 2);
    }
}

FM_STATIC void delta_vec(const fm_delta_args *a, int64_t h, int64_t n, const float *S_in, float *S_out, float *scratch)
{
    const int64_t dk = a->dk, dv = a->dv, kh = h / (a->n_v_heads / a->n_k_heads);
    const int64_t cap = n < DELTA_ROWS ? n : DELTA_ROWS;
    float *q = scratch, *k = q + cap * dk, *alpha = k + cap * dk, *beta = alpha + cap, *block = beta + cap;
    const double decay = -exp((double)a->A_log[h]), q_scale = 1 / sqrt((double)dk);
    for (int64_t i = 0; n == 1 && i < DELTA_AHEAD; i += 64) /* on its way while q and k are normalised */
        __builtin_prefetch((const char *)S_in + i);
    for (int64_t t0 = 0; t0 < n; t0 += cap) {
        const int64_t nt = n - t0 < cap ? n - t0 : cap;
        for (int64_t t = 0; t < nt; t++) {
            const float *row = a->qkv + (t0 + t) * a->ld_qkv;
            if (nt > 1)
                delta_prefetch(a, h, kh, t0 + t + 4);
            delta_normalise(row + kh * dk, dk, q_scale, q + t * dk);
            delta_normalise(row + (a->n_k_heads + kh) * dk, dk, 1, k + t * dk);
            const double b = a->b[(t0 + t) * a->ld_ab + h], x = (double)a->a[(t0 + t) * a->ld_ab + h] + a->dt_bias[h];
            const double e = exp(-fabs(b));
            beta[t] = (float)((b >= 0 ? 1 : e) / (1 + e));
            alpha[t] = (float)exp(decay * (fmax(x, 0) + log1p(exp(-fabs(x)))));
        }
        const delta_rows d = {
            .q = q, .k = k, .alpha = alpha, .beta = beta, .block = block,
            .v = a->qkv + t0 * a->ld_qkv + 2 * a->n_k_heads * dk + h * dv,
            .o = a->y + t0 * a->ld_y + h * dv,
            .n = nt, .dk = dk, .dv = dv, .ld_v = a->ld_qkv, .ld_o = a->ld_y,
        };
        delta_state(&d, t0 == 0 ? S_in : S_out, S_out);
        vf_stream_end();
        for (int64_t t = t0; t < t0 + nt; t++)
            delta_output(a, t, h);
    }
}

FM_STATIC void delta_overlay(fm_kernels *k)
{
    k->delta_scratch = delta_scratch_vec;
    k->delta = delta_vec;
}

#endif
