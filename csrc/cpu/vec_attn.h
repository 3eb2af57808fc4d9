/* Owns: attention over vec.h, with online softmax over tiles of ATTN_TILE positions that start at multiples of it, in
 * parts of FM_ATTN_PART that are summed apart and then put together in order. So a query's result depends neither on
 * which other queries are in the call nor on who computes which part. A "query" is one head of one row; all queries of
 * a call read the same KV head.
 *   scores: vec_attn_scores.h. The few queries of one row take another way through K and V: vec_attn_walk.h.
 *   values: lanes = dims. Sums of p * V are f32; a tile adds its positions in rising order.
 * ATTN_TILES, if defined, names a function that may do a part in another way, always the same for a format and head_dim. */
#ifndef FM_CPU_VEC_ATTN_H
#define FM_CPU_VEC_ATTN_H

#include "cpu/vec_attn_scores.h"

enum {
    ATTN_VB = FM_VEC_ISA == FM_VEC_AVX2 ? 2 : 4, /* queries, and vectors, per block of values */
    ATTN_FEW = 8,     /* queries up to which V is used where it lies */
    ATTN_FEW_VB = FM_VEC_ISA == FM_VEC_AVX2 ? 4 : 8, /* queries per block then, of ATTN_FEW_NV vectors */
    ATTN_FEW_NV = 2,
};

FM_INLINE void attn_scale(float *y, int64_t n, vf by)
{
    int64_t d = 0;
    for (; d + VL <= n; d += VL)
        vf_store(y + d, vf_load(y + d) * by);
    if (d < n)
        vf_store_part(y + d, vf_load_part(y + d, n - d) * by, n - d);
}

/* Scores to weights exp(score - top) of the tile's first `have` positions, the others 0; rescales the part so far. */
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
        const vf p = vf_exp_down(vf_load(s + i) - shift);
        vf_store(s + i, p);
        total += p;
    }
    if (now > q->top) {
        const vf shrink = vf_exp_down(vf_set(q->top) - shift); /* first tile: e^-inf = 0 */
        attn_scale(q->part, hd, shrink);
        q->total *= shrink[0];
        q->top = now;
    }
    q->total += vf_sum(total);
}

/* part[i] += sum_t p[i][t] * V[t] over the tile's first n positions; dims d .. d + NV*VL, which begin at element `at` of
 * V's first row, rows ld apart. Q, NV, plain are constants; part < VL only with NV = 1. Fetches `bytes` per position
 * from next on. */
