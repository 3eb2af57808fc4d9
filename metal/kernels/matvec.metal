// y = W x for few rows of x: matrices of several formats, one dispatch for all that share x.
//
// A simdgroup takes FM_MV_ROWS matrix rows at once (gated: pairs of a gate row and an up row), so
// that x is read once for them. Affine: x goes through threadgroup memory by tiles, each lane takes
// blocks of 32 codes, and scale and bias leave the inner loop:
//     sum_block = s * sum(q * x) + b * sum(x)       (one fma per weight)
// Bound: 2^-20 * sum |w x| for weights spread over their range; f32 accumulation.
#include "common.h"

// 2 and 4 bits: a code that is masked in place within a 16-bit half is a subnormal half, whose
// conversion to f32 is exact; its scale of 2^(bit - 24) is taken out of x and of the result. Two
// codes cost one `and`, where shifting and converting integers would cost two operations each.
inline bool in_halves() { return FC_FORMAT == 2 || FC_FORMAT == 4; }

// By how much x is scaled, column 4i + j: 2^-(lowest bit of its code in its byte).
inline float4 x_scale() {
    return FC_FORMAT == 4   ? float4(1.0f, 0.0625f, 1.0f, 0.0625f)
           : FC_FORMAT == 2 ? float4(1.0f, 0.25f, 0.0625f, 0.015625f)
                            : float4(1.0f);
}

inline float result_scale() { return in_halves() ? 16777216.0f : 1.0f; }

// A tile of x: 4 columns of a block lie LD_X float4 apart from the next 4, so that lanes, which
// read the same columns of neighbouring blocks, read neighbouring memory.
constant uint LD_X = FM_MV_TILE / 32 + 1;

inline float4 load_x4(device const float *x) {
    return FC_VEC ? *(device const float4 *)x : float4(*(device const packed_float4 *)x);
}

// Columns [0, n_cols) of x into the tile, zeros up to whole `steps` of a simdgroup's blocks after
// them, and the sums of each 16.
inline void load_tile(device const float *x, uint n_cols, uint steps, uint lane, uint sg, uint n_sg,
                      threadgroup float4 *tile, threadgroup float *sums) {
    for (uint i0 = sg * FM_WIDTH; i0 < steps * FM_WIDTH * 8; i0 += n_sg * FM_WIDTH) {
        const uint i = i0 + lane;
        const float4 v = i < n_cols / 4 ? load_x4(x + 4 * i) : float4(0.0f);
        float s = (v.x + v.y) + (v.z + v.w);
        s += simd_shuffle_xor(s, 1);
        s += simd_shuffle_xor(s, 2);
        tile[i % 8 * LD_X + i / 8] = v * x_scale();
        if (i % 4 == 0)
            sums[i / 4] = s * (1.0f / result_scale());
    }
}

// The matrix rows of a simdgroup: row r belongs to matrix r % 2 when gated.
struct mv_rows {
    device const uint *codes[2]; // of the first row
    device const uchar *scales[2], *biases[2];
    uint at[2];
    uint codes_stride, scales_stride, last; // rows past the last are read as it and not stored
};

inline uint side_of(uint r) { return FC_GATED ? r % 2 : 0; }
inline uint row_in(thread const mv_rows &rows, uint r) {
    return min(FC_GATED ? r / 2 : r, rows.last);
}

inline void find_rows(device const fm_metal_item &it, constant fm_mat_args &a, uint r0,
                      thread mv_rows &o) {
    const ulong row = min(r0, it.n_out - 1), c = row * a.codes_stride, s = row * a.scales_stride;
    o.last = it.n_out - 1 - uint(row);
    o.codes[0] = row_of(it.codes, c), o.codes[1] = row_of(it.up_codes, c);
    o.scales[0] = it.scales + s, o.scales[1] = it.up_scales + s;
    o.biases[0] = it.biases + s, o.biases[1] = it.up_biases + s;
    o.at[0] = it.codes_at, o.at[1] = it.up_at;
    o.codes_stride = a.codes_stride, o.scales_stride = a.scales_stride;
}

// Block b of each row.
struct mv_block {
    uint w[FM_MV_ROWS][8];
    float scale[FM_MV_ROWS][2], bias[FM_MV_ROWS][2]; // [1]: of the second 16 codes, group 16 only
};

// Offsets are added in 32 bits: one register each, where a pointer kept per row would take two.
inline void load_blocks(thread const mv_rows &rows, uint b, thread mv_block &o) {
    const uint g = b * 32 / FC_GROUP * (FC_SCALE == FM_FMT_F32 ? 4 : 2);
#pragma unroll
    for (uint r = 0; r < FM_MV_ROWS; r++)
        load_block(row_of(rows.codes[side_of(r)], row_in(rows, r) * rows.codes_stride + b * FC_FORMAT * 4),
                   rows.at[side_of(r)], o.w[r]);
#pragma unroll
    for (uint r = 0; r < FM_MV_ROWS; r++) {
        const uint off = row_in(rows, r) * rows.scales_stride + g;
#pragma unroll
        for (uint h = 0; h < (FC_GROUP == 16 ? 2 : 1); h++) {
            o.scale[r][h] = plain_at(rows.scales[side_of(r)] + off, FC_SCALE, h);
            o.bias[r][h] = plain_at(rows.biases[side_of(r)] + off, FC_SCALE, h);
        }
    }
}

