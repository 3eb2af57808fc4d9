// y = W x for few rows of x: matrices of several formats, one dispatch for all that share x.
//
// Affine: a simdgroup keeps 1024 columns of x in registers, 32 a lane, and takes matrix rows past
// them, two at once (gated: a gate row and its up row) and two on their way. More columns are split
// over `slices` simdgroups, which meet in threadgroup memory. Scale and bias leave the inner loop:
//     sum_block = s * sum(q * x) + b * sum(x)       (one fma per weight)
// A row's order of additions follows from n_cols and the slices alone.
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

// A tile of x: block b has its place by its number modulo the tile's blocks, and 4 columns of a
// block lie LD_X float4 apart from the next 4, so that lanes, which read the same columns of
// neighbouring blocks, read neighbouring memory.
constant uint TILE_BLOCKS = FM_MV_SLICES * FM_WIDTH, LD_X = TILE_BLOCKS + 1;

inline float4 load_x4(device const float *x) {
    return FC_VEC ? *(device const float4 *)x : float4(*(device const packed_float4 *)x);
}

// Blocks [b0, b0 + n_blocks) of x into the tile, zeros past n_cols; n_blocks is 32 for each slice.
// All loads are under way before the first is used.
inline void load_tile(device const float *x, uint n_cols, uint b0, uint n_blocks, uint tid,
                      uint n_threads, threadgroup float4 *tile) {
    float4 v[8];
#pragma unroll
    for (uint k = 0; k < 8; k++) {
        const uint i = b0 * 8 + k * n_threads + tid;
        v[k] = i < n_cols / 4 ? load_x4(x + 4 * i) : float4(0.0f);
    }
#pragma unroll
    for (uint k = 0; k < 8; k++) {
        const uint i = b0 * 8 + k * n_threads + tid;
        if (i < (b0 + n_blocks) * 8)
            tile[i % 8 * LD_X + i / 8 % TILE_BLOCKS] = v[k];
    }
}

// A lane's 32 columns of x, scaled, and the sum of each 16 before that.
struct mv_x {
    float v[32], sum[2];
};

inline void take_x(threadgroup const float4 *tile, thread mv_x &x) {
#pragma unroll
    for (uint h = 0; h < 2; h++) {
        float4 s = float4(0.0f);
#pragma unroll
        for (uint j = 4 * h; j < 4 * h + 4; j++) {
            const float4 t = tile[j * LD_X], f = t * x_scale();
            s += t;
            x.v[4 * j] = f.x, x.v[4 * j + 1] = f.y, x.v[4 * j + 2] = f.z, x.v[4 * j + 3] = f.w;
        }
        x.sum[h] = ((s.x + s.y) + (s.z + s.w)) * (1.0f / result_scale());
    }
}

// The matrix rows of a simdgroup, two at a time: outputs 2i and 2i + 1, or gated the rows of gate
// and up for output i.
struct mv_rows {
    device const uint *codes[2]; // of the first row
    device const uchar *scales[2], *biases[2];
    uint at[2];
    uint codes_stride, scales_stride, last; // rows past the last are read as it and not stored
};

inline void find_rows(device const fm_metal_item &it, constant fm_mat_args &a, uint first,
                      thread mv_rows &o) {
    // no address is made from the null pointers of an entry without a job
    const ulong row = it.codes == nullptr ? 0 : min(first, it.n_out - 1);
    const ulong c = row * a.codes_stride, s = row * a.scales_stride;
    o.codes[0] = row_of(it.codes, c), o.codes[1] = FC_GATED ? row_of(it.up_codes, c) : o.codes[0];
    o.scales[0] = it.scales + s, o.scales[1] = FC_GATED ? it.up_scales + s : o.scales[0];
    o.biases[0] = it.biases + s, o.biases[1] = FC_GATED ? it.up_biases + s : o.biases[0];
    o.at[0] = it.codes_at, o.at[1] = FC_GATED ? it.up_at : it.codes_at;
    o.last = it.n_out - 1 - uint(row);
    o.codes_stride = a.codes_stride, o.scales_stride = a.scales_stride;
}

