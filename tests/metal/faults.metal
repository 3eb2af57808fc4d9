// Planted mistakes: each kernel has one, and the runner must report it. *_ok kernels have none.
#include <metal_stdlib>
using namespace metal;

constant uint FC_MODE [[function_constant(0)]];

kernel void sum_ok(device float *out [[buffer(0)]], device const float *in [[buffer(1)]],
                   constant uint &n [[buffer(2)]],
                   uint lid [[thread_position_in_threadgroup]],
                   uint tg [[threads_per_threadgroup]],
                   uint lane [[thread_index_in_simdgroup]],
                   uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup float part[32];
    float s = 0.0;
    for (uint i = lid; i < n; i += tg)
        s += in[i];
    s = simd_sum(s);
    if (lane == 0)
        part[sg] = s;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (lid == 0) {
        float t = 0.0;
        for (uint i = 0; i < (tg + 31) / 32; i++)
            t += part[i];
        out[0] = t + float(FC_MODE);
    }
}

kernel void groups_ok(device float *out [[buffer(0)]],
                      uint group [[threadgroup_position_in_grid]]) {
    threadgroup float x[1];
    x[0] = float(group);
    out[group] = x[0];
}

kernel void no_barrier(device float *out [[buffer(0)]], device const float *in [[buffer(1)]],
                       uint lid [[thread_position_in_threadgroup]],
                       uint tg [[threads_per_threadgroup]]) {
    threadgroup float x[128];
    x[lid] = in[lid];
    out[lid] = x[tg - 1 - lid];
}

kernel void partial_barrier(device float *out [[buffer(0)]],
                            uint lid [[thread_position_in_threadgroup]]) {
    if (lid == 3)
        return;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[lid] = 1.0;
}

kernel void two_barriers(device float *out [[buffer(0)]],
                         uint lid [[thread_position_in_threadgroup]]) {
    if (lid < 32)
        threadgroup_barrier(mem_flags::mem_threadgroup);
    else
        threadgroup_barrier(mem_flags::mem_threadgroup);
    out[lid] = 1.0;
}

kernel void inactive_shuffle(device float *out [[buffer(0)]],
                             uint lid [[thread_position_in_threadgroup]]) {
    if (lid < 16)
        out[lid] = simd_shuffle_xor(float(lid), ushort(16));
}

kernel void inactive_matrix(device float *out [[buffer(0)]],
                            uint lid [[thread_position_in_threadgroup]]) {
    simdgroup_float8x8 a(1.0), b(1.0), c(0.0);
    if (lid < 31)
        simdgroup_multiply_accumulate(c, a, b, c);
    out[lid] = c.thread_elements()[0];
}

kernel void too_much(device float *out [[buffer(0)]], uint lid [[thread_position_in_threadgroup]]) {
    threadgroup float x[8193];
    x[lid] = 1.0;
    out[lid] = x[lid];
}

kernel void uninitialised(device float *out [[buffer(0)]],
                          uint lid [[thread_position_in_threadgroup]]) {
    threadgroup float x[64];
    if (lid < 63)
        x[lid] = 1.0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[lid] = x[lid];
}

kernel void past_end(device float *out [[buffer(0)]], device const float *in [[buffer(1)]],
                     constant uint &n [[buffer(2)]], uint i [[thread_position_in_grid]]) {
    if (i <= n)
        out[0] = in[i];
}

kernel void past_threadgroup(device float *out [[buffer(0)]],
                             uint lid [[thread_position_in_threadgroup]]) {
    threadgroup float x[64];
    x[lid + 1] = 1.0;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    out[lid] = x[lid];
}

kernel void racy_write(device float *out [[buffer(0)]],
                       uint lid [[thread_position_in_threadgroup]]) {
    if (lid % 32 == 0)
        out[0] = 1.0;
}

kernel void racy_groups(device float *out [[buffer(0)]],
                        uint g [[threadgroup_position_in_grid]],
                        uint lid [[thread_position_in_threadgroup]]) {
    if (lid == 0)
        out[g / 2] = 1.0;
}

kernel void misaligned(device uint4 *out [[buffer(0)]], device const uint *in [[buffer(1)]],
                       uint lid [[thread_position_in_threadgroup]]) {
    device const uint4 *p = (device const uint4 *)(in + 1);
    out[lid] = p[lid];
}

kernel void wide_shift(device uint *out [[buffer(0)]],
                       uint lid [[thread_position_in_threadgroup]]) {
    out[lid] = 1u << (lid + 1);
}
