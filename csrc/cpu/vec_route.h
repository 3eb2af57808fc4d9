/* Owns: the choice of experts over vec.h. Scores become integers that sort like the floats; the best of each vector is
 * kept, so one choice costs a look at n/VL numbers and one vector. Ties go to the lower id. */
#ifndef FM_CPU_VEC_ROUTE_H
#define FM_CPU_VEC_ROUTE_H

#include <assert.h>

#include "cpu/kernels.h"
#include "cpu/vec.h"

enum { ROUTE_TAKEN = INT32_MIN, ROUTE_BLOCKS = 64 };

FM_INLINE int32_t route_key(float x)
{
    int32_t i;
    x += 0.0f; /* -0 sorts as 0 */
    memcpy(&i, &x, sizeof i);
    i = i >= 0 ? i : (int32_t)(i ^ 0x7fffffff);
    return x != x ? (int32_t)0x807fffff : i; /* NaN as -inf: stays in bounds until the caller refuses it */
}

/* Keys live in the caller's scratch, which holds floats: they are read and written as bytes. */
FM_INLINE int32_t key_at(const float *key, int64_t i) { return (int32_t)dword_at(key + i); }

FM_INLINE int32_t route_best(const float *key, int64_t n)
{
    int32_t best = ROUTE_TAKEN, lane[VL];
    vi top = (vi)vu_set((uint32_t)ROUTE_TAKEN);
    int64_t i = 0;
    for (; i + VL <= n; i += VL) {
        const vi k = (vi)vu_load(key + i), more = k > top;
        top = (k & more) | (top & ~more);
    }
    memcpy(lane, &top, sizeof lane);
    for (int x = 0; x < VL; x++)
        best = lane[x] > best ? lane[x] : best;
    for (; i < n; i++)
        best = key_at(key, i) > best ? key_at(key, i) : best;
    return best;
}

/* The k <= n largest keys by falling key, then rising id. */
FM_INLINE void route_pick(float *key, int64_t n, int64_t k, int32_t *ids)
{
    const int32_t taken = ROUTE_TAKEN;
    const int64_t block = (n + ROUTE_BLOCKS * VL - 1) / (ROUTE_BLOCKS * VL) * VL, nb = (n + block - 1) / block;
    int32_t top[ROUTE_BLOCKS];
    for (int64_t v = 0; v < nb; v++)
        top[v] = route_best(key + v * block, n - v * block < block ? n - v * block : block);
    for (int64_t j = 0; j < k; j++) {
        int64_t at = 0;
        for (int64_t v = 1; v < nb; v++)
            at = top[v] > top[at] ? v : at;
        int64_t i = at * block;
        while (key_at(key, i) != top[at])
            i++;
        ids[j] = (int32_t)i;
        memcpy(key + i, &taken, sizeof taken);
        top[at] = route_best(key + at * block, n - at * block < block ? n - at * block : block);
    }
}

/* Experts of the groups that lose become -inf. */
FM_STATIC void route_groups(const fm_route_args *a, float *choice)
{
    const int64_t per = a->n_experts / a->n_group;
    double sum[256];
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
        sum[g] = (double)top1 + (per > 1 ? (double)top2 : 0);
    }
    for (int64_t g = 0; g < a->n_group; g++) {
        int64_t better = 0;
        for (int64_t o = 0; o < a->n_group; o++)
            better += sum[o] > sum[g] || (sum[o] == sum[g] && o < g);
        if (better >= a->topk_group)
            for (int64_t e = g * per; e < (g + 1) * per; e++)
                choice[e] = -INFINITY;
    }
}

/* scores[e] = sigmoid(logits[e]) through f64, so that it rounds as the reference's does: the order of near equal scores
 * hangs on it. e^-|x| = 2^k e^r, |r| <= ln2/2, by its Taylor series to r^13/13! (truncation < 2^-52). */
enum { ROUTE_VB = VB == 64 ? 32 : VB }; /* GCC halves what it converts to 64 bytes */
typedef double route_vd __attribute__((vector_size(ROUTE_VB)));
typedef int64_t route_vl __attribute__((vector_size(ROUTE_VB)));
typedef float route_vf __attribute__((vector_size(ROUTE_VB / 2)));
enum { ROUTE_VD = ROUTE_VB / 8 };

