/* Owns: attention over vec.h, with online softmax over tiles of ATTN_TILE positions that start at multiples of it, so
 * a query's result does not depend on which other queries are in the call. A "query" is one head of one row; all
 * queries of a call read the same KV head.
 *   scores: lanes = positions. VL rows of K are transposed to [dim][position] in L1 and used by all queries.
 *   values: lanes = dims. Sums of p * V live in the output row, f32; a tile adds its positions in rising order. */
#ifndef FM_CPU_VEC_ATTN_H
#define FM_CPU_VEC_ATTN_H

#include "cpu/kernels.h"
#include "cpu/vec.h"

enum {
    ATTN_TILE = 64,   /* positions; a multiple of VL */
    ATTN_DIMS = 512,  /* dims transposed at a time */
    ATTN_MAX = 128,   /* queries per pass over K and V */
    ATTN_QB = FM_VEC_ISA == FM_VEC_AVX2 ? 4 : 8, /* queries per block of scores */
    ATTN_VB = FM_VEC_ISA == FM_VEC_AVX2 ? 2 : 4, /* queries, and vectors, per block of values */
};

typedef struct attn_query {
    const float *q, *gate;
    float *y;
    int64_t n_pos;
    float top, total; /* running maximum and sum of exp(score - maximum) */
} attn_query;

/* kt[d][lane] = K[t + lane][d] for d < hd; lanes past the end repeat the last position. */
FM_INLINE void attn_transpose(const float *K, int64_t hd, int64_t t, int64_t n_pos, int64_t d0, int64_t nd, float *kt)
{
    for (int64_t d = d0; d < d0 + nd; d += VL) {
        vu r[VL];
        const int64_t part = d0 + nd - d < VL ? d0 + nd - d : VL;
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) {
            const float *p = K + (t + i < n_pos ? t + i : n_pos - 1) * hd + d;
            r[i] = part == VL ? vu_load(p) : vu_load_part(p, part);
        }
        v_transpose(r);
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++)
            vu_store(kt + (d - d0 + i) * VL, r[i]);
    }
}

