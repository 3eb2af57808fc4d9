// y = W x for few rows of x and codes of 2 or 4 bits, on matrix units: mat_vec for GPUs to which
// taking a code to f32 costs more than a product (fm_metal_tune.units).
//
// A code that is masked in place within a 16-bit half is a subnormal half and enters a product as
// it is. x is scaled by a power of two, so that the largest of 256 columns lies in [2^16, 2^17), by
// another for the place of its code, and split into two halves, high and low, 22 bits in all; each
// lane receives the sums over its own columns (units.h), which are of one scale and bias or of few:
//     sum_group = s * (sum(q * high) + sum(q * low)) + b * sum(x)
// x lies in threadgroup memory. A simdgroup takes tiles of 16 matrix rows (8 gate rows and their up
// rows, or 16 rows) of a slice: 32 bytes of codes for each of a row's four lanes. Simdgroups that
// share a row meet in threadgroup memory.
// A row's order of additions follows from n_cols alone. Columns: a multiple of a lane's, at most
// 4096; codes and x lie at multiples of 16 bytes, scales and biases that share a load of 4.
// Bound: 2^-20 * sum |w x| for weights spread over their range.
#include "common.h"
#include "units.h"

// uint4s of x from four columns to the next four: 8, and one that keeps banks apart.
constant uint MU_PAD = 9;
constant uint MU_STEP = 256; // columns of x that a simdgroup splits at once

inline uint mu_lane() { return 256 / FC_FORMAT; } // columns of a lane

// Scales of a lane's columns; two share a load where they fit a word.
inline uint mu_parts() { return FC_GROUP < mu_lane() ? mu_lane() / FC_GROUP : 1; }
inline bool mu_paired() { return FC_SCALE != FM_FMT_F32 && mu_parts() > 1; }

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

// The lane's columns of the two rows of a tile.
struct mu_tile {
    uint4 w[2][2];
    uint scale[2][8], bias[2][8]; // as they came
};

// The next tile of a team. Rows past the last are read as it and not stored; columns past the last
// are read as the last lane's and meet zeros of x.
struct mu_rows {
    device const uchar *codes[2], *scales[2], *biases[2];
    uint row[2], first[2], last, step; // step: rows to the team's next tile
    uint tiles, to_come, column;       // of a pass over the rows; still to load in this one
};

inline uint mu_scale_bytes(uint column) {
    return column / FC_GROUP * (FC_SCALE == FM_FMT_F32 ? 4 : 2);
}

inline void mu_find(device const fm_metal_item &it, constant fm_mat_args &a, uint first,
                    uint column, thread mu_rows &o) {
    // no address is made from the null pointers of an entry without a job
    const bool job = it.codes != nullptr;
    o.last = job ? it.n_out - 1 : 0;
    o.column = job ? min(column, a.n_cols - mu_lane()) : 0;
#pragma unroll
    for (uint h = 0; h < 2; h++) {
        const bool up = FC_GATED && h == 1;
        const uint row = min(first + (FC_GATED ? 0 : 8 * h), o.last);
        const ulong s = ulong(row) * a.scales_stride + mu_scale_bytes(o.column);
        o.codes[h] = (device const uchar *)row_of(up ? it.up_codes : it.codes,
                                                  ulong(row) * a.codes_stride) +
                     o.column / 8 * FC_FORMAT;
        o.scales[h] = (up ? it.up_scales : it.scales) + s;
        o.biases[h] = (up ? it.up_biases : it.biases) + s;
        o.row[h] = o.first[h] = row;
    }
}

inline void mu_move(thread mu_rows &o, uint h, long codes, long scales) {
    o.codes[h] += codes;
    o.scales[h] += scales;
    o.biases[h] += scales;
}

