// What the expert benchmark is measured against: a copy, four 16-byte words per thread.
#include <metal_stdlib>
using namespace metal;

// Threads: 256. Groups: words / 1024.
kernel void copy_words(device const uint4 *from [[buffer(0)]], device uint4 *to [[buffer(1)]],
                       uint group [[threadgroup_position_in_grid]],
                       uint tid [[thread_index_in_threadgroup]]) {
    const ulong at = ulong(group) * 1024 + tid;
    uint4 w[4];
#pragma unroll
    for (uint i = 0; i < 4; i++)
        w[i] = from[at + 256 * i];
#pragma unroll
    for (uint i = 0; i < 4; i++)
        to[at + 256 * i] = w[i];
}
