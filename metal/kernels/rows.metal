// Row-wise and element-wise ops: norm, rotary, SwiGLU, gated add, expert combine, checks.
#include "common.h"

// Sum over a threadgroup of FM_NORM_THREADS; every thread gets it.
inline float group_sum(float v, threadgroup float *part, uint lane, uint sg) {
    v = simd_sum(v);
    if (lane == 0)
        part[sg] = v;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    float s = 0.0f;
    for (uint i = 0; i < FM_NORM_THREADS / FM_WIDTH; i++)
        s += part[i];
    return s;
}

// y = x / sqrt(mean(x^2) + eps) * w. Group: one row. y may be x. Bound: 2^-20 * |y|.
kernel void rms_norm(device const float *x [[buffer(0)]],
                     device const float *w [[buffer(1)]],
                     device float *y [[buffer(2)]],
                     constant fm_norm_args &a [[buffer(3)]],
                     uint row [[threadgroup_position_in_grid]],
                     uint tid [[thread_index_in_threadgroup]],
                     uint lane [[thread_index_in_simdgroup]],
                     uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup float part[FM_NORM_THREADS / FM_WIDTH];
    device const float *xr = x + ulong(row) * a.ldx;
    device float *yr = y + ulong(row) * a.ldy;
    float s = 0.0f;
    for (uint c = tid; c < a.n_cols; c += FM_NORM_THREADS)
        s = fma(xr[c], xr[c], s);
    s = group_sum(s, part, lane, sg);
    const float f = 1.0f / sqrt(s / float(a.n_cols) + a.eps);
    for (uint c = tid; c < a.n_cols; c += FM_NORM_THREADS)
        yr[c] = xr[c] * f * w[c];
}

// In place on pairs (i, i + half_rot) of each head. cs: [n, half_rot] of (cos, sin), made by the
// host in double: at position 200,000 a float angle would be wrong in its second digit.
// Grid: (half_rot, heads, rows).
kernel void rotary(device float *x [[buffer(0)]],
                   device const float2 *cs [[buffer(1)]],
                   constant fm_rotary_args &a [[buffer(2)]],
                   uint3 at [[thread_position_in_grid]]) {
    if (at.x >= a.half_rot || at.y >= a.n_heads || at.z >= a.n)
        return;
    device float *p = x + ulong(at.z) * a.ld + ulong(at.y) * a.ld_head + at.x;
    const float2 f = cs[at.z * a.half_rot + at.x];
    const float lo = p[0], hi = p[a.half_rot];
    p[0] = lo * f.x - hi * f.y;
    p[a.half_rot] = hi * f.x + lo * f.y;
}

// y = silu(gate) * up. y may be gate or up. Grid: n elements.
kernel void swiglu(device const float *gate [[buffer(0)]],
                   device const float *up [[buffer(1)]],
                   device float *y [[buffer(2)]],
                   constant fm_rows_args &a [[buffer(3)]],
                   uint i [[thread_position_in_grid]]) {
    if (i < a.n)
        y[i] = silu(gate[i]) * up[i];
}

// y[r] += f * x[r], f = sigmoid(gate[r]), or 1 when limit is 0. Grid: (n_cols, n).
kernel void add_gated(device const float *x [[buffer(0)]],
                      device const float *gate [[buffer(1)]],
                      device float *y [[buffer(2)]],
                      constant fm_rows_args &a [[buffer(3)]],
                      uint2 at [[thread_position_in_grid]]) {
    if (at.x >= a.n_cols || at.y >= a.n)
        return;
    const ulong i = ulong(at.y) * a.n_cols + at.x;
    const float f = a.limit != 0.0f ? sigmoid(gate[at.y]) : 1.0f;
    y[i] = fma(f, x[i], y[i]);
}

// x = min(max(x, -limit), limit). Grid: n elements.
kernel void clip_abs(device float *x [[buffer(0)]],
                     constant fm_rows_args &a [[buffer(1)]],
                     uint i [[thread_position_in_grid]]) {
    if (i < a.n)
        x[i] = min(max(x[i], -a.limit), a.limit);
}

// y[r] += weight[e] * part[index[e]] for e in [start[r], start[r+1]), in that order: the host
// lists experts by rising id, so the sum does not depend on which were cached. Grid: (n_cols, n).
kernel void combine(device float *y [[buffer(0)]],
                    device const float *part [[buffer(1)]],
                    device const int *start [[buffer(2)]],
                    device const int *index [[buffer(3)]],
                    device const float *weight [[buffer(4)]],
                    constant fm_rows_args &a [[buffer(5)]],
                    uint2 at [[thread_position_in_grid]]) {
    if (at.x >= a.n_cols || at.y >= a.n)
        return;
    const ulong i = ulong(at.y) * a.n_cols + at.x;
    float s = y[i];
    for (int e = start[at.y]; e < start[at.y + 1]; e++)
        s = fma(weight[e], part[ulong(index[e]) * a.n_cols + at.x], s);
    y[i] = s;
}

// bad[r] = 1 if row r holds a NaN or an infinity (by exponent bits: safe under fast-math).
// Group: one row.
kernel void find_nonfinite(device const uint *x [[buffer(0)]],
                           device uint *bad [[buffer(1)]],
                           constant fm_rows_args &a [[buffer(2)]],
                           uint row [[threadgroup_position_in_grid]],
                           uint tid [[thread_index_in_threadgroup]],
                           uint lane [[thread_index_in_simdgroup]],
                           uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup uint part[FM_NORM_THREADS / FM_WIDTH];
    uint worst = 0;
    for (uint c = tid; c < a.n_cols; c += FM_NORM_THREADS)
        worst = max(worst, x[ulong(row) * a.n_cols + c] & 0x7f800000u);
    worst = simd_max(worst);
    if (lane == 0)
        part[sg] = worst;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (tid == 0) {
        for (uint i = 1; i < FM_NORM_THREADS / FM_WIDTH; i++)
            worst = max(worst, part[i]);
        bad[row] = worst == 0x7f800000u ? 1u : 0u;
    }
}