// Loads a tile and goes on to the next; after the last back to the first, `columns` further right.
inline void mu_load(thread mu_rows &o, constant fm_mat_args &a, uint columns, thread mu_tile &t) {
#pragma unroll
    for (uint h = 0; h < 2; h++) {
#pragma unroll
        for (uint i = 0; i < 2; i++)
            t.w[h][i] = mu_load16(o.codes[h] + 16 * i);
#pragma unroll
        for (uint k = 0; k < (mu_paired() ? mu_parts() / 2 : mu_parts()); k++) {
            const bool word = mu_paired() || FC_SCALE == FM_FMT_F32;
            t.scale[h][k] = word ? mu_load4(o.scales[h] + 4 * k) : mu_load2(o.scales[h]);
            t.bias[h][k] = word ? mu_load4(o.biases[h] + 4 * k) : mu_load2(o.biases[h]);
        }
    }
    const uint row[2] = {o.row[0], o.row[FC_GATED ? 0 : 1]}; // a gate row's number is its up row's
#pragma unroll
    for (uint h = 0; h < 2; h++) {
        o.row[h] = min(row[h] + o.step, o.last);
        const ulong n = o.row[h] - row[h];
        mu_move(o, h, long(n * a.codes_stride), long(n * a.scales_stride));
    }
    if (--o.to_come == 0) {
        const uint column = min(o.column + columns, a.n_cols - mu_lane());
#pragma unroll
        for (uint h = 0; h < 2; h++) {
            const long n = o.row[h] - o.first[h];
            mu_move(o, h, long((column - o.column) / 8 * FC_FORMAT) - n * long(a.codes_stride),
                    long(mu_scale_bytes(column) - mu_scale_bytes(o.column)) -
                        n * long(a.scales_stride));
            o.row[h] = o.first[h];
        }
        o.to_come = o.tiles, o.column = column;
    }
}

inline float mu_value(thread const uint *w, uint k) {
    return plain_value(mu_paired() ? w[k / 2] >> (k % 2 * 16) & 0xffff : w[k], FC_SCALE);
}

// The lane's share of two rows of a tile; and loads the next, if there are `more`. x: its words in
// threadgroup memory, if they are its `own`; `mine` holds them for a while, in other lanes zeros.
inline float2 mu_use(thread const mu_tile &t, threadgroup const uint4 *x, bool own,
                     thread uint4 *mine, thread const float *of_x, bool more, thread mu_rows &w,
                     constant fm_mat_args &args, uint columns, thread mu_tile &next) {
    const uint n = 16 / FC_FORMAT, words = 8 / mu_parts(); // codes of a word; words of a scale
    float2 v = float2(0.0f);
#pragma unroll
    for (uint k = 0; k < mu_parts(); k++) {
        mu_sums s[2]; // two chains: short ones, as matrix units cut what they add
        mu_clear(s[0]);
        mu_clear(s[1]);
#pragma unroll
        for (uint i = k * words; i < (k + 1) * words; i++) {
            const uint4 r = t.w[0][i / 4], r8 = t.w[1][i / 4];
            const uint a = i % 4 == 0 ? r.x : i % 4 == 1 ? r.y : i % 4 == 2 ? r.z : r.w;
            const uint b = i % 4 == 0 ? r8.x : i % 4 == 1 ? r8.y : i % 4 == 2 ? r8.z : r8.w;
#pragma unroll
            for (uint j = 0; j < n; j += 4) {
                const uint at = (i * n + j) / 4;
                if (own)
                    mine[at % 2] = x[at * MU_PAD];
                const uint4 u = mine[at % 2];
                mu_add2(s[0], uint2(mu_codes(a, j), mu_codes(a, j + 1)),
                        uint2(mu_codes(b, j), mu_codes(b, j + 1)), uint2(u.x, u.y));
                mu_add2(s[1], uint2(mu_codes(a, j + 2), mu_codes(a, j + 3)),
                        uint2(mu_codes(b, j + 2), mu_codes(b, j + 3)), uint2(u.z, u.w));
            }
            // Not before: NVIDIA's assembler counts all loads of a loop as one, so that a wait for
            // this tile would be for the next too. And no product moves past a condition.
            if (i == 0 && more)
                mu_load(w, args, columns, next);
        }
        const float2 p = mu_sum(s[0], 0) + mu_sum(s[1], 0), q = mu_sum(s[0], 1) + mu_sum(s[1], 1);
        v.x = fma(mu_value(t.bias[0], k), of_x[k], v.x);
        v.y = fma(mu_value(t.bias[1], k), of_x[k], v.y);
        v.x = fma(mu_value(t.scale[0], k), p.x + p.y, v.x);
        v.y = fma(mu_value(t.scale[1], k), q.x + q.y, v.y);
    }
    return v;
}