// sum(q * x) over the columns of word k, which holds two halves.
inline float halves_dot(uint w, thread const float *x, float sum) {
    const uint n = 16 / FC_FORMAT, mask = ((1u << FC_FORMAT) - 1) * 0x10001u;
#pragma unroll
    for (uint j = 0; j < n; j++) {
        const uint bit = j * FC_FORMAT;
        const half2 q = as_type<half2>((bit < 8 ? w : w >> 8) & mask << bit % 8);
        sum = fma(float(q.x), x[j], sum);
        sum = fma(float(q.y), x[j + n], sum);
    }
    return sum;
}

// Block b of the tile at `x` times the codes in `w`.
inline void add_blocks(thread const mv_block &w, threadgroup const float4 *x,
                       threadgroup const float *sums, uint b, thread float *acc) {
    float part[FM_MV_ROWS][2];
#pragma unroll
    for (uint r = 0; r < FM_MV_ROWS; r++)
        part[r][0] = part[r][1] = 0.0f;
    const uint cols = in_halves() ? 32 / FC_FORMAT : 16; // x in registers
#pragma unroll
    for (uint c = 0; c < 32; c += cols) {
        float v[16];
#pragma unroll
        for (uint j = 0; j < cols / 4; j++) {
            const float4 f = x[(c / 4 + j) * LD_X + b];
            v[4 * j] = f.x, v[4 * j + 1] = f.y, v[4 * j + 2] = f.z, v[4 * j + 3] = f.w;
        }
#pragma unroll
        for (uint r = 0; r < FM_MV_ROWS; r++) {
            const uint h = FC_GROUP == 16 ? c / 16 : 0;
            if (in_halves()) {
                part[r][h] = halves_dot(w.w[r][c / cols], v, part[r][h]);
            } else {
#pragma unroll
                for (uint j = 0; j < 16; j++)
                    part[r][h] = fma(code_of(w.w[r], c + j), v[j], part[r][h]);
            }
        }
    }
    const float s0 = sums[2 * b], s1 = sums[2 * b + 1];
#pragma unroll
    for (uint r = 0; r < FM_MV_ROWS; r++) {
        acc[r] = fma(w.bias[r][0], FC_GROUP == 16 ? s0 : s0 + s1, acc[r]);
        acc[r] = fma(w.scale[r][0], part[r][0], acc[r]);
        if (FC_GROUP == 16)
            acc[r] = fma(w.scale[r][1], part[r][1], fma(w.bias[r][1], s1, acc[r]));
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

// Threads: FM_WIDTH * (1 .. FM_MV_SIMDGROUPS).
// Groups: (outputs / outputs of a group, items, rows of x); gated, a simdgroup makes half as many.
kernel void mat_vec(device const fm_metal_item *items [[buffer(0)]],
                    constant fm_mat_args &a [[buffer(1)]],
                    device const float *x_all [[buffer(2)]],
                    device const int *rows [[buffer(3)]],
                    uint3 group [[threadgroup_position_in_grid]],
                    uint lane [[thread_index_in_simdgroup]],
                    uint sg [[simdgroup_index_in_threadgroup]],
                    uint n_sg [[simdgroups_per_threadgroup]]) {
    threadgroup float4 tile[8 * (FM_MV_TILE / 32 + 1)];
    threadgroup float sums[FM_MV_TILE / 16];
    device const fm_metal_item &it = items[group.y];
    const uint n_mine = FC_GATED ? FM_MV_ROWS / 2 : FM_MV_ROWS, t = group.z;
    const uint r0 = (group.x * n_sg + sg) * n_mine;
    mv_rows w;
    find_rows(it, a, r0, w);
    device float *y = it.y + ulong(t) * it.ldy;
    const uint n_out = it.n_out, has_bias = it.has_bias, add = it.add;
    // the last test has the pointers fetched together with the counts, not after them
    if (t >= it.n || group.x * n_sg * n_mine >= n_out || it.codes == nullptr)
        return;
    const ulong x_row = a.gather ? uint(rows[it.row0 + t]) : it.row0 + t;
    device const float *x = x_all + x_row * a.ldx;
    float acc[FM_MV_ROWS] = {0.0f};
    if (FC_FORMAT < FM_FMT_F16) {
        for (uint c0 = 0; c0 < a.n_cols; c0 += FM_MV_TILE) {
            const uint n_cols = min(uint(FM_MV_TILE), a.n_cols - c0);
            const uint steps = (n_cols + 32 * FM_WIDTH - 1) / (32 * FM_WIDTH);
            const uint b0 = c0 / 32, last = a.n_cols / 32 - 1; // past it, x is zero
            mv_block block;
            load_blocks(w, min(b0 + lane, last), block); // on its way while x is
            if (c0 != 0)
                threadgroup_barrier(mem_flags::mem_threadgroup); // the last tile is used up
            load_tile(x + c0, n_cols, steps, lane, sg, n_sg, tile, sums);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            for (uint i = 0; i < steps; i++) {
                const uint b = i * FM_WIDTH + lane;
                if (i != 0)
                    load_blocks(w, min(b0 + b, last), block);
                add_blocks(block, tile, sums, b, acc);
            }
        }
    } else {
#pragma unroll
        for (uint r = 0; r < FM_MV_ROWS; r++)
            acc[r] = plain_dot((device const uchar *)row_of(w.codes[side_of(r)], row_in(w, r) * w.codes_stride) +
                                   w.at[side_of(r)],
                               x, a.n_cols, lane);
    }
#pragma unroll
    for (uint r = 0; r < n_mine; r++) {
        float v = simd_sum(acc[FC_GATED ? 2 * r : r]) * result_scale();
        if (FC_GATED)
            v = silu(v) * (simd_sum(acc[2 * r + 1]) * result_scale());
        if (lane == r && r0 + r < n_out) {
            if (has_bias)
                v += it.bias[r0 + r];
            y[r0 + r] = add ? y[r0 + r] + v : v;
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
