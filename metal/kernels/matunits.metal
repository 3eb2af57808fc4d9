// y = W x for few rows of x and codes of 2 or 4 bits, on matrix units: mat_vec for GPUs to which
// taking a code to f32 costs more than a product (fm_metal_tune.units).
//
// A code that is masked in place within a 16-bit half is a subnormal half and enters a product as it
// is. x is scaled by a power of two, so that its largest number lies in [2^16, 2^17), by another for
// the place of its code, and split into two halves, high and low, 22 bits in all; each lane receives
// the sums over its own 64 columns (units.h), which are of one scale and bias or of few:
//     sum_group = s * (sum(q * high) + sum(q * low)) + b * sum(x)
// A simdgroup keeps 256 columns of x and takes tiles of 16 matrix rows past them: 8 gate rows and
// their up rows, or 16 rows. Simdgroups that share a row meet in threadgroup memory.
// A row's order of additions follows from n_cols alone. Columns: a multiple of 64, at most 4096;
// codes and x lie at multiples of 16 bytes.
// Bound: 2^-20 * sum |w x| for weights spread over their range.
#include "common.h"
#include "units.h"

constant uint MU_LANE = 64, MU_SLICE = 4 * MU_LANE; // columns of a lane, of a simdgroup

// Tiles on their way: what registers allow.
inline uint mu_depth() { return FC_FORMAT == 2 ? 3 : 2; }

// Scales of a lane's columns.
inline uint mu_parts() { return FC_GROUP < MU_LANE ? MU_LANE / FC_GROUP : 1; }

// Two codes of a word, the j-th of each half, as subnormal halves; the lowest bit is `place`. Two
// shifts a word serve all of them. Low places are avoided: a matrix unit aligns products by their
// exponents as written, so each leading zero of a subnormal half is a bit that the sum loses.
inline uint mu_shift(uint j) { // to the right, of the j-th code, 4 more
    return FC_FORMAT == 2 ? (j < 2 ? 0 : j < 5 ? 4 : 10) : (j < 1 ? 0 : j < 2 ? 4 : 10);
}

inline uint mu_place(uint j) { return j * FC_FORMAT + 4 - mu_shift(j); }

inline uint mu_codes(uint w, uint j) {
    const uint mask = ((1u << FC_FORMAT) - 1) * 0x10001u << mu_place(j), shift = mu_shift(j);
    return (shift == 0 ? w << 4 : w >> (shift - 4)) & mask;
}

// The lane's 64 columns of the rows of a tile. Scales stay as they came until they are used, so
// that nothing waits for them.
struct mu_tile {
    uint4 w[2][2];
    uint scale[2][4], bias[2][4];
};

// A team's matrices and the place of the next tile in them. Rows past the last are read as it and
// not stored. Offsets in 32 bits are a register each.
struct mu_rows {
    device const uchar *codes[2], *scales[2], *biases[2];
    uint codes_off[2], scales_off[2], row[2];
    uint first[2], last, tiles, column; // tiles: to come in this pass over the rows
};

// Offsets of the pass's columns; columns past the last meet zeros of x.
inline void mu_pass(constant fm_mat_args &a, thread mu_rows &o) {
    const uint column = min(o.column, a.n_cols - MU_LANE);
#pragma unroll
    for (uint h = 0; h < 2; h++) {
        o.row[h] = o.first[h];
        o.codes_off[h] = column / 8 * FC_FORMAT;
        o.scales_off[h] = column / FC_GROUP * (FC_SCALE == FM_FMT_F32 ? 4 : 2);
    }
    o.tiles = a.pairs;
}

inline void mu_find(device const fm_metal_item &it, constant fm_mat_args &a, uint first,
                    uint column, thread mu_rows &o) {
    // no address is made from the null pointers of an entry without a job
    o.last = it.codes == nullptr ? 0 : it.n_out - 1;
#pragma unroll
    for (uint h = 0; h < 2; h++) {
        const bool up = FC_GATED && h == 1;
        const uint row = min(first + (FC_GATED ? 0 : 8 * h), o.last);
        const ulong s = ulong(row) * a.scales_stride;
        o.codes[h] = (device const uchar *)row_of(up ? it.up_codes : it.codes,
                                                  ulong(row) * a.codes_stride);
        o.scales[h] = (up ? it.up_scales : it.scales) + s;
        o.biases[h] = (up ? it.up_biases : it.biases) + s;
        o.first[h] = row;
    }
    o.column = column;
    mu_pass(a, o);
}