// Adds up the lanes of a row; two of four each store a row's sum over the slice.
inline void mu_store(float2 v, uint lane, threadgroup float *part) {
    const uint quad = mu_quad(lane);
    const bool odd = quad % 2 != 0;
    float s = pick(odd, v.x, v.y) + simd_shuffle_xor(pick(odd, v.y, v.x), MU_NEXT);
    s += simd_shuffle_xor(s, MU_AFTER);
    if (quad < 2)
        part[8 * quad + mu_row(lane)] = s;
}

// Eight columns of x as the words that lanes take: 4 columns and the 4 which share their words, as
// two uint4, one for each p. Unit u counts them over all columns. And the sums of x over groups.
inline void mu_split(float4 a, float4 b, float scale, uint u, threadgroup uint4 *words,
                     threadgroup float *sums) {
    const uint per = min(FC_GROUP, mu_lane()) / 8, of_lane = mu_lane() / 8; // units
    float sum = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
#pragma unroll
    for (uint m = 1; m < per; m *= 2)
        sum += simd_shuffle_xor(sum, ushort(m));
    if (u % per == 0) // in the units of products with subnormal halves
        sums[u / per] = sum * scale * (1.0f / 16777216.0f);
    const uint j = FC_FORMAT == 2 ? u % 2 * 4 : 0;
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
    const uint lane = u / of_lane; // of all slices
    threadgroup uint4 *to = words + (lane / 4 * of_lane + u % of_lane) * MU_PAD + lane % 4 * 2;
#pragma unroll
    for (uint p = 0; p < 2; p++)
        to[p] = uint4(mu_x_word(high[0], low[0], p), mu_x_word(high[1], low[1], p),
                      mu_x_word(high[2], low[2], p), mu_x_word(high[3], low[3], p));
}

// Threads: (FM_WIDTH * simdgroups that share a row, teams). The teams take a.pairs tiles in turns,
// over a.slices slices, in passes when a team has fewer simdgroups.
// Groups: (outputs / outputs of a.pairs tiles, items, rows of x).
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
    threadgroup uint4 words[FM_MU_COLUMNS / 32 * MU_PAD];
    threadgroup float parts[FM_MU_PARTS * 16];
    threadgroup float sums[FM_MU_COLUMNS / 16];
    threadgroup float inverses[FM_MU_COLUMNS / MU_STEP];
    device const fm_metal_item &it = items[group.y];
    const uint of_tile = FC_GATED ? 8 : 16, t = group.z, first = group.x * a.pairs * of_tile;
    const uint n_side = n_threads.x / FM_WIDTH, side = at_thread.x / FM_WIDTH;
    const uint n_teams = n_threads.y, team = at_thread.y, n_sg = n_side * n_teams;
    const uint row = mu_row(lane), quad = mu_quad(lane);
    mu_rows w;
    mu_find(it, a, first + team * of_tile + row, (4 * side + quad) * mu_lane(), w);
    const uint n_out = it.n_out, ldy = it.ldy, has_bias = it.has_bias, add = it.add;
    device float *y_all = it.y;
    // tests of all that is needed, as one, have it fetched at once, not piece by piece later
    const bool up = !FC_GATED || ((it.up_codes != nullptr) & (it.up_scales != nullptr) &
                                  (it.up_biases != nullptr));
    if (!((t < it.n) & (first < n_out) & (it.codes != nullptr) & (it.scales != nullptr) &
          (it.biases != nullptr) & (y_all != nullptr) & ((has_bias | add) < 2) & up))
        return;
    const ulong x_row = a.gather ? uint(rows[it.row0 + t]) : it.row0 + t;
    device const float *x = x_all + x_row * a.ldx;
    const uint i = sg * FM_WIDTH + lane;
    float4 x0[2], x1[2]; // of every n_sg-th step: eight columns a lane