/* s[i] += sum_d q[i][d] * kt[d] over nd dims; Q is a constant. */
FM_INLINE void attn_dot(const attn_query *q, const float *kt, int64_t d0, int64_t nd, float *s, int64_t lds, int Q)
{
    vf acc[ATTN_QB];
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++)
        acc[i] = vf_load(s + i * lds);
    for (int64_t d = 0; d < nd; d++) {
        const vf k = vf_load(kt + d * VL);
#pragma GCC unroll 8
        for (int i = 0; i < Q; i++)
            acc[i] = vf_fma(vf_set(q[i].q[d0 + d]), k, acc[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++)
        vf_store(s + i * lds, acc[i]);
}

/* Scores of one tile (before scale): s[query][position in tile]. */
FM_INLINE void attn_scores(const attn_query *q, int64_t nq, const float *K, const float *V, int64_t hd, int64_t t0,
                           int64_t n_pos, float (*s)[ATTN_TILE])
{
    _Alignas(64) float kt[ATTN_DIMS * VL];
    memset(s, 0, (size_t)nq * sizeof *s);
    for (int64_t t = t0; t < t0 + ATTN_TILE && t < n_pos; t += VL)
        for (int64_t d = 0; d < hd; d += ATTN_DIMS) {
            const int64_t nd = hd - d < ATTN_DIMS ? hd - d : ATTN_DIMS;
            int64_t i = 0;
            for (int64_t b = 0; b < VL * nd; b += 16) { /* what comes next: K behind this block, V of this block */
                __builtin_prefetch(K + (t + VL) * hd + d * VL + b, 0, 2);
                __builtin_prefetch(V + t * hd + d * VL + b, 0, 2);
            }
            attn_transpose(K, hd, t, n_pos, d, nd, kt);
            for (; i + ATTN_QB <= nq; i += ATTN_QB)
                attn_dot(q + i, kt, d, nd, s[i] + t - t0, ATTN_TILE, ATTN_QB);
            for (; i + 2 <= nq; i += 2)
                attn_dot(q + i, kt, d, nd, s[i] + t - t0, ATTN_TILE, 2);
            for (; i < nq; i++)
                attn_dot(q + i, kt, d, nd, s[i] + t - t0, ATTN_TILE, 1);
        }
}

/* Scores to weights exp(score - top) of the tile's first `have` positions, the others 0; rescales the output so far. */
FM_INLINE void attn_softmax(attn_query *q, float *s, int64_t have, float scale, int64_t hd)
{
    int32_t lane[VL];
    for (int i = 0; i < VL; i++)
        lane[i] = i;
    vi id;
    memcpy(&id, lane, sizeof id);
    vf top = vf_set(q->top);
    for (int64_t i = 0; i < ATTN_TILE; i += VL) {
        const vi live = id + (int32_t)i < (vi)vu_set((uint32_t)have);
        const vf x = vf_select(live, vf_load(s + i) * scale, vf_set(-INFINITY));
        vf_store(s + i, x);
        top = vf_max(x, top);
    }
    const float now = vf_top(top);
    const vf shift = vf_set(now == -INFINITY ? 0 : now); /* all scores -inf: weights 0, the result is NaN */
    vf total = {0};
    for (int64_t i = 0; i < ATTN_TILE; i += VL) {
        const vf p = vf_exp(vf_load(s + i) - shift);
        vf_store(s + i, p);
        total += p;
    }
    if (now > q->top) {
        const vf shrink = vf_exp(vf_set(q->top) - shift); /* first tile: e^-inf = 0 */
        for (int64_t d = 0; d < hd; d += VL) {
            if (d + VL <= hd)
                vf_store(q->y + d, vf_load(q->y + d) * shrink);
            else
                vf_store_part(q->y + d, vf_load_part(q->y + d, hd - d) * shrink, hd - d);
        }
        q->total *= shrink[0];
        q->top = now;
    }
    q->total += vf_sum(total);
}

/* y[i] += sum_t p[i][t] * V[t] over the tile's first n positions; dims d .. d + NV*VL. Q, NV are constants. */
FM_INLINE void attn_values(const attn_query *q, const float (*p)[ATTN_TILE], const float *V, int64_t hd, int64_t d,
                           int64_t n, int Q, int NV, int64_t part)
{
    vf acc[ATTN_VB][4];
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
        for (int x = 0; x < NV; x++)
            acc[i][x] = part == VL ? vf_load(q[i].y + d + x * VL) : vf_load_part(q[i].y + d, part);
    for (int64_t t = 0; t < n; t++) {
        vf v[4];
#pragma GCC unroll 4
        for (int x = 0; x < NV; x++)
            v[x] = part == VL ? vf_load(V + t * hd + d + x * VL) : vf_load_part(V + t * hd + d, part);
#pragma GCC unroll 4
        for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
            for (int x = 0; x < NV; x++)
                acc[i][x] = vf_fma(vf_set(p[i][t]), v[x], acc[i][x]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
        for (int x = 0; x < NV; x++) {
            if (part == VL)
                vf_store(q[i].y + d + x * VL, acc[i][x]);
            else
                vf_store_part(q[i].y + d, acc[i][x], part);
        }
}

FM_INLINE void attn_values_block(const attn_query *q, const float (*p)[ATTN_TILE], const float *V, int64_t hd,
                                 int64_t n, int Q)
{
    int64_t d = 0;
    for (; d + ATTN_VB * VL <= hd; d += ATTN_VB * VL)
        attn_values(q, p, V, hd, d, n, Q, ATTN_VB, VL);
    for (; d + VL <= hd; d += VL)
        attn_values(q, p, V, hd, d, n, Q, 1, VL);
    if (d < hd)
        attn_values(q, p, V, hd, d, n, Q, 1, hd - d);
}

FM_INLINE int64_t attn_have(const attn_query *q, int64_t t0)
{
    return q->n_pos - t0 < 0 ? 0 : q->n_pos - t0 < ATTN_TILE ? q->n_pos - t0 : ATTN_TILE;
}

/* nq <= ATTN_MAX queries by rising n_pos: one pass over K and V. */
static __attribute__((unused, noinline)) void attn_run(attn_query *q, int64_t nq, const float *K, const float *V,
                                                       int64_t hd, float scale)
{
    _Alignas(64) float s[ATTN_MAX][ATTN_TILE];
    const int64_t n_pos = q[nq - 1].n_pos;
    for (int64_t i = 0; i < nq; i++) {
        q[i].top = -INFINITY;
        q[i].total = 0;
        memset(q[i].y, 0, (size_t)hd * sizeof *q[i].y);
    }
    for (int64_t t0 = 0, first = 0; t0 < n_pos; t0 += ATTN_TILE) {
        while (q[first].n_pos <= t0) /* queries that end before this tile */
            first++;
        attn_query *live = q + first;
        const int64_t n = nq - first;
        attn_scores(live, n, K, V, hd, t0, n_pos, s);
        for (int64_t i = 0; i < n; i++)
            attn_softmax(&live[i], s[i], attn_have(&live[i], t0), scale, hd);
        for (int64_t i = 0; i < n;) {
            const int64_t have = attn_have(&live[i], t0);
            if (i + ATTN_VB <= n && attn_have(&live[i + ATTN_VB - 1], t0) == have) {
                attn_values_block(live + i, (const float (*)[ATTN_TILE])s + i, V + t0 * hd, hd, have, ATTN_VB);
                i += ATTN_VB;
            } else {
                attn_values_block(live + i, (const float (*)[ATTN_TILE])s + i, V + t0 * hd, hd, have, 1);
                i++;
            }
        }
    }
    for (int64_t i = 0; i < nq; i++) {
        const vf inv = vf_set(1 / q[i].total);
        for (int64_t d = 0; d < hd; d += VL) {
            const int64_t part = hd - d < VL ? hd - d : VL;
            vf y = vf_load_part(q[i].y + d, part) * inv;
            if (q[i].gate != NULL)
                y *= vf_sigmoid(vf_load_part(q[i].gate + d, part));
            vf_store_part(q[i].y + d, y, part);
        }
    }
}

FM_STATIC void attend_rows_vec(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, const float *K,
                               const float *V, int64_t n_before)
{
    attn_query q[ATTN_MAX];
    const int64_t per = a->n_heads / a->n_kv_heads;
    int64_t n = 0;
    for (int64_t r = r0; r < r1; r++)
        for (int64_t h = kv_head * per; h < (kv_head + 1) * per; h++) {
            const int64_t at = r * a->ld_q + h * a->ld_q_head;
            q[n++] = (attn_query){.q = a->q + at,
                                  .gate = a->gate ? a->gate + at : NULL,
                                  .y = a->y + r * a->ld_y + h * a->head_dim,
                                  .n_pos = n_before + r + 1};
            if (n == ATTN_MAX || (r + 1 == r1 && h + 1 == (kv_head + 1) * per)) {
                attn_run(q, n, K, V, a->head_dim, a->scale);
                n = 0;
            }
        }
}

FM_STATIC void attend_vec(const fm_attn_args *a, int64_t row, int64_t kv_head, const float *K, const float *V,
                          int64_t n_pos)
{
    attend_rows_vec(a, row, row + 1, kv_head, K, V, n_pos - 1 - row);
}

FM_STATIC void attn_overlay(fm_kernels *k)
{
    k->attend = attend_vec;
    k->attend_rows = attend_rows_vec;
}

#endif
