/* Owns: the scores of attention over vec.h: products of queries and rows of K, a tile of positions at a time. The sums run
 * over every VL-th dim, then over a tree of neighbours. Few queries: lanes = dims, K as it lies. Many: lanes = positions,
 * rows of K transposed in L1; the order of the sums is the same, so a score does not depend on its neighbours. */
#ifndef FM_CPU_VEC_ATTN_SCORES_H
#define FM_CPU_VEC_ATTN_SCORES_H

#include "cpu/kernels.h"
#include "cpu/vec.h"

enum {
    ATTN_TILE = 64,   /* positions; a multiple of VL and ATTN_DOTS */
    ATTN_MAX = FM_ATTN_PASS,
    ATTN_QB = FM_VEC_ISA == FM_VEC_AVX2 ? 4 : 8, /* queries per block of scores, and that times rows */
    ATTN_DOTS = 2 * ATTN_QB,
    ATTN_MANY = 16,   /* queries from which transposing K pays, */
    ATTN_MB = FM_VEC_ISA == FM_VEC_AVX2 ? 2 : 4, /* in blocks of queries, */
    ATTN_PV = 2,      /* and of vectors of positions */
    ATTN_DIMS = 256,  /* at most */
};

typedef struct attn_query {
    const float *q, *gate;
    float *y;    /* the row's output, and the sum of the parts so far */
    float *part; /* of the present part: unnormalised output, then at `at` its maximum and total */
    int64_t n_pos;
    float top, total; /* running maximum and sum of exp(score - maximum) */
} attn_query;

/* VL numbers of K or V from element i; plain is a constant. */
FM_INLINE vf attn_get(const void *p, int64_t i, fm_quant plain)
{
    const uint8_t *at = (const uint8_t *)p + i * plain_bytes(plain);
    return plain == FM_QUANT_F32 ? vf_load(at) : plain == FM_QUANT_F16 ? vf_from_f16(at) : vf_from_bf16(at);
}

FM_INLINE vf attn_get_part(const void *p, int64_t i, int64_t n, fm_quant plain)
{
    const uint8_t *at = (const uint8_t *)p + i * plain_bytes(plain);
    if (plain == FM_QUANT_F32)
        return (vf)vu_load_part(at, n);
    const vh h = vh_load_part(at, n);
    return plain == FM_QUANT_F16 ? vf_from_f16(&h) : vf_from_bf16(&h);
}

/* Where the next tile of K and V lies. It is read ahead in two strips, a little at a time all through the work on the
 * present one: memory is then always busy, and never waited for. */
typedef struct attn_next {
    const uint8_t *k, *v;
} attn_next;

/* `bytes` of each strip from byte `at` on. */
FM_INLINE void attn_fetch(const attn_next *next, int64_t at, int64_t bytes)
{
    for (int64_t b = 0; b < bytes; b += 64) {
        __builtin_prefetch(next->k + at + b, 0, 3);
        __builtin_prefetch(next->v + at + b, 0, 3);
    }
}

/* Sums of the lanes of VL vectors: lane i of the result is that of v[i], neighbours first. */
FM_INLINE vf attn_sums(vf *v)
{
#pragma GCC unroll 4
    for (int n = VL; n > 1; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n / 2; i++)
            v[i] = V_EVEN(v[2 * i], v[2 * i + 1]) + V_ODD(v[2 * i], v[2 * i + 1]);
    return v[0];
}

/* s[i][r] = the product of query i and row r of K for Q queries and R = ATTN_DOTS / Q rows from t on; rows past the end
 * repeat the last one. Q, R, plain are constants. */
FM_INLINE void attn_dot(const attn_query *q, const void *K, int64_t hd, int64_t t, int64_t n_pos, float *s, int Q,
                        int R, const attn_next *next, int64_t at, int64_t bytes, fm_quant plain)
{
    vf acc[ATTN_DOTS];
    const float *x[ATTN_QB];
    int64_t row[ATTN_DOTS], d = 0;
#pragma GCC unroll 16
    for (int i = 0; i < ATTN_DOTS; i++)
        acc[i] = (vf){0};
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++)
        x[i] = q[i].q;
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
        row[r] = (t + r < n_pos ? t + r : n_pos - 1) * hd;
    for (; d + VL <= hd; d += VL, at += bytes) {
        vf k[ATTN_DOTS];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            k[r] = attn_get(K, row[r] + d, plain);
        attn_fetch(next, at, bytes);
#pragma GCC unroll 8
        for (int i = 0; i < Q; i++) {
            vf one = vf_load(x[i] + d);
            V_KEEP(one); /* else each product loads it again */
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
                acc[i * R + r] = vf_fma(one, k[r], acc[i * R + r]);
        }
    }
    if (d < hd)
        for (int r = 0; r < R; r++) {
            const vf k = attn_get_part(K, row[r] + d, hd - d, plain);
            for (int i = 0; i < Q; i++)
                acc[i * R + r] = vf_fma(vf_load_part(x[i] + d, hd - d), k, acc[i * R + r]);
        }
    _Alignas(64) float sums[ATTN_DOTS];
#pragma GCC unroll 4
    for (int i = 0; i < ATTN_DOTS; i += VL)
        vf_store(sums + i, attn_sums(acc + i));
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++)
        memcpy(s + i * ATTN_TILE, sums + i * R, (size_t)R * sizeof *s);
}