inline uint mu_bits(device const uchar *p, uint k) {
    return FC_SCALE == FM_FMT_F32 ? mu_load4(p + 4 * k) : mu_load2(p + 2 * k);
}

// Loads a tile and goes on to the next; after the last back to the first, `columns` further right.
inline void mu_load(thread mu_rows &o, constant fm_mat_args &a, uint columns, thread mu_tile &t) {
#pragma unroll
    for (uint h = 0; h < 2; h++) {
        const uint of = FC_GATED ? 0 : h; // a gate row and its up row have one number
#pragma unroll
        for (uint k = 0; k < mu_parts(); k++) {
            t.scale[h][k] = mu_bits(o.scales[h] + o.scales_off[of], k);
            t.bias[h][k] = mu_bits(o.biases[h] + o.scales_off[of], k);
        }
#pragma unroll
        for (uint i = 0; i < FC_FORMAT / 2; i++)
            t.w[h][i] = mu_load16(o.codes[h] + o.codes_off[of] + 16 * i);
    }
#pragma unroll
    for (uint h = 0; h < (FC_GATED ? 1 : 2); h++) {
        const uint next = min(o.row[h] + (FC_GATED ? 8 : 16), o.last), step = next - o.row[h];
        o.codes_off[h] += step * a.codes_stride;
        o.scales_off[h] += step * a.scales_stride;
        o.row[h] = next;
    }
    if (--o.tiles == 0) {
        o.column += columns;
        mu_pass(a, o);
    }
}

// Sums over the lane's columns of one scale, both rows; x: words of two columns.
inline void mu_dot(thread const uint *row, thread const uint *row8, thread const uint *x,
                   thread float2 &sum) {
    const uint n = 16 / FC_FORMAT, words = 2 * FC_FORMAT / mu_parts();
    mu_sums s[2]; // two chains: short ones, as matrix units cut what they add
    mu_clear(s[0]);
    mu_clear(s[1]);
#pragma unroll
    for (uint i = 0; i < words; i++)
#pragma unroll
        for (uint j = 0; j < n; j += 2)
            mu_add2(s[j / 2 % 2], uint2(mu_codes(row[i], j), mu_codes(row[i], j + 1)),
                    uint2(mu_codes(row8[i], j), mu_codes(row8[i], j + 1)),
                    uint2(x[i * n + j], x[i * n + j + 1]));
    const float2 a = mu_sum(s[0], 0) + mu_sum(s[1], 0), b = mu_sum(s[0], 1) + mu_sum(s[1], 1);
    sum = float2(a.x + a.y, b.x + b.y);
}

inline float mu_pick(bool second, float a, float b) { return second ? b : a; }

// The lane's share of two rows of a tile.
inline float2 mu_use(thread const mu_tile &t, thread const uint *x, thread const float *of_x) {
    const uint parts = mu_parts(), n = 2 * FC_FORMAT / parts;
    uint w[2][8];
#pragma unroll
    for (uint h = 0; h < 2; h++)
#pragma unroll
        for (uint i = 0; i < FC_FORMAT / 2; i++) {
            const uint4 v = t.w[h][i];
            w[h][4 * i] = v.x, w[h][4 * i + 1] = v.y, w[h][4 * i + 2] = v.z, w[h][4 * i + 3] = v.w;
        }
    float2 v = float2(0.0f);
#pragma unroll
    for (uint k = 0; k < parts; k++) {
        float2 q;
        mu_dot(w[0] + k * n, w[1] + k * n, x + 32 / parts * k, q);
        v.x = fma(plain_value(t.bias[0][k], FC_SCALE), of_x[k], v.x);
        v.y = fma(plain_value(t.bias[1][k], FC_SCALE), of_x[k], v.y);
        v.x = fma(plain_value(t.scale[0][k], FC_SCALE), q.x, v.x);
        v.y = fma(plain_value(t.scale[1][k], FC_SCALE), q.y, v.y);
    }
    return v;
}

