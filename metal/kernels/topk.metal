// Router (scores, groups, top-k, weights) and greedy choice. Comparisons are on integer keys that
// keep the order of floats, so that NaN and fast-math cannot change the tie rule: larger value
// first, lower index on equality. Key 0 is below every number: masked, or already taken.
#include "common.h"

inline uint order_key(float x) {
    const uint bits = as_type<uint>(x), magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) // NaN: as minus infinity; the host refuses such rows
        return 0x007fffffu;
    if (magnitude == 0)
        return 0x80000000u; // -0 equals +0
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

inline float key_value(uint key) {
    return as_type<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Keys of experts outside the topk_group best groups become 0. A group's score is the sum of its
// two best choices.
inline void mask_groups(threadgroup uint *keys, threadgroup float *best, constant fm_topk_args &a,
                        uint lane) {
    const uint per = a.n_experts / a.n_group;
    for (uint g = lane; g < a.n_group; g += FM_WIDTH) {
        uint top1 = 0x007fffffu, top2 = 0x007fffffu;
        for (uint e = g * per; e < (g + 1) * per; e++) {
            top2 = keys[e] > top1 ? top1 : max(top2, keys[e]);
            top1 = max(top1, keys[e]);
        }
        best[g] = key_value(top1) + (per > 1 ? key_value(top2) : 0.0f);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint g = lane; g < a.n_group; g += FM_WIDTH) {
        uint better = 0;
        for (uint o = 0; o < a.n_group; o++)
            better += best[o] > best[g] || (best[o] == best[g] && o < g) ? 1u : 0u;
        if (better >= a.topk_group)
            for (uint e = g * per; e < (g + 1) * per; e++)
                keys[e] = 0x007fffffu; // minus infinity: legal when too few experts are left
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
}

// ids and weights [n, k] from logits [n, n_experts]. Threads: FM_WIDTH. Groups: n rows.
kernel void route(device const float *logits_all [[buffer(0)]],
                  device const float *bias [[buffer(1)]],
                  device int *ids [[buffer(2)]],
                  device float *weights [[buffer(3)]],
                  constant fm_topk_args &a [[buffer(4)]],
                  uint row [[threadgroup_position_in_grid]],
                  uint lane [[thread_index_in_simdgroup]]) {
    threadgroup uint keys[FM_ROUTE_MAX_EXPERTS];
    threadgroup float best[FM_ROUTE_MAX_GROUPS];
    device const float *logits = logits_all + ulong(row) * a.n_experts;
    float top = -INFINITY;
    for (uint e = lane; e < a.n_experts; e += FM_WIDTH) {
        const float s = a.sigmoid ? sigmoid(logits[e]) : logits[e];
        keys[e] = order_key(a.has_bias ? s + bias[e] : s);
        top = max(top, logits[e]);
    }
    top = simd_max(top);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (a.n_group > 1)
        mask_groups(keys, best, a, lane);
    float sum = 0.0f;
    for (uint j = 0; j < a.k; j++) {
        uint key = 0, id = lane < a.n_experts ? lane : 0;
        for (uint e = lane; e < a.n_experts; e += FM_WIDTH)
            if (keys[e] > key) {
                key = keys[e];
                id = e;
            }
        const uint most = simd_max(key);
        const uint chosen = simd_min(key == most ? id : 0xffffffffu);
        if (chosen % FM_WIDTH == lane)
            keys[chosen] = 0; // only this lane ever reads it
        const float p = a.sigmoid ? sigmoid(logits[chosen]) : exp(logits[chosen] - top);
        sum += p;
        if (lane == 0) {
            ids[row * a.k + j] = int(chosen);
            weights[row * a.k + j] = p;
        }
    }
    float div = a.renorm ? sum + a.eps : 1.0f;
    if (!a.sigmoid && !a.renorm) {
        float all = 0.0f;
        for (uint e = lane; e < a.n_experts; e += FM_WIDTH)
            all += exp(logits[e] - top);
        div = simd_sum(all);
    }
    if (lane == 0)
        for (uint j = 0; j < a.k; j++)
            weights[row * a.k + j] = weights[row * a.k + j] / div * a.scale;
}

// The id of the largest of n_valid logits; padding ids are never chosen. Group: one row.
// Threads: FM_NORM_THREADS.
kernel void argmax_rows(device const float *logits [[buffer(0)]],
                        device int *ids [[buffer(1)]],
                        constant fm_argmax_args &a [[buffer(2)]],
                        uint row [[threadgroup_position_in_grid]],
                        uint tid [[thread_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]],
                        uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup uint part_key[FM_NORM_THREADS / FM_WIDTH], part_id[FM_NORM_THREADS / FM_WIDTH];
    uint key = 0, id = 0xffffffffu;
    for (uint c = tid; c < a.n_valid; c += FM_NORM_THREADS) {
        const uint k = order_key(logits[ulong(row) * a.n_cols + c]);
        if (k > key) {
            key = k;
            id = c;
        }
    }
    const uint most = simd_max(key), first = simd_min(key == most ? id : 0xffffffffu);
    if (lane == 0) {
        part_key[sg] = most;
        part_id[sg] = first;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid == 0) {
        for (uint i = 0; i < FM_NORM_THREADS / FM_WIDTH; i++)
            if (part_key[i] > key || (part_key[i] == key && part_id[i] < id)) {
                key = part_key[i];
                id = part_id[i];
            }
        ids[row] = int(id);
    }
}