/* kt[dim % VL][dim / VL][lane] = K[t + lane][dim], ATTN_PV * VL lanes; lanes past the end repeat the last position. */
FM_INLINE void attn_transpose(const void *K, int64_t hd, int64_t t, int64_t n_pos, float *kt, const attn_next *next,
                              int64_t at, int64_t bytes, fm_quant plain)
{
    for (int v = 0; v < ATTN_PV; v++)
        for (int64_t d = 0; d < hd; d += VL, at += bytes) {
            vu r[VL];
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++) {
                const int64_t row = t + v * VL + i < n_pos ? t + v * VL + i : n_pos - 1;
                r[i] = (vu)attn_get(K, row * hd + d, plain);
            }
            attn_fetch(next, at, bytes);
            v_transpose(r);
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++)
                vu_store(kt + ((i * hd + d) / VL * ATTN_PV + v) * VL, r[i]);
        }
}

/* s[i] = the products of ATTN_MB queries and ATTN_PV * VL positions, in attn_dot's order: the two halves of a node of
 * its tree are summed together, done nodes wait in `tree` for their neighbours. */
FM_INLINE void attn_dot_many(const attn_query *q, const float *kt, int64_t hd, float *s)
{
    vf tree[4][ATTN_MB][ATTN_PV], acc[2][ATTN_MB][ATTN_PV];
    const int64_t n = hd / VL;
    int level = 0;
    for (int l = 0; l < VL; l += 2) {
#pragma GCC unroll 4
        for (int i = 0; i < ATTN_MB; i++)
#pragma GCC unroll 2
            for (int v = 0; v < ATTN_PV; v++)
                acc[0][i][v] = acc[1][i][v] = (vf){0};
        for (int64_t j = 0; j < n; j++) {
            vf k[2][ATTN_PV];
#pragma GCC unroll 2
            for (int e = 0; e < 2; e++)
#pragma GCC unroll 2
                for (int v = 0; v < ATTN_PV; v++)
                    k[e][v] = vf_load(kt + (((l + e) * n + j) * ATTN_PV + v) * VL);
#pragma GCC unroll 4
            for (int i = 0; i < ATTN_MB; i++)
#pragma GCC unroll 2
                for (int e = 0; e < 2; e++) {
                    const vf one = vf_set(q[i].q[j * VL + l + e]);
#pragma GCC unroll 2
                    for (int v = 0; v < ATTN_PV; v++)
                        acc[e][i][v] = vf_fma(one, k[e][v], acc[e][i][v]);
                }
        }
        level = 0;
#pragma GCC unroll 4
        for (int i = 0; i < ATTN_MB; i++)
#pragma GCC unroll 2
            for (int v = 0; v < ATTN_PV; v++)
                acc[0][i][v] += acc[1][i][v];
        for (int m = l / 2; m & 1; m >>= 1, level++)
#pragma GCC unroll 4
            for (int i = 0; i < ATTN_MB; i++)
#pragma GCC unroll 2
                for (int v = 0; v < ATTN_PV; v++)
                    acc[0][i][v] = tree[level][i][v] + acc[0][i][v];
        memcpy(tree[level], acc[0], sizeof acc[0]);
    }
    for (int i = 0; i < ATTN_MB; i++)
        memcpy(s + i * ATTN_TILE, tree[level][i], sizeof tree[level][i]);
}

/* The scores of a tile for the first queries, as many as make whole blocks; returns how many. */
FM_INLINE int64_t attn_scores_many(const attn_query *q, int64_t nq, const fm_kv_head *kv, int64_t hd, int64_t t0,
                                   int64_t end, float (*s)[ATTN_TILE], const attn_next *next, fm_quant plain)
{
    _Alignas(64) float kt[ATTN_DIMS * ATTN_PV * VL];
    if (nq < ATTN_MANY || hd > ATTN_DIMS || hd % VL != 0)
        return 0;
    const int64_t n = nq / ATTN_MB * ATTN_MB, bytes = VL * VL * plain_bytes(plain) / 2;
    for (int64_t t = t0, at = 0; t < end; t += ATTN_PV * VL, at += ATTN_PV * hd / VL * bytes) {
        attn_transpose(kv->k, hd, t, end, kt, next, at, bytes, plain);
        for (int64_t i = 0; i < n; i += ATTN_MB)
            attn_dot_many(q + i, kt, hd, s[i] + t - t0);
    }
    return n;
}

/* Scores of one tile (before scale): s[query][position in tile]. */
FM_INLINE void attn_scores(const attn_query *q, int64_t nq, const fm_kv_head *kv, int64_t hd, int64_t t0, int64_t n_pos,
                           float (*s)[ATTN_TILE], const attn_next *next, fm_quant plain)
{
    const int64_t end = t0 + ATTN_TILE < n_pos ? t0 + ATTN_TILE : n_pos, size = plain_bytes(plain);
    int64_t i = attn_scores_many(q, nq, kv, hd, t0, end, s, next, plain), at = 0;
#define ATTN_DOT(Q)                                                                                                  \
    for (; i + (Q) <= nq; i += (Q))                                                                                  \
        for (int64_t t = t0; t < end; t += ATTN_DOTS / (Q)) {                                                        \
            const int64_t bytes = i == 0 ? ATTN_DOTS / (Q) * VL * size / 2 : 0; /* half of the tile in all */        \
            attn_dot(q + i, kv->k, hd, t, n_pos, s[i] + t - t0, (Q), ATTN_DOTS / (Q), next, at, bytes, plain);       \
            at += hd / VL * bytes;                                                                                   \
        }
    ATTN_DOT(ATTN_QB)
    ATTN_DOT(ATTN_QB / 2)
    ATTN_DOT(ATTN_QB / 4)
    if (ATTN_QB == 8)
        ATTN_DOT(1)
#undef ATTN_DOT
}

#endif
