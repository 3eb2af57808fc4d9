// Y = X W^T for many rows of X (prefill, and experts that several rows chose), 8x8 simdgroup
// matrices over tiles in threadgroup memory. Row counts are ragged: rows past the end are read as
// zero and never stored. Weights are decoded with one rounding each.
// Bound: 2^-20 * sum |w x|; f32 products and accumulation.
#include "common.h"

constant uint LD_TILE = FM_MM_TILE + 4; // floats; keeps rows of a tile in different banks

// x[row][k0 .. k0+31] of 32 rows; thread t takes 8 columns of row t / 4.
inline void load_x(device const fm_metal_item &it, constant fm_mat_args &a,
                   device const float *x_all, device const int *rows, uint i0, uint k0,
                   uint tid, threadgroup float *tile) {
    const uint i = i0 + tid / 4, c0 = tid % 4 * 8;
    threadgroup float *to = tile + tid / 4 * LD_TILE + c0;
    if (i >= it.n) {
        for (uint c = 0; c < 8; c++)
            to[c] = 0.0f;
        return;
    }
    const ulong x_row = a.gather ? uint(rows[it.row0 + i]) : it.row0 + i;
    device const float *x = x_all + x_row * a.ldx + k0 + c0;
    for (uint c = 0; c < 8; c++)
        to[c] = k0 + c0 + c < a.n_cols ? x[c] : 0.0f;
}

// W[row][k0 .. k0+31] of 32 rows, decoded; thread t takes 8 columns of row t / 4.
inline void load_w(device const fm_metal_item &it, constant fm_mat_args &a, uint r0, uint k0,
                   uint tid, threadgroup float *tile) {
    const uint r = r0 + tid / 4, c0 = tid % 4 * 8;
    threadgroup float *to = tile + tid / 4 * LD_TILE + c0;
    if (r >= it.n_out) {
        for (uint c = 0; c < 8; c++)
            to[c] = 0.0f;
        return;
    }
    device const uint *codes = row_of(it.codes, ulong(r) * a.codes_stride);
    if (FC_FORMAT >= FM_FMT_F16) {
        for (uint c = 0; c < 8; c++)
            to[c] = k0 + c0 + c < a.n_cols
                        ? plain_at((device const uchar *)codes + it.codes_at, FC_FORMAT, k0 + c0 + c)
                        : 0.0f;
        return;
    }
    const uint g = (k0 + c0) / FC_GROUP; // 8 columns never cross a group
    const float s = plain_at(it.scales + ulong(r) * a.scales_stride, FC_SCALE, g);
    const float b = plain_at(it.biases + ulong(r) * a.scales_stride, FC_SCALE, g);
    if (FC_FORMAT == 4 && !FC_BYTES) {
        const uint w = codes[(k0 + c0) / 8];
        for (uint c = 0; c < 8; c++)
            to[c] = fma(float(w >> (4 * c) & 15u), s, b);
    } else {
        for (uint c = 0; c < 8; c++)
            to[c] = fma(code_at(codes, it.codes_at, k0 + c0 + c), s, b);
    }
}

// Threads: FM_MM_THREADS (4 simdgroups, 16x16 outputs each).
// Groups: (outputs / 32, rows of x / 32, items).
kernel void mat_mul(device const fm_metal_item *items [[buffer(0)]],
                    constant fm_mat_args &a [[buffer(1)]],
                    device const float *x_all [[buffer(2)]],
                    device const int *rows [[buffer(3)]],
                    uint3 group [[threadgroup_position_in_grid]],
                    uint tid [[thread_index_in_threadgroup]],
                    uint sg [[simdgroup_index_in_threadgroup]]) {
    threadgroup float xs[FM_MM_TILE * (FM_MM_TILE + 4)];
    threadgroup float ws[FM_MM_TILE * (FM_MM_TILE + 4)];
    device const fm_metal_item &it = items[group.z];
    const uint r0 = group.x * FM_MM_TILE, i0 = group.y * FM_MM_TILE;
    if (i0 >= it.n || r0 >= it.n_out)
        return;
    const uint si = sg / 2 * 16, sr = sg % 2 * 16; // this simdgroup's corner of the tile
    simdgroup_float8x8 c00(0.0f), c01(0.0f), c10(0.0f), c11(0.0f);
    for (uint k0 = 0; k0 < a.n_cols; k0 += FM_MM_TILE) {
        load_x(it, a, x_all, rows, i0, k0, tid, xs);
        load_w(it, a, r0, k0, tid, ws);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        for (uint k = 0; k < FM_MM_TILE; k += 8) {
            simdgroup_float8x8 x0, x1, w0, w1;
            simdgroup_load(x0, xs + si * LD_TILE + k, LD_TILE);
            simdgroup_load(x1, xs + (si + 8) * LD_TILE + k, LD_TILE);
            simdgroup_load(w0, ws + sr * LD_TILE + k, LD_TILE, ulong2(0, 0), true);
            simdgroup_load(w1, ws + (sr + 8) * LD_TILE + k, LD_TILE, ulong2(0, 0), true);
            simdgroup_multiply_accumulate(c00, x0, w0, c00);
            simdgroup_multiply_accumulate(c01, x0, w1, c01);
            simdgroup_multiply_accumulate(c10, x1, w0, c10);
            simdgroup_multiply_accumulate(c11, x1, w1, c11);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
    simdgroup_store(c00, xs + si * LD_TILE + sr, LD_TILE);
    simdgroup_store(c01, xs + si * LD_TILE + sr + 8, LD_TILE);
    simdgroup_store(c10, xs + (si + 8) * LD_TILE + sr, LD_TILE);
    simdgroup_store(c11, xs + (si + 8) * LD_TILE + sr + 8, LD_TILE);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint e = tid; e < FM_MM_TILE * FM_MM_TILE; e += FM_MM_THREADS) {
        const uint i = i0 + e / FM_MM_TILE, r = r0 + e % FM_MM_TILE;
        if (i >= it.n || r >= it.n_out)
            continue;
        float v = xs[e / FM_MM_TILE * LD_TILE + e % FM_MM_TILE];
        if (it.has_bias)
            v += it.bias[r];
        device float *y = it.y + ulong(i) * it.ldy + r;
        *y = it.add ? *y + v : v;
    }
}