// Adds up the lanes of a row; two of four each store a row's sum over the slice.
inline void mu_store(float2 v, uint lane, threadgroup float *part) {
    const uint quad = mu_quad(lane);
    const bool odd = quad % 2 != 0;
    float s = mu_pick(odd, v.x, v.y) + simd_shuffle_xor(mu_pick(odd, v.y, v.x), MU_NEXT);
    s += simd_shuffle_xor(s, MU_AFTER);
    if (quad < 2)
        part[8 * quad + mu_row(lane)] = s;
}

// Eight columns of x as the words that lanes take: 4 columns and the 4 which share their words.
// Words of one place lie 8 uint4 apart, one for each p of each quad, in an order that keeps banks
// apart. And the sums of x over the lanes' groups.
inline void mu_split(float4 a, float4 b, float scale, uint i, threadgroup uint4 *to,
                     threadgroup float *sums) {
    float sum = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
    sum += simd_shuffle_xor(sum, 1);
    if (FC_GROUP > 16)
        sum += simd_shuffle_xor(sum, 2);
    if (FC_GROUP > 32)
        sum += simd_shuffle_xor(sum, 4);
    if (i % (8 / mu_parts()) == 0) // in the units of products with subnormal halves
        sums[i % 32 / (8 / mu_parts())] = sum * scale * (1.0f / 16777216.0f);
    const uint j = FC_FORMAT == 2 ? i % 2 * 4 : 0;
    half2 high[4], low[4];
#pragma unroll
    for (uint k = 0; k < 4; k++) {
        // 2^-place, as the codes at this place are 2^place times as large
        const uint place = j == 0 ? mu_place(k) : mu_place(4 + k);
        const float f = scale * as_type<float>((127 - place) << 23);
        const float2 v = float2(a[k] * f, b[k] * f);
        high[k] = half2(v);
        low[k] = half2(v - float2(high[k]));
    }
#pragma unroll
    for (uint p = 0; p < 2; p++)
        to[i % 8 * 8 + ((i / 8 % 4 * 2 + p) ^ i % 8)] =
            uint4(mu_x_word(high[0], low[0], p), mu_x_word(high[1], low[1], p),
                  mu_x_word(high[2], low[2], p), mu_x_word(high[3], low[3], p));
}

