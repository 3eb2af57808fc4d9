// y = W x for few rows of x: matrices of several formats, one dispatch for all that share x.
//
// A simdgroup makes FM_MV_ROWS outputs at once, so that x is loaded once for them. Affine: each
// lane takes blocks of 32 codes; scale and bias leave the inner loop:
//     sum_block = s * sum(q * x) + b * sum(x)       (one fma per weight)
// Bound: 2^-20 * sum |w x| for weights spread over their range; f32 accumulation.
#include "common.h"

// One block's share: w words, x in registers, x_sum its halves' sums.
inline float affine_block(device const uint *codes, uint at, device const uchar *scales,
                          device const uchar *biases, uint b, thread const float *x,
                          thread const float *x_sum) {
    uint w[8];
    load_block(codes, at, b, w);
    float lo = 0.0f, hi = 0.0f;
#pragma unroll
    for (uint j = 0; j < 16; j++) {
        lo = fma(code_of(w, j), x[j], lo);
        hi = fma(code_of(w, j + 16), x[j + 16], hi);
    }
    const uint g = b * 32 / FC_GROUP;
    const float s = plain_at(scales, FC_SCALE, g), bias = plain_at(biases, FC_SCALE, g);
    if (FC_GROUP == 16)
        return fma(s, lo, bias * x_sum[0]) +
               fma(plain_at(scales, FC_SCALE, g + 1), hi,
                   plain_at(biases, FC_SCALE, g + 1) * x_sum[1]);
    return fma(s, lo + hi, bias * (x_sum[0] + x_sum[1]));
}

inline void affine_rows(device const fm_metal_item &it, constant fm_mat_args &a,
                        device const float *x, uint r0, uint lane, thread float *acc,
                        thread float *acc_up) {
    for (uint b = lane; b < a.n_cols / 32; b += FM_WIDTH) {
        float v[32], sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (uint j = 0; j < 8; j++) {
            const float4 f = float4(((device const packed_float4 *)(x + b * 32))[j]);
            v[4 * j] = f.x, v[4 * j + 1] = f.y, v[4 * j + 2] = f.z, v[4 * j + 3] = f.w;
            sum[j / 4] += (f.x + f.y) + (f.z + f.w);
        }
#pragma unroll
        for (uint r = 0; r < FM_MV_ROWS; r++) {
            const ulong row = min(r0 + r, it.n_out - 1); // a row past the end is not stored
            acc[r] += affine_block(row_of(it.codes, row * a.codes_stride), it.codes_at,
                                   it.scales + row * a.scales_stride,
                                   it.biases + row * a.scales_stride, b, v, sum);
            if (FC_GATED)
                acc_up[r] += affine_block(row_of(it.up_codes, row * a.codes_stride), it.up_at,
                                          it.up_scales + row * a.scales_stride,
                                          it.up_biases + row * a.scales_stride, b, v, sum);
        }
    }
}

// Four plain numbers; vector loads when the host knows that they are aligned.
inline float4 plain4(device const uchar *p, uint c) {
    device const uint *row = (device const uint *)p;
    if (FC_FORMAT == FM_FMT_F32 && !FC_BYTES)
        return FC_VEC ? *(device const float4 *)(row + c)
                      : float4(*(device const packed_float4 *)(row + c));
    if (FC_VEC) {
        const ushort4 u = *(device const ushort4 *)((device const ushort *)row + c);
        if (FC_FORMAT == FM_FMT_BF16)
            return as_type<float4>(uint4(u) << 16);
        return float4(as_type<half4>(u));
    }
    return float4(plain_at(p, FC_FORMAT, c), plain_at(p, FC_FORMAT, c + 1),
                  plain_at(p, FC_FORMAT, c + 2), plain_at(p, FC_FORMAT, c + 3));
}

inline float plain_dot(device const uchar *row, device const float *x, uint n, uint lane) {
    float4 sum = float4(0.0f);
    for (uint c = lane * 4; c + 4 <= n; c += 4 * FM_WIDTH)
        sum = fma(plain4(row, c), float4(*(device const packed_float4 *)(x + c)), sum);
    float s = (sum.x + sum.y) + (sum.z + sum.w);
    if (lane < n % 4)
        s = fma(plain_at(row, FC_FORMAT, n - n % 4 + lane), x[n - n % 4 + lane], s);
    return s;
}

// Threads: FM_WIDTH * FM_MV_SIMDGROUPS. Groups: (outputs / rows per group, items, rows of x).
kernel void mat_vec(device const fm_metal_item *items [[buffer(0)]],
                    constant fm_mat_args &a [[buffer(1)]],
                    device const float *x_all [[buffer(2)]],
                    device const int *rows [[buffer(3)]],
                    uint3 group [[threadgroup_position_in_grid]],
                    uint lane [[thread_index_in_simdgroup]],
                    uint sg [[simdgroup_index_in_threadgroup]]) {
    device const fm_metal_item &it = items[group.y];
    const uint r0 = (group.x * FM_MV_SIMDGROUPS + sg) * FM_MV_ROWS, t = group.z;
    if (t >= it.n || r0 >= it.n_out)
        return;
    const ulong x_row = a.gather ? uint(rows[it.row0 + t]) : it.row0 + t;
    device const float *x = x_all + x_row * a.ldx;
    float acc[FM_MV_ROWS] = {0.0f}, acc_up[FM_MV_ROWS] = {0.0f};
    if (FC_FORMAT < FM_FMT_F16) {
        affine_rows(it, a, x, r0, lane, acc, acc_up);
    } else {
        for (uint r = 0; r < FM_MV_ROWS; r++) {
            const ulong row = min(r0 + r, it.n_out - 1);
            const ulong up = row * a.codes_stride + it.up_at;
            acc[r] = plain_dot((device const uchar *)it.codes + row * a.codes_stride + it.codes_at,
                               x, a.n_cols, lane);
            if (FC_GATED)
                acc_up[r] = plain_dot((device const uchar *)it.up_codes + up, x, a.n_cols, lane);
        }
    }
    device float *y = it.y + ulong(t) * it.ldy;
#pragma unroll
    for (uint r = 0; r < FM_MV_ROWS; r++) {
        float v = simd_sum(acc[r]);
        if (FC_GATED)
            v = silu(v) * simd_sum(acc_up[r]);
        if (lane == r && r0 + r < it.n_out) {
            if (it.has_bias)
                v += it.bias[r0 + r];
            y[r0 + r] = it.add ? y[r0 + r] + v : v;
        }
    }
}

// Row ids[i] of a weight matrix, decoded. Grid: (n_cols, n).
kernel void embed_rows(device const uint *codes [[buffer(0)]],
                       device const uchar *scales [[buffer(1)]],
                       device const uchar *biases [[buffer(2)]],
                       device const int *ids [[buffer(3)]],
                       device float *y [[buffer(4)]],
                       constant fm_embed_args &a [[buffer(5)]],
                       uint2 at [[thread_position_in_grid]]) {
    if (at.x >= a.n_cols || at.y >= a.n)
        return;
    const ulong row = uint(ids[at.y]);
    device const uint *c = row_of(codes, row * a.codes_stride);
    y[ulong(at.y) * a.ldy + at.x] =
        FC_FORMAT >= FM_FMT_F16
            ? plain_at((device const uchar *)c + a.codes_at, FC_FORMAT, at.x)
            : affine_at(c, a.codes_at, scales + row * a.scales_stride,
                        biases + row * a.scales_stride, at.x);
}