FM_INLINE void attn_values(const attn_query *q, const float (*p)[ATTN_TILE], const void *V, int64_t at, int64_t ld,
                           int64_t d, int64_t n, int Q, int NV, int64_t part, fm_quant plain,
                           const attn_next *next, int64_t from, int64_t bytes)
{
    vf acc[8][4];
    const float *w = p[0];
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
        for (int x = 0; x < NV; x++)
            acc[i][x] = part == VL ? vf_load(q[i].part + d + x * VL) : vf_load_part(q[i].part + d, part);
    for (int64_t t = 0; t < n; t++, w++) {
        vf v[4];
        attn_fetch(next, from + t * bytes, bytes);
#pragma GCC unroll 4
        for (int x = 0; x < NV; x++)
            v[x] = part == VL ? attn_get(V, at + t * ld + x * VL, plain) : attn_get_part(V, at + t * ld, part, plain);
#pragma GCC unroll 8
        for (int i = 0; i < Q; i++) {
            const vf one = vf_set(w[i * ATTN_TILE]);
#pragma GCC unroll 4
            for (int x = 0; x < NV; x++)
                acc[i][x] = vf_fma(one, v[x], acc[i][x]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Q; i++)
#pragma GCC unroll 4
        for (int x = 0; x < NV; x++) {
            if (part == VL)
                vf_store(q[i].part + d + x * VL, acc[i][x]);
            else
                vf_store_part(q[i].part + d, acc[i][x], part);
        }
}

FM_INLINE int64_t attn_have(const attn_query *q, int64_t t0)
{
    return q->n_pos - t0 < 0 ? 0 : q->n_pos - t0 < ATTN_TILE ? q->n_pos - t0 : ATTN_TILE;
}

/* A column block of V for all queries, up to QB at a time (a constant, as NV); the first block of queries fetches. */
FM_INLINE void attn_columns(const attn_query *q, int64_t nq, const float (*p)[ATTN_TILE], const void *V, int64_t at,
                            int64_t ld, int64_t d, int64_t t0, int QB, int NV, int64_t part, fm_quant plain,
                            const attn_next *next, int64_t from, int64_t bytes)
{
    for (int64_t i = 0; i < nq; bytes = 0) {
        const int64_t have = attn_have(&q[i], t0);
        if (i + QB <= nq && attn_have(&q[i + QB - 1], t0) == have) {
            attn_values(q + i, p + i, V, at, ld, d, have, QB, NV, part, plain, next, from, bytes);
            i += QB;
        } else {
            attn_values(q + i, p + i, V, at, ld, d, have, 1, NV, part, plain, next, from, bytes);
            i++;
        }
    }
}

/* Adds the tile's values. For many queries a column block is decoded once, and lies together in L1: in place its rows
 * would fall into few cache sets. */
FM_INLINE void attn_tile_values(const attn_query *q, int64_t nq, const float (*p)[ATTN_TILE], const fm_kv_head *kv,
                                int64_t hd, int64_t t0, const attn_next *next, fm_quant plain)
{
    _Alignas(64) float v[ATTN_TILE * ATTN_VB * VL];
    const int64_t n = attn_have(&q[nq - 1], t0), width = ATTN_VB * VL, few = ATTN_FEW_NV * VL;
    const int64_t size = plain_bytes(plain);
    const int64_t rest = ATTN_TILE * hd * size / 2; /* the other half; the first was fetched with the scores */
    int64_t d = 0;
    for (; nq <= ATTN_FEW && d + few <= hd; d += few)
        attn_columns(q, nq, p, kv->v, t0 * hd + d, hd, d, t0, ATTN_FEW_VB, ATTN_FEW_NV, VL, plain,
                     next, rest + d * ATTN_TILE * size / 2, few * size / 2);
    for (; d + width <= hd; d += width) {
        for (int64_t t = 0; t < n; t++) {
            attn_fetch(next, rest + (d * ATTN_TILE + t * width) * size / 2, width * size / 2);
#pragma GCC unroll 4
            for (int x = 0; x < ATTN_VB; x++)
                vf_store(v + t * width + x * VL, attn_get(kv->v, (t0 + t) * hd + d + x * VL, plain));
        }
        attn_columns(q, nq, p, v, 0, width, d, t0, ATTN_VB, ATTN_VB, VL, FM_QUANT_F32, next, 0, 0);
    }
    for (; d + VL <= hd; d += VL)
        attn_columns(q, nq, p, kv->v, t0 * hd + d, hd, d, t0, ATTN_VB, 1, VL, plain, next, 0, 0);
    if (d < hd)
        attn_columns(q, nq, p, kv->v, t0 * hd + d, hd, d, t0, ATTN_VB, 1, hd - d, plain, next, 0, 0);
}

/* The way of up to ATTN_MAX queries, by rising n_pos, through a part: a tile of positions t0 .. end at a time, for the n
 * queries from `live` on that reach it. */
typedef struct attn_walk {
    attn_query *live;
    int64_t n, t0, end;
    attn_next next;
} attn_walk;

FM_INLINE attn_walk attn_part_begin(attn_query *q, int64_t nq, int64_t t0, int64_t hd)
{
    for (int64_t i = 0; i < nq; i++) {
        q[i].top = -INFINITY;
        q[i].total = 0;
        memset(q[i].part, 0, (size_t)hd * sizeof *q[i].part);
    }
    return (attn_walk){.live = q, .n = nq, .t0 = t0, .end = t0};
}

/* On to the next tile; false at the end of the part. */
FM_INLINE bool attn_part_step(attn_walk *w, const fm_kv_head *kv, int64_t hd, fm_quant plain)
{
    const int64_t all = w->live[w->n - 1].n_pos, t0 = w->end;
    if (t0 == all || (t0 > w->t0 && t0 % FM_ATTN_PART == 0))
        return false;
    while (w->live->n_pos <= t0) /* queries that end before this tile */
        w->live++, w->n--;
    const int64_t skip = (t0 + (t0 + ATTN_TILE < all ? ATTN_TILE : 0)) * hd * plain_bytes(plain);
    w->next = (attn_next){(const uint8_t *)kv->k + skip, (const uint8_t *)kv->v + skip};
    w->t0 = t0;
    w->end = all < t0 + ATTN_TILE ? all : t0 + ATTN_TILE;
    return true;
}

FM_INLINE void attn_part_end(const attn_query *q, int64_t nq, int64_t hd)
{
    const int64_t at = fm_attn_part_floats(hd) - 16;
    for (int64_t i = 0; i < nq; i++) {
        q[i].part[at] = q[i].top;
        q[i].part[at + 1] = q[i].total;
    }
}

#if FM_VEC_ISA == FM_VEC_AVX512
#include "cpu/vec_attn_walk.h"
#define ATTN_WALKS(q, nq, hd)                                                                      \
    ((nq) == WALK_Q && (q)[0].n_pos == (q)[(nq) - 1].n_pos && (hd) % VL == 0 && (hd) <= ATTN_DIMS)
#endif

/* One pass of nq <= ATTN_MAX queries over K and V from position t0, where a part begins. */
FM_INLINE void attn_part(attn_query *q, int64_t nq, const fm_kv_head *kv, int64_t t0, int64_t hd, float scale,
                         fm_quant plain)
{
    _Alignas(64) float s[ATTN_MAX][ATTN_TILE];
    attn_walk w = attn_part_begin(q, nq, t0, hd);
#ifdef ATTN_WALKS
    if (ATTN_WALKS(q, nq, hd)) { /* whole tiles; another one is the last of all */
        w.end = walk_part(q, kv, t0, hd, scale, plain);
        w.t0 = w.end > t0 ? t0 : w.end;
    }
#endif
    while (attn_part_step(&w, kv, hd, plain)) {
        attn_scores(w.live, w.n, kv, hd, w.t0, w.end, s, &w.next, plain);
        for (int64_t i = 0; i < w.n; i++)
            attn_softmax(&w.live[i], s[i], attn_have(&w.live[i], w.t0), scale, hd);
        attn_tile_values(w.live, w.n, (const float (*)[ATTN_TILE])s, kv, hd, w.t0, &w.next, plain);
    }
    attn_part_end(q, nq, hd);
}

#define ATTN_FORMATS(X) X(F32) X(F16) X(BF16)
#define ATTN_PART(ID)                                                                              \
    static __attribute__((unused, noinline)) void attn_part_##ID(                                  \
        attn_query *q, int64_t nq, const fm_kv_head *kv, int64_t t0, int64_t hd, float scale)      \
    {                                                                                              \
        attn_part(q, nq, kv, t0, hd, scale, FM_QUANT_##ID);                                        \
    }
ATTN_FORMATS(ATTN_PART)
#undef ATTN_PART

/* The queries that reach position t0; they are the last ones. */
FM_INLINE void attn_part_any(attn_query *q, int64_t nq, const fm_kv_head *kv, int64_t t0, int64_t hd, float scale)
{
    while (nq > 0 && q->n_pos <= t0)
        q++, nq--;
    if (nq == 0)
        return;
#ifdef ATTN_TILES
    if (ATTN_TILES(q, nq, kv, t0, hd, scale))
        return;
#endif
    switch (kv->format) {
#define ATTN_CASE(ID)                                                                              \
    case FM_QUANT_##ID: attn_part_##ID(q, nq, kv, t0, hd, scale); break;
        ATTN_FORMATS(ATTN_CASE)
#undef ATTN_CASE
    default: break; /* the engine lets no other format come here */
    }
}

/* y, total = what was so far and a part more. top and total are q's own here. */
FM_INLINE void attn_fold(attn_query *q, const float *part, int64_t hd)
{
    const int64_t at = fm_attn_part_floats(hd) - 16;
    const float now = part[at] > q->top ? part[at] : q->top, shift = now == -INFINITY ? 0 : now;
    const vf keep = vf_exp_down(vf_set(q->top - shift)), add = vf_exp_down(vf_set(part[at] - shift));
    int64_t d = 0;
    for (; d + VL <= hd; d += VL)
        vf_store(q->y + d, vf_fma(vf_load(part + d), add, vf_load(q->y + d) * keep));
    if (d < hd)
        vf_store_part(q->y + d, vf_fma(vf_load_part(part + d, hd - d), add, vf_load_part(q->y + d, hd - d) * keep),
                      hd - d);
    q->total = q->total * keep[0] + part[at + 1] * add[0];
    q->top = now;
}

FM_INLINE void attn_begin(attn_query *q, int64_t hd)
{
    q->top = -INFINITY;
    q->total = 0;
    memset(q->y, 0, (size_t)hd * sizeof *q->y);
}

FM_INLINE void attn_finish(const attn_query *q, int64_t hd)
{
    const vf inv = vf_set(1 / q->total);
    int64_t d = 0;
    for (; d + VL <= hd; d += VL) {
        const vf y = vf_load(q->y + d) * inv;
        vf_store(q->y + d, q->gate ? y * vf_sigmoid(vf_load(q->gate + d)) : y);
    }
    if (d < hd) {
        const vf y = vf_load_part(q->y + d, hd - d) * inv;
        vf_store_part(q->y + d, q->gate ? y * vf_sigmoid(vf_load_part(q->gate + d, hd - d)) : y, hd - d);
    }
}

/* Queries from .. from + at most ATTN_MAX of rows r0 <= r < r1, rows first, then the KV head's heads. */
FM_INLINE int64_t attn_gather(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, int64_t n_before,
                              int64_t from, attn_query *q)
{
    const int64_t per = a->n_heads / a->n_kv_heads, all = (r1 - r0) * per - from;
    const int64_t n = all < ATTN_MAX ? all : ATTN_MAX;
    int64_t r = r0 + from / per, h = from % per;
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = r * a->ld_q + (kv_head * per + h) * a->ld_q_head;
        q[i] = (attn_query){.q = a->q + at,
                            .gate = a->gate ? a->gate + at : NULL,
                            .y = a->y + r * a->ld_y + (kv_head * per + h) * a->head_dim,
                            .n_pos = n_before + r + 1};
        h = h + 1 < per ? h + 1 : 0;
        r += h == 0;
    }
    return n;
}

FM_STATIC void attend_rows_vec(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, const fm_kv_head *kv,
                               int64_t n_before, float *scratch)
{
    attn_query q[ATTN_MAX], run[ATTN_MAX];
    const int64_t all = (r1 - r0) * (a->n_heads / a->n_kv_heads), hd = a->head_dim, ld = fm_attn_part_floats(hd);
    for (int64_t from = 0; from < all; from += ATTN_MAX) {
        const int64_t n = attn_gather(a, r0, r1, kv_head, n_before, from, q);
        for (int64_t i = 0; i < n; i++) {
            attn_begin(&q[i], hd);
            q[i].part = scratch + i * ld;
        }
        for (int64_t t0 = 0; t0 < q[n - 1].n_pos; t0 += FM_ATTN_PART) {
            memcpy(run, q, (size_t)n * sizeof *q); /* a part has a maximum and a total of its own */
            attn_part_any(run, n, kv, t0, hd, a->scale);
            for (int64_t i = 0; i < n; i++)
                if (q[i].n_pos > t0)
                    attn_fold(&q[i], q[i].part, hd);
        }
        for (int64_t i = 0; i < n; i++)
            attn_finish(&q[i], hd);
    }
}

FM_STATIC void attend_part_vec(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, const fm_kv_head *kv,
                               int64_t n_before, int64_t part, float *out)
{
    attn_query q[ATTN_MAX];
    const int64_t all = (r1 - r0) * (a->n_heads / a->n_kv_heads), ld = fm_attn_part_floats(a->head_dim);
    for (int64_t from = 0; from < all; from += ATTN_MAX) {
        const int64_t n = attn_gather(a, r0, r1, kv_head, n_before, from, q);
        for (int64_t i = 0; i < n; i++)
            q[i].part = out + (from + i) * ld;
        attn_part_any(q, n, kv, part * FM_ATTN_PART, a->head_dim, a->scale);
    }
}

FM_STATIC void attend_merge_vec(const fm_attn_args *a, int64_t r0, int64_t r1, int64_t kv_head, int64_t n_before,
                                const float *parts, int64_t stride)
{
    attn_query q[ATTN_MAX];
    const int64_t all = (r1 - r0) * (a->n_heads / a->n_kv_heads), hd = a->head_dim, ld = fm_attn_part_floats(hd);
    for (int64_t from = 0; from < all; from += ATTN_MAX) {
        const int64_t n = attn_gather(a, r0, r1, kv_head, n_before, from, q);
        for (int64_t i = 0; i < n; i++) {
            attn_begin(&q[i], hd);
            for (int64_t p = 0; p * FM_ATTN_PART < q[i].n_pos; p++)
                attn_fold(&q[i], parts + p * stride + (from + i) * ld, hd);
            attn_finish(&q[i], hd);
        }
    }
}

FM_STATIC void kv_store_vec(fm_quant format, const float *x, int64_t n, void *out)
{
    uint8_t *to = out;
    if (format == FM_QUANT_F32) {
        memcpy(to, x, (size_t)n * sizeof *x);
        return;
    }
    for (int64_t i = 0; i < n; i += VL) {
        const int64_t part = n - i < VL ? n - i : VL;
        const vf v = part == VL ? vf_load(x + i) : vf_load_part(x + i, part);
        const vh h = format == FM_QUANT_F16 ? vf_to_f16(v) : vf_to_bf16(v);
        memcpy(to + 2 * i, &h, part == VL ? sizeof h : (size_t)part * 2);
    }
}

FM_STATIC void attn_overlay(fm_kernels *k)
{
    k->kv_store = kv_store_vec;
    k->attend_rows = attend_rows_vec;
    k->attend_part = attend_part_vec;
    k->attend_merge = attend_merge_vec;
}

#endif
