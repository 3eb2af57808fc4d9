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

FM_INLINE double route_sigmoid(double x) { return x >= 0 ? 1 / (1 + exp(-x)) : exp(x) / (1 + exp(x)); }

FM_STATIC void route_vec(const fm_route_args *a, const float *logits, int32_t *ids, float *weights, float *scratch)
{
    double p[64], max = -INFINITY, sum = 0, all = 0;
    const int64_t n = a->n_experts;
    assert(a->k <= 64 && a->k <= n);
    const float *choice = logits;
    if (a->sigmoid || a->bias != NULL || a->n_group > 1) {
        for (int64_t e = 0; e < n; e++) {
            const float s = a->sigmoid ? (float)route_sigmoid((double)logits[e]) : logits[e];
            scratch[e] = a->bias ? s + a->bias[e] : s;
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