FM_INLINE route_vf route_sigmoids(route_vf logits)
{
    static const double term[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                  1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      1.0 / 2,     1, 1};
    const route_vd x = __builtin_convertvector(logits, route_vd), zero = {0}, one = zero + 1;
    const route_vl below = x < zero;
    route_vd a = (route_vd)((route_vl)x & INT64_MAX); /* |x|; beyond 708 the score is 0 or 1 in f32 */
    a = (route_vd)(((route_vl)a & (a < zero + 708.0)) | ((route_vl)(zero + 708.0) & (a >= zero + 708.0)) |
                   ((route_vl)a & (a != a)));
    const route_vd magic = zero + 0x1.8p52, shifted = a * -1.44269504088896340736 + magic, k = shifted - magic;
    const route_vd r = (-a - k * 0x1.62e42feep-1) - k * 0x1.a39ef35793c76p-33;
    route_vd p = zero + 1.0 / 6227020800;
    for (int i = 0; i < 13; i++)
        p = p * r + term[i];
    const route_vd e = p * (route_vd)(((route_vl)shifted - (route_vl)magic + 1023) << 52);
    const route_vd top = (route_vd)(((route_vl)e & below) | ((route_vl)one & ~below));
    return __builtin_convertvector(top / (one + e), route_vf);
}

FM_INLINE void route_scores(const float *logits, int64_t n, float *scores)
{
    for (int64_t e = 0; e < n; e += ROUTE_VD) {
        const size_t bytes = (size_t)(n - e < ROUTE_VD ? n - e : ROUTE_VD) * sizeof *scores;
        route_vf x = {0};
        memcpy(&x, logits + e, bytes);
        x = route_sigmoids(x);
        memcpy(scores + e, &x, bytes);
    }
}

FM_INLINE double route_sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

FM_STATIC void route_vec(const fm_route_args *a, const float *logits, int32_t *ids, float *weights, float *scratch)
{
    double p[64], max = -INFINITY, sum = 0, all = 0;
    const int64_t n = a->n_experts;
    assert(a->k <= 64 && a->k <= n);
    const float *choice = logits;
    if (a->sigmoid || a->bias != NULL || a->n_group > 1) {
        if (a->sigmoid)
            route_scores(logits, n, scratch);
        else
            memcpy(scratch, logits, (size_t)n * sizeof *scratch);
        for (int64_t e = 0; e < n; e++) {
            scratch[e] = a->bias ? scratch[e] + a->bias[e] : scratch[e];
            if (scratch[e] != scratch[e])
                scratch[e] = -INFINITY;
        }
        if (a->n_group > 1)
            route_groups(a, scratch);
        choice = scratch;
    }
    for (int64_t e = 0; e < n; e++) {
        const int32_t key = route_key(choice[e]);
        memcpy(scratch + e, &key, sizeof key);
    }
    route_pick(scratch, n, a->k, ids);
    if (!a->sigmoid) {
        vf top = vf_set(-INFINITY);
        for (int64_t e = 0; e + VL <= n; e += VL)
            top = vf_max(vf_load(logits + e), top);
        max = (double)vf_top(top);
        for (int64_t e = n / VL * VL; e < n; e++)
            max = fmax(max, (double)logits[e]);
        if (!a->renorm)
            for (int64_t e = 0; e < n; e++)
                all += exp((double)logits[e] - max);
    }
    for (int64_t j = 0; j < a->k; j++) {
        const double x = (double)logits[ids[j]];
        p[j] = a->sigmoid ? route_sigmoid(x) : exp(x - max);
        sum += p[j];
    }
    const double div = a->renorm ? sum + (double)a->eps : a->sigmoid ? 1 : all;
    for (int64_t j = 0; j < a->k; j++)
        weights[j] = (float)(p[j] / div * (double)a->scale);
}

FM_STATIC void route_overlay(fm_kernels *k) { k->route = route_vec; }

#endif
