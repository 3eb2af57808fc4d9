/* Owns: the walk of a row's WALK_Q queries through whole tiles of K and V, for 16 lanes. What it is after is the order in
 * which memory is read. The scores of a tile and the values of the tile before are computed in turns of WALK_P positions,
 * row by row, so that two streams, of K and of V, go forward evenly all the time. (First all of a tile's K and then its V
 * by columns leaves the hardware's prefetcher behind.) What the next turn needs is touched, line after line in order, by
 * loads whose results nobody uses, and asked for a little before that; all else finds its lines in L1.
 *   scores: lanes = dims; two rows of K at a time.
 *   values: lanes = dims; WALK_P rows of V at a time for half of the queries, the sums wait in L1.
 * Every sum has the order that it has in vec_attn.h, so the bits are the same. */
#ifndef FM_CPU_VEC_ATTN_WALK_H
#define FM_CPU_VEC_ATTN_WALK_H

#include "cpu/vec_attn_scores.h"

enum {
    WALK_Q = 8,
    WALK_P = 4,
    WALK_AHEAD = 768, /* bytes before a line is touched; 512 and 1024 do as well, 0 loses a quarter */
};

/* The queries and their sums beside each other: rows of the caller's may lie in few sets of L1. */
typedef struct walk {
    _Alignas(64) float x[WALK_Q][ATTN_DIMS], y[WALK_Q][ATTN_DIMS];
    float s[2][WALK_Q][ATTN_TILE]; /* [turn] */
} walk;

/* Touches `bytes`, whole lines, from p + at on. Asks for what comes WALK_AHEAD later, which may lie past the end of K
 * or V. */
FM_INLINE void walk_touch(const uint8_t *p, const uint8_t *later, int64_t at, int64_t bytes)
{
#pragma GCC unroll 2
    for (int64_t b = at; b < at + bytes; b += 64) {
        const vu v = vu_load(p + b);
        V_TOUCH(v);
        __builtin_prefetch(later + b + WALK_AHEAD, 0, 3);
    }
}

/* s[query][row] of two rows of K. Touches two rows at `next`. */
FM_INLINE void walk_scores(const float (*x)[ATTN_DIMS], const uint8_t *K, int64_t hd, float *s, const uint8_t *next,
                           const uint8_t *later, fm_quant plain)
{
    vf acc[2 * WALK_Q];
    const int64_t size = plain_bytes(plain);
#pragma GCC unroll 16
    for (int i = 0; i < 2 * WALK_Q; i++)
        acc[i] = (vf){0};
    for (int64_t d = 0; d < hd; d += VL) {
        const vf even = attn_get(K, d, plain), odd = attn_get(K, hd + d, plain);
        walk_touch(next, later, 2 * d * size, 2 * VL * size);
#pragma GCC unroll 8
        for (int i = 0; i < WALK_Q; i++) {
            vf one = vf_load(x[i] + d);
            V_KEEP(one); /* else each product loads it again */
            acc[2 * i] = vf_fma(one, even, acc[2 * i]);
            acc[2 * i + 1] = vf_fma(one, odd, acc[2 * i + 1]);
        }
    }
    const vf sums = attn_sums(acc);
#pragma GCC unroll 8
    for (int i = 0; i < WALK_Q; i++)
        memcpy(s + i * ATTN_TILE, (const float *)&sums + 2 * i, 2 * sizeof *s);
}

/* y += WALK_P rows of V times weights p[query][row], for half of the queries. Touches half as many rows at `next`. */
FM_INLINE void walk_values(float (*y)[ATTN_DIMS], const float *p, const uint8_t *V, int64_t hd, const uint8_t *next,
                           const uint8_t *later, fm_quant plain)
{
    vf w[WALK_Q / 2][WALK_P];
    const int64_t size = plain_bytes(plain);
#pragma GCC unroll 4
    for (int i = 0; i < WALK_Q / 2; i++)
#pragma GCC unroll 4
        for (int t = 0; t < WALK_P; t++) {
            w[i][t] = vf_set(p[i * ATTN_TILE + t]);
            V_KEEP(w[i][t]);
        }
    for (int64_t d = 0; d < hd; d += VL) {
        vf v[WALK_P];
#pragma GCC unroll 4
        for (int t = 0; t < WALK_P; t++)
            v[t] = attn_get(V, t * hd + d, plain);
        walk_touch(next, later, WALK_P / 2 * d * size, WALK_P / 2 * VL * size);
#pragma GCC unroll 4
        for (int i = 0; i < WALK_Q / 2; i++) {
            vf sum = vf_load(y[i] + d);
#pragma GCC unroll 4
            for (int t = 0; t < WALK_P; t++)
                sum = vf_fma(w[i][t], v[t], sum);
            vf_store(y[i] + d, sum);
        }
    }
}