#pragma unroll
    for (uint k = 0; k < 2; k++) {
        const uint at = (sg + k * n_sg) * MU_STEP;
        const uint c = at + (FC_FORMAT == 2 ? lane / 2 * 16 + lane % 2 * 4 : 8 * lane);
        x0[k] = x1[k] = float4(0.0f);
        if (c < a.n_cols) {
            x0[k] = *(device const float4 *)(x + c);
            x1[k] = *(device const float4 *)(x + c + (FC_FORMAT == 2 ? 8 : 4));
        }
    }
    const uint n_tiles = min(a.pairs, (n_out - first + of_tile - 1) / of_tile);
    w.tiles = w.to_come = (n_tiles + n_teams - 1 - team) / n_teams;
    w.step = n_teams * of_tile;
    const uint n_all = a.slices / n_side * w.tiles, columns = n_side * 4 * mu_lane();
    mu_tile tiles[2];
    mu_load(w, a, columns, tiles[0]);
    // Both before the first condition: behind it a wait for x is one for the tile too (see mu_use).
    uint tops[2];
#pragma unroll
    for (uint k = 0; k < 2; k++) {
        const float4 m = max(abs(x0[k]), abs(x1[k]));
        tops[k] = as_type<uint>(max(max(m.x, m.y), max(m.z, m.w)));
    }
#pragma unroll
    for (uint k = 0; k < 2; k++) {
        const uint top = simd_max(tops[k]);
        // scale 2^(16 - exponent); its inverse and the 2^24 of subnormal halves are taken out later
        const uint bits = min(270 - (top >> 23), 253u), s = sg + k * n_sg;
        if (s * MU_STEP < a.slices * 4 * mu_lane()) {
            mu_split(x0[k], x1[k], as_type<float>(bits << 23), s * FM_WIDTH + lane, words, sums);
            if (lane == 0)
                inverses[s] = as_type<float>((254 - bits) << 23);
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    const bool own = row / 2 == quad;
    uint4 mine[2] = {uint4(0), uint4(0)};
    uint n = 0, slice = side; // tile n of a slice; its columns of x
    float of_x[8], inverse = 0.0f;
    threadgroup const uint4 *x_words = words;
#pragma unroll 1
    for (uint m = 0; m < n_all; m += 2) {
#pragma unroll
        for (uint d = 0; d < 2; d++) {
            if (m + d >= n_all)
                break;
            if (n == 0) {
                const uint at = 4 * slice + quad; // lane of all slices
                x_words = words + slice * (mu_lane() / 8) * MU_PAD + row;
                inverse = inverses[at * mu_lane() / MU_STEP];
#pragma unroll
                for (uint k = 0; k < mu_parts(); k++)
                    of_x[k] = sums[at * mu_parts() + k];
            }
            const float2 v = mu_use(tiles[d], x_words, own, mine, of_x, m + d + 1 < n_all, w, a,
                                    columns, tiles[1 - d]);
            mu_store(v * 16777216.0f * inverse, lane,
                     parts + (slice * a.pairs + n * n_teams + team) * 16);
            if (++n == w.tiles)
                n = 0, slice += n_side;
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#pragma unroll 1
    for (uint o = i; o < n_tiles * of_tile; o += n_sg * FM_WIDTH) {
        threadgroup const float *p = parts + o / of_tile * 16 + o % of_tile;
        float v = 0.0f, up = 0.0f;
#pragma unroll 4
        for (uint s = 0; s < a.slices; s++) {
            v += p[s * a.pairs * 16];
            up += FC_GATED ? p[s * a.pairs * 16 + 8] : 0.0f;
        }
        if (FC_GATED)
            v = silu(v) * up;
        const uint at = first + o;
        if (at < n_out) {
            if (has_bias)
                v += it.bias[at];
            device float *y = y_all + ulong(t) * ldy + at;
            *y = add ? *y + v : v;
        }
    }
}