// Threads: (FM_WIDTH * simdgroups that share a row, teams). A team takes a.pairs tiles over a.slices
// slices of 256 columns, in passes when it has fewer simdgroups.
// Groups: (outputs / outputs of a group, items, rows of x).
[[max_total_threads_per_threadgroup(FM_MU_THREADS)]]
kernel void mat_vec_units(device const fm_metal_item *items [[buffer(0)]],
                          constant fm_mat_args &a [[buffer(1)]],
                          device const float *x_all [[buffer(2)]],
                          device const int *rows [[buffer(3)]],
                          uint3 group [[threadgroup_position_in_grid]],
                          uint lane [[thread_index_in_simdgroup]],
                          uint sg [[simdgroup_index_in_threadgroup]],
                          uint3 at_thread [[thread_position_in_threadgroup]],
                          uint3 n_threads [[threads_per_threadgroup]]) {
    threadgroup uint4 words[FM_MU_SLICES * 64];
    threadgroup float parts[FM_MU_SLICES * FM_MU_TILES * 16];
    threadgroup float sums[FM_MU_SLICES * 16];
    threadgroup uint tops[FM_MU_SIMDGROUPS];
    device const fm_metal_item &it = items[group.y];
    const uint of_tile = FC_GATED ? 8 : 16, n_mine = of_tile * a.pairs;
    const uint n_teams = n_threads.y, t = group.z, first = group.x * n_teams * n_mine;
    const uint n_side = n_threads.x / FM_WIDTH, side = at_thread.x / FM_WIDTH;
    const uint n_sg = n_side * n_teams, row = mu_row(lane), quad = mu_quad(lane);
    mu_rows w;
    mu_find(it, a, first + at_thread.y * n_mine + row, side * MU_SLICE + quad * MU_LANE, w);
    const uint n_out = it.n_out;
    device float *y_all = it.y;
    const bool has_bias = it.has_bias != 0, add = it.add != 0;
    // tests of all that is needed, as one, have it fetched at once, not piece by piece later
    const bool up = !FC_GATED || ((it.up_codes != nullptr) & (it.up_scales != nullptr) &
                                  (it.up_biases != nullptr));
    if (!((t < it.n) & (first < n_out) & (it.codes != nullptr) & (it.scales != nullptr) &
          (it.biases != nullptr) & (y_all != nullptr) & up))
        return;
    const ulong x_row = a.gather ? uint(rows[it.row0 + t]) : it.row0 + t;
    device const float *x = x_all + x_row * a.ldx;
    const uint i = sg * FM_WIDTH + lane;
    float4 x0[2], x1[2]; // of every n_sg-th slice: eight columns a lane
    float top_here = 0.0f;
#pragma unroll
    for (uint k = 0; k < 2; k++) {
        const uint at = (sg + k * n_sg) * MU_SLICE;
        const uint c = at + (FC_FORMAT == 2 ? lane / 2 * 16 + lane % 2 * 4 : 8 * lane);
        x0[k] = x1[k] = float4(0.0f);
        if (c < a.n_cols) {
            x0[k] = *(device const float4 *)(x + c);
            x1[k] = *(device const float4 *)(x + c + (FC_FORMAT == 2 ? 8 : 4));
        }
    }
    const uint passes = a.slices / n_side, n_all = passes * a.pairs, columns = n_side * MU_SLICE;
    mu_tile tiles[3]; // the first before the others, which would only delay it
    mu_load(w, a, columns, tiles[0]);
#pragma unroll
    for (uint k = 0; k < 2; k++) {
        const float4 m = max(abs(x0[k]), abs(x1[k]));
        top_here = max(top_here, max(max(m.x, m.y), max(m.z, m.w)));
    }
    const uint top_of = simd_max(as_type<uint>(top_here));
    if (lane == 0)
        tops[sg] = top_of;
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll
    for (uint d = 1; d < mu_depth(); d++)
        if (d < n_all)
            mu_load(w, a, columns, tiles[d]);
    const uint top = simd_max(lane < n_sg ? tops[lane] : 0);
    // scale 2^(16 - exponent); its inverse and the 2^24 of subnormal halves are taken out at the end
    const uint bits = min(270 - (top >> 23), 253u);
    const float scale = as_type<float>(bits << 23), inverse = as_type<float>((254 - bits) << 23);
#pragma unroll
    for (uint k = 0; k < 2; k++) {
        const uint s = sg + k * n_sg;
        if (s < a.slices)
            mu_split(x0[k], x1[k], scale, lane, words + s * 64, sums + s * 16);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint mine[32], n = 0, slice = side; // tile n of a slice; its columns of x
    float of_x[4];
#pragma unroll 1
    for (uint m = 0; m < n_all; m += mu_depth()) {
#pragma unroll
        for (uint d = 0; d < mu_depth(); d++) {
            if (m + d >= n_all)
                break;
            if (n == 0) {
#pragma unroll
                for (uint j = 0; j < 8; j++) {
                    uint4 v = uint4(0);
                    if (row / 2 == quad)
                        v = words[slice * 64 + j * 8 + (row ^ j)];
                    mine[4 * j] = v.x, mine[4 * j + 1] = v.y;
                    mine[4 * j + 2] = v.z, mine[4 * j + 3] = v.w;
                }
#pragma unroll
                for (uint k = 0; k < mu_parts(); k++)
                    of_x[k] = sums[slice * 16 + quad * mu_parts() + k];
            }
            const float2 v = mu_use(tiles[d], mine, of_x);
            if (m + d + mu_depth() < n_all)
                mu_load(w, a, columns, tiles[d]);
            mu_store(v, lane, parts + ((at_thread.y * a.slices + slice) * a.pairs + n) * 16);
            if (++n == a.pairs)
                n = 0, slice += n_side;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll 1
    for (uint o = i; o < n_teams * n_mine; o += n_threads.x * n_teams) {
        threadgroup const float *p =
            parts + (o / n_mine * a.slices * a.pairs + o % n_mine / of_tile) * 16 + o % of_tile;
        float v = 0.0f, up = 0.0f;
#pragma unroll 4
        for (uint s = 0; s < a.slices; s++) {
            v += p[s * a.pairs * 16];
            up += FC_GATED ? p[s * a.pairs * 16 + 8] : 0.0f;
        }
        v = v * 16777216.0f * inverse;
        if (FC_GATED)
            v = silu(v) * (up * 16777216.0f * inverse);
        const uint at = first + o;
        if (at < n_out) {
            if (has_bias)
                v += it.bias[at];
            device float *y = y_all + ulong(t) * it.ldy + at;
            *y = add ? *y + v : v;
        }
    }
}