inline uint row_in(thread const mv_rows &rows, uint i, uint side) {
    return min(FC_GATED ? i : 2 * i + side, rows.last);
}

// Block b of rows 2i and 2i + 1; offsets in 32 bits are a register each. Scales stay as they came
// until they are used, so that nothing waits for them here.
struct mv_block {
    uint w[2][8];
    uint scale[2][2], bias[2][2]; // [][1]: of the second 16 codes, group 16 only
};

inline void load_blocks(thread const mv_rows &rows, uint i, uint b, thread mv_block &o) {
    const uint g = b * 32 / FC_GROUP * (FC_SCALE == FM_FMT_F32 ? 4 : 2);
#pragma unroll
    for (uint r = 0; r < 2; r++)
        load_block(row_of(rows.codes[r],
                          row_in(rows, i, r) * rows.codes_stride + b * FC_FORMAT * 4),
                   rows.at[r], o.w[r]);
#pragma unroll
    for (uint r = 0; r < 2; r++) {
        const uint off = row_in(rows, i, r) * rows.scales_stride + g;
#pragma unroll
        for (uint h = 0; h < (FC_GROUP == 16 ? 2 : 1); h++) {
            o.scale[r][h] = plain_bits(rows.scales[r] + off, FC_SCALE, h);
            o.bias[r][h] = plain_bits(rows.biases[r] + off, FC_SCALE, h);
        }
    }
}

// sum + sum(q * x) over the columns of a word of two halves.
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

// Columns [16h, 16h + 16 or 32) of a block times x: codes alone.
inline float codes_dot(thread const uint *w, thread const mv_x &x, uint h) {
    const uint end = FC_GROUP == 16 ? 16 * h + 16 : 32, step = in_halves() ? 32 / FC_FORMAT : 1;
    float sum = 0.0f;
#pragma unroll
    for (uint c = 16 * h; c < end; c += step)
        sum = in_halves() ? halves_dot(w[c / step], x.v + c, sum) : fma(code_of(w, c), x.v[c], sum);
    return sum;
}

inline float block_dot(thread const mv_block &o, uint r, thread const mv_x &x) {
    float sum = 0.0f;
#pragma unroll
    for (uint h = 0; h < (FC_GROUP == 16 ? 2 : 1); h++) {
        const float of_x = FC_GROUP == 16 ? x.sum[h] : x.sum[0] + x.sum[1];
        sum = fma(plain_value(o.bias[r][h], FC_SCALE), of_x, sum);
        sum = fma(plain_value(o.scale[r][h], FC_SCALE), codes_dot(o.w[r], x, h), sum);
    }
    return sum;
}

