// Gated attention over a cache [n_kv_heads, capacity, head_dim] f32, with online softmax.
// q and gate of row r, head h lie at + r * ld_q + h * ld_q_head; query head h reads KV head
// h / (n_heads / n_kv_heads). Bound: 2^-18 * max|v| per element.
#include "common.h"

// New k and v rows into the cache, at positions pos0 + t. Grid: (n_kv_heads * head_dim, n).
kernel void kv_store(device const float *k [[buffer(0)]],
                     device const float *v [[buffer(1)]],
                     device float *k_cache [[buffer(2)]],
                     device float *v_cache [[buffer(3)]],
                     constant fm_store_args &a [[buffer(4)]],
                     uint2 at [[thread_position_in_grid]]) {
    if (at.x >= a.n_kv_heads * a.head_dim || at.y >= a.n)
        return;
    const uint g = at.x / a.head_dim, d = at.x % a.head_dim;
    const ulong from = ulong(a.row0 + at.y) * a.ld + at.x;
    const ulong to = (ulong(g) * a.capacity + a.pos0 + at.y) * a.head_dim + d;
    k_cache[to] = k[from];
    v_cache[to] = v[from];
}

constant uint LANE_DIMS = FM_ATTN_MAX_DIM / FM_WIDTH; // dims a lane may own: d = lane + 32 * i

// A part of a row's positions, for one head: max of the scores, sum of the weights, hd weighted sums.
inline device float *part_of(device float *parts, constant fm_attend_args &a, uint row, uint h,
                             uint part) {
    return parts + ((ulong(row) * a.n_heads + h) * a.max_parts + part) * (FC_DIM + 2);
}

inline void attend_store(float r, ulong gate, device const float *gate_all, bool has_gate,
                         device float *y) {
    *y = has_gate ? r * sigmoid(gate_all[gate]) : r;
}