/* A tile: the scores of K's positions, to turn `turn`, and the values of V's, with the weights of the other turn; K or V
 * may be NULL. last: nothing of the part comes after it, so what is touched must lie within it. */
FM_INLINE void walk_tile(walk *w, int turn, const uint8_t *K, const uint8_t *V, int64_t hd, bool last, fm_quant plain)
{
    const int64_t row = hd * plain_bytes(plain);
    for (int64_t t = 0; t < ATTN_TILE; t += WALK_P)
        for (int half = 0; half < 2; half++) {
            const int64_t now = t + half * WALK_P / 2, k = now + WALK_P / 2, v = now + WALK_P;
            if (K)
                walk_scores(w->x, K + now * row, hd, w->s[turn][0] + now, K + (last && k == ATTN_TILE ? now : k) * row,
                            K + k * row, plain);
            if (V)
                walk_values(w->y + half * WALK_Q / 2, w->s[1 - turn][half * WALK_Q / 2] + t, V + t * row, hd,
                            V + (last && v >= ATTN_TILE ? now : v) * row, V + v * row, plain);
        }
}

/* attn_softmax of all queries, a step of it for all before the next: each waits long for its maximum. Whether sums so far
 * are to shrink, and each query's by what. */
FM_INLINE bool walk_softmax(attn_query *q, float (*s)[ATTN_TILE], float scale, float *by)
{
    float now[WALK_Q];
    bool shrinks = false;
#pragma GCC unroll 8
    for (int i = 0; i < WALK_Q; i++) {
        vf top = vf_set(q[i].top);
#pragma GCC unroll 4
        for (int j = 0; j < ATTN_TILE; j += VL)
            top = vf_max(vf_load(s[i] + j) * scale, top);
        now[i] = vf_top(top);
    }
    for (int i = 0; i < WALK_Q; i++) {
        by[i] = 1;
        if (now[i] > q[i].top) {
            by[i] = vf_exp_down(vf_set(q[i].top) - vf_set(now[i]))[0]; /* first tile: e^-inf = 0 */
            q[i].total *= by[i];
            q[i].top = now[i];
            shrinks = true;
        }
    }
#pragma GCC unroll 2
    for (int i = 0; i < WALK_Q; i++) {
        const vf shift = vf_set(now[i] == -INFINITY ? 0 : now[i]); /* all scores -inf: weights 0, the result is NaN */
        vf total = {0};
#pragma GCC unroll 4
        for (int j = 0; j < ATTN_TILE; j += VL) {
            const vf p = vf_exp_down(vf_load(s[i] + j) * scale - shift);
            vf_store(s[i] + j, p);
            total += p;
        }
        q[i].total += vf_sum(total);
    }
    return shrinks;
}

FM_INLINE void walk_shrink(walk *w, const float *by, int64_t hd)
{
    for (int i = 0; i < WALK_Q; i++)
        for (int64_t d = 0; d < hd && by[i] < 1; d += VL)
            vf_store(w->y[i] + d, vf_load(w->y[i] + d) * by[i]);
}

/* The whole tiles of a part that begins at t0; returns where they end. The queries' parts are set. */
FM_INLINE int64_t walk_part(attn_query *q, const fm_kv_head *kv, int64_t t0, int64_t hd, float scale, fm_quant plain)
{
    walk w;
    const int64_t tile = ATTN_TILE * hd * plain_bytes(plain), left = q->n_pos - t0;
    const int64_t n = (left < FM_ATTN_PART ? left : FM_ATTN_PART) / ATTN_TILE;
    const uint8_t *K = (const uint8_t *)kv->k + t0 / ATTN_TILE * tile;
    const uint8_t *V = (const uint8_t *)kv->v + t0 / ATTN_TILE * tile;
    for (int i = 0; i < WALK_Q; i++) {
        memcpy(w.x[i], q[i].q, (size_t)hd * sizeof w.x[i][0]);
        memset(w.y[i], 0, (size_t)hd * sizeof w.y[i][0]);
    }
    for (int64_t i = 0; i < n; i++, K += tile) {
        if (i == 0) {
            walk_tile(&w, 0, K, NULL, hd, n == 1, plain);
        } else {
            walk_tile(&w, i % 2, K, V, hd, i + 1 == n, plain);
            V += tile;
        }
        float by[WALK_Q];
        if (walk_softmax(q, w.s[i % 2], scale, by))
            walk_shrink(&w, by, hd);
    }
    if (n > 0)
        walk_tile(&w, n % 2, NULL, V, hd, true, plain);
    for (int i = 0; i < WALK_Q; i++)
        memcpy(q[i].part, w.y[i], (size_t)hd * sizeof w.y[i][0]);
    return t0 + n * ATTN_TILE;
}

#endif