// Rows 2i and 2i + 1 of a simdgroup over its slice, added to what an earlier tile gave. Even lanes
// add up the first row, odd lanes the second: half the steps of two sums.
inline void use_blocks(thread const mv_block &o, thread const mv_x &x, uint i, bool more, uint lane,
                       threadgroup float *part) {
    const bool odd = lane % 2 != 0;
    const float a = block_dot(o, 0, x), b = block_dot(o, 1, x);
    float v = pick(odd, a, b) + simd_shuffle_xor(pick(odd, b, a), 1);
    v += simd_shuffle_xor(v, 2);
    v += simd_shuffle_xor(v, 4);
    v += simd_shuffle_xor(v, 8);
    v += simd_shuffle_xor(v, 16);
    if (lane < 2)
        part[2 * i + lane] = more ? part[2 * i + lane] + v : v;
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

// Threads: FM_WIDTH * slices * teams. A team takes `pairs` (even) pairs of matrix rows: as many outputs
// when gated, else twice as many. Groups: (outputs / outputs of a group, items, rows of x).
kernel void mat_vec(device const fm_metal_item *items [[buffer(0)]],
                    constant fm_mat_args &a [[buffer(1)]],
                    device const float *x_all [[buffer(2)]],
                    device const int *rows [[buffer(3)]],
                    uint3 group [[threadgroup_position_in_grid]],
                    uint lane [[thread_index_in_simdgroup]],
                    uint sg [[simdgroup_index_in_threadgroup]],
                    uint n_sg [[simdgroups_per_threadgroup]]) {
    threadgroup float4 tile[8 * (FM_MV_SLICES * FM_WIDTH + 1)];
    threadgroup float parts[FM_MV_SIMDGROUPS * 2 * FM_MV_PAIRS];
    device const fm_metal_item &it = items[group.y];
    const uint n_mine = FC_GATED ? a.pairs : 2 * a.pairs, n_teams = n_sg / a.slices, t = group.z;
    const uint first = group.x * n_teams * n_mine, slice = sg % a.slices;
    mv_rows w;
    find_rows(it, a, first + sg / a.slices * n_mine, w);
    const uint n_out = it.n_out;
    // the last test has the pointers fetched together with the counts, not after them
    if (t >= it.n || first >= n_out || it.codes == nullptr)
        return;
    const ulong x_row = a.gather ? uint(rows[it.row0 + t]) : it.row0 + t;
    device const float *x = x_all + x_row * a.ldx;
    threadgroup float *part = parts + sg * 2 * a.pairs;
    if (FC_FORMAT < FM_FMT_F16) {
        const uint last = a.n_cols / 32 - 1; // blocks past it meet zeros of x
        uint b0 = 0;
        do { // once, unless FC_LONG: what lives across turns takes registers that occupancy needs
            const uint mine = b0 + slice * FM_WIDTH + lane, b = min(mine, last);
            mv_block even, odd; // on their way while x is
            load_blocks(w, 0, b, even);
            load_blocks(w, 1, b, odd);
            if (FC_LONG && b0 != 0)
                threadgroup_barrier(mem_flags::mem_threadgroup); // the last tile is used up
            load_tile(x, a.n_cols, b0, a.slices * FM_WIDTH, sg * FM_WIDTH + lane, n_sg * FM_WIDTH,
                      tile);
            threadgroup_barrier(mem_flags::mem_threadgroup);
            mv_x columns;
            take_x(tile + mine % TILE_BLOCKS, columns);
            for (uint i = 0; i < a.pairs; i += 2) { // at the end, once more what is there: no branch
                use_blocks(even, columns, i, FC_LONG && b0 != 0, lane, part);
                load_blocks(w, min(i + 2, a.pairs - 2), b, even);
                use_blocks(odd, columns, i + 1, FC_LONG && b0 != 0, lane, part);
                load_blocks(w, min(i + 3, a.pairs - 1), b, odd);
            }
            b0 += a.slices * FM_WIDTH;
        } while (FC_LONG && b0 <= last);
    } else {
        for (uint i = 0; i < 2 * a.pairs; i++) {
            const uint off = row_in(w, i / 2, i % 2) * w.codes_stride + w.at[i % 2];
            device const uchar *row = (device const uchar *)w.codes[i % 2] + off;
            const float v = simd_sum(plain_dot(row, x, a.n_cols, lane));
            if (lane == 0)
                part[i] = v;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll 1
    for (uint o = sg * FM_WIDTH + lane; o < n_teams * n_mine; o += n_sg * FM_WIDTH) {
        threadgroup const float *p = parts + o / n_mine * a.slices * 2 * a.pairs;
        float v = 0.0f, up = 0.0f;
#pragma unroll 1
        for (uint s = 0; s < a.slices; s++, p += 2 * a.pairs) {
            v += p[FC_GATED ? o % n_mine * 2 : o % n_mine];
            up += FC_GATED ? p[o % n_mine * 2 + 1] : 0.0f;
        }
        v *= result_scale();
        if (FC_GATED)
            v = silu(v) * (up * result_scale());
        const uint at = first + o;
        if (at < n_out) {
            if (it.has_bias)
                v += it.bias[at];
            device float *y = it.y + ulong(t) * it.ldy + at;
            *y = it.add ? *y + v : v;
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