// One query row, head and part of the positions per threadgroup; simdgroup s takes positions s,
// s + 8, ... of them and the partial softmaxes are merged at the end. A row of one part is finished
// here, with the bits that attend_merge would give it.
// Threads: FM_WIDTH * FM_ATTN_SIMDGROUPS. Groups: (heads, rows, most parts of a row).
kernel void attend_rows(device const fm_attn_row *table [[buffer(0)]],
                        device const float *q_all [[buffer(1)]],
                        device const float *gate_all [[buffer(2)]],
                        device float *y_all [[buffer(3)]],
                        constant fm_attend_args &a [[buffer(4)]],
                        device float *parts [[buffer(5)]],
                        uint3 group [[threadgroup_position_in_grid]],
                        uint tid [[thread_index_in_threadgroup]],
                        uint lane [[thread_index_in_simdgroup]],
                        uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup float out[FM_ATTN_SIMDGROUPS * FM_ATTN_MAX_DIM];
    threadgroup float tops[FM_ATTN_SIMDGROUPS], sums[FM_ATTN_SIMDGROUPS];
    device const fm_attn_row &t = table[group.y];
    const uint h = group.x, hd = FC_DIM, g = h / (a.n_heads / a.n_kv_heads);
    const uint p0 = group.z * t.part, end = min(p0 + t.part, t.n_pos), capacity = t.capacity;
    if (p0 >= end)
        return;
    const ulong at = ulong(t.row) * a.ld_q + ulong(h) * a.ld_q_head;
    device const float *k = t.k + ulong(g) * capacity * hd;
    device const float *v = t.v + ulong(g) * capacity * hd;
    float q[LANE_DIMS], o[LANE_DIMS];
#pragma unroll
    for (uint i = 0; i < LANE_DIMS; i++) {
        const uint d = lane + FM_WIDTH * i;
        q[i] = d < hd ? q_all[at + d] * a.scale : 0.0f;
        o[i] = 0.0f;
    }
    float top = -INFINITY, sum = 0.0f;
    for (uint p = p0 + sg; p < end; p += FM_ATTN_SIMDGROUPS) {
        float s = 0.0f;
#pragma unroll
        for (uint i = 0; i < LANE_DIMS; i++)
            if (FM_WIDTH * i < hd && lane + FM_WIDTH * i < hd)
                s = fma(q[i], k[ulong(p) * hd + lane + FM_WIDTH * i], s);
        s = simd_sum(s);
        const float new_top = max(top, s);
        const float shrink = exp(top - new_top), weight = exp(s - new_top);
        top = new_top;
        sum = fma(sum, shrink, weight);
#pragma unroll
        for (uint i = 0; i < LANE_DIMS; i++)
            if (FM_WIDTH * i < hd && lane + FM_WIDTH * i < hd)
                o[i] = fma(o[i], shrink, weight * v[ulong(p) * hd + lane + FM_WIDTH * i]);
    }
    for (uint i = 0; i < LANE_DIMS; i++)
        out[sg * FM_ATTN_MAX_DIM + lane + FM_WIDTH * i] = o[i];
    if (lane == 0) {
        tops[sg] = top;
        sums[sg] = sum;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float all_top = tops[0]; // simdgroup 0 always has the first position
    for (uint s = 1; s < FM_ATTN_SIMDGROUPS; s++)
        all_top = max(all_top, tops[s]);
    float all_sum = 0.0f;
    for (uint s = 0; s < FM_ATTN_SIMDGROUPS; s++)
        all_sum = fma(sums[s], exp(tops[s] - all_top), all_sum);
    const bool whole = t.part >= t.n_pos;
    device float *y = y_all + ulong(t.row) * a.ld_y + h * hd;
    device float *part = part_of(parts, a, group.y, h, group.z);
    for (uint d = tid; d < hd; d += FM_WIDTH * FM_ATTN_SIMDGROUPS) {
        float r = 0.0f;
        for (uint s = 0; s < FM_ATTN_SIMDGROUPS; s++)
            r = fma(out[s * FM_ATTN_MAX_DIM + d], exp(tops[s] - all_top), r);
        if (whole)
            attend_store(r / all_sum, at + d, gate_all, a.has_gate, y + d);
        else
            part[2 + d] = r;
    }
    if (!whole && tid == 0) {
        part[0] = all_top;
        part[1] = all_sum;
    }
}

// The rows that were attended in several parts. Threads: FM_ATTN_MERGE. Groups: (heads, rows).
kernel void attend_merge(device const fm_attn_row *table [[buffer(0)]],
                         device const float *gate_all [[buffer(2)]],
                         device float *y_all [[buffer(3)]],
                         constant fm_attend_args &a [[buffer(4)]],
                         device float *parts [[buffer(5)]],
                         uint2 group [[threadgroup_position_in_grid]],
                         uint tid [[thread_index_in_threadgroup]]) {
    device const fm_attn_row &t = table[group.y];
    const uint h = group.x, hd = FC_DIM, stride = hd + 2, n = (t.n_pos + t.part - 1) / t.part;
    if (n == 1)
        return;
    device const float *part = part_of(parts, a, group.y, h, 0);
    float top = part[0], sum = 0.0f;
    for (uint i = 1; i < n; i++)
        top = max(top, part[i * stride]);
    for (uint i = 0; i < n; i++)
        sum = fma(part[i * stride + 1], exp(part[i * stride] - top), sum);
    const ulong at = ulong(t.row) * a.ld_q + ulong(h) * a.ld_q_head;
    device float *y = y_all + ulong(t.row) * a.ld_y + h * hd;
    for (uint d = tid; d < hd; d += FM_ATTN_MERGE) {
        float r = 0.0f;
        for (uint i = 0; i < n; i++)
            r = fma(part[i * stride + 2 + d], exp(part[i * stride] - top), r);
        attend_store(r / sum, at + d, gate_all, a.has_gate, y + d);
    }
}

constant uint LD_KEY = FM_ATTN_MAX_DIM + 1; // floats; keys of a tile start in different banks

// Rows p0 .. of a cache into a tile; rows at or past `end` become zero.
inline void load_keys(device const float *from, uint p0, uint end, uint hd, uint tid,
                      threadgroup float *tile) {
    for (uint e = tid; e < FM_ATTN_KEYS * hd; e += FM_ATTN_QUERIES * FM_ATTN_KEYS) {
        const uint p = e / hd, d = e % hd;
        tile[p * LD_KEY + d] = p0 + p < end ? from[ulong(p0 + p) * hd + d] : 0.0f;
    }
}

// Prefill: the rows of one sequence. A tile is 8 queries out of (row, head of this KV head),
// flattened so that heads of one row share the keys that are loaded.
// Threads: 8 queries x 16 keys. Groups: (tiles of n * heads per KV head, KV heads).
kernel void attend_tiles(device const float *k_cache [[buffer(0)]],
                         device const float *v_cache [[buffer(1)]],
                         device const float *q_all [[buffer(2)]],
                         device const float *gate_all [[buffer(3)]],
                         device float *y_all [[buffer(4)]],
                         constant fm_attend_args &a [[buffer(5)]],
                         uint2 group [[threadgroup_position_in_grid]],
                         uint tid [[thread_index_in_threadgroup]]) {
    threadgroup float qs[FM_ATTN_QUERIES * FM_ATTN_MAX_DIM];
    threadgroup float ks[FM_ATTN_KEYS * (FM_ATTN_MAX_DIM + 1)];
    threadgroup float ps[FM_ATTN_QUERIES * FM_ATTN_KEYS];
    threadgroup float shrinks[FM_ATTN_QUERIES], sums[FM_ATTN_QUERIES];
    const uint hd = FC_DIM, per_kv = a.n_heads / a.n_kv_heads, n_flat = a.n * per_kv;
    const uint flat0 = group.x * FM_ATTN_QUERIES, threads = FM_ATTN_QUERIES * FM_ATTN_KEYS;
    device const float *k = k_cache + ulong(group.y) * a.capacity * hd;
    device const float *v = v_cache + ulong(group.y) * a.capacity * hd;
    for (uint e = tid; e < FM_ATTN_QUERIES * hd; e += threads) {
        const uint f = flat0 + e / hd, head = group.y * per_kv + f % per_kv;
        const ulong at = ulong(a.row0 + f / per_kv) * a.ld_q + ulong(head) * a.ld_q_head;
        qs[e / hd * FM_ATTN_MAX_DIM + e % hd] =
            f < n_flat ? q_all[at + e % hd] * a.scale : 0.0f;
    }
    const uint qi = tid / FM_ATTN_KEYS, ki = tid % FM_ATTN_KEYS; // this thread's score
    const uint my_pos = a.pos0 + min(flat0 + qi, n_flat - 1) / per_kv;
    const uint end = a.pos0 + min(flat0 + FM_ATTN_QUERIES, n_flat) - 1;
    const uint end_pos = a.pos0 + (end - a.pos0) / per_kv + 1; // last query's, exclusive
    float top = -INFINITY, sum = 0.0f, o[2][FM_ATTN_QUERIES];
    for (uint i = 0; i < 2; i++)
        for (uint j = 0; j < FM_ATTN_QUERIES; j++)
            o[i][j] = 0.0f;
    for (uint p0 = 0; p0 < end_pos; p0 += FM_ATTN_KEYS) {
        threadgroup_barrier(mem_flags::mem_threadgroup); // the last tile's values are used up
        load_keys(k, p0, end_pos, hd, tid, ks);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float s = 0.0f;
        for (uint d = 0; d < hd; d++)
            s = fma(qs[qi * FM_ATTN_MAX_DIM + d], ks[ki * LD_KEY + d], s);
        const bool seen = p0 + ki <= my_pos;
        float new_top = seen ? max(top, s) : top;
        for (ushort m = 1; m < FM_ATTN_KEYS; m *= 2) // the 16 lanes of one query
            new_top = max(new_top, simd_shuffle_xor(new_top, m));
        const float weight = seen ? exp(s - new_top) : 0.0f, shrink = exp(top - new_top);
        top = new_top;
        sum = fma(sum, shrink, weight); // of this thread's keys; added up at the end
        ps[tid] = weight;
        if (ki == 0)
            shrinks[qi] = shrink;
        threadgroup_barrier(mem_flags::mem_threadgroup); // keys are read, weights written
        load_keys(v, p0, end_pos, hd, tid, ks);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint i = 0; i < 2; i++) {
            const uint d = tid + i * threads;
            if (d >= hd)
                continue;
            for (uint j = 0; j < FM_ATTN_QUERIES; j++)
                o[i][j] *= shrinks[j];
            for (uint p = 0; p < FM_ATTN_KEYS; p++) {
                const float value = ks[p * LD_KEY + d];
                for (uint j = 0; j < FM_ATTN_QUERIES; j++)
                    o[i][j] = fma(ps[j * FM_ATTN_KEYS + p], value, o[i][j]);
            }
        }
    }
    for (ushort m = 1; m < FM_ATTN_KEYS; m *= 2)
        sum += simd_shuffle_xor(sum, m);
    if (ki == 0)
        sums[qi] = sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0; i < 2; i++) {
        const uint d = tid + i * threads;
        if (d >= hd)
            continue;
        for (uint j = 0; j < FM_ATTN_QUERIES && flat0 + j < n_flat; j++) {
            const uint f = flat0 + j, head = group.y * per_kv + f % per_kv;
            const ulong row = a.row0 + f / per_kv;
            const float r = o[i][j] / sums[j];
            const float gate =
                a.has_gate ? sigmoid(gate_all[row * a.ld_q + ulong(head) * a.ld_q_head + d]) : 1.0f;
            y_all[row * a.ld_y + ulong(head) * hd + d] = r * gate;
        }
    }
}
