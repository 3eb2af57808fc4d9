/* Owns: mode `fast` (vec_fast.h holds the arithmetic) for one or two rows of x, as decode has them. Memory is the bound
 * there, and a core only reads at full speed in long runs: so W is walked row by row in its own order, and lanes are
 * columns. Two such runs take turns, because the hardware's prefetcher stops at the end of a page. A chunk of VB bytes
 * of codes gives VB bytes per plane (two nibbles, four crumbs), whose products with x, laid out in the same order, fall
 * into lanes of 4 columns; trees of pairwise sums bring the sums of VL blocks into one vector, beside which scales and
 * biases lie as they are in memory. When VL rows are through, the scaled blocks are transposed and added in order with
 * lanes = rows. Where a row has few blocks, several rows make one vector. */
#ifndef FM_CPU_VEC_FAST_ROWS_H
#define FM_CPU_VEC_FAST_ROWS_H

#include "cpu/vec_fast.h"

enum {
    FAST_MAX_T = 2,  /* rows of x */
    ROWS_SUBS = 128, /* blocks per pass */
    ROWS_K = ROWS_SUBS * FAST_BLOCK,
    ROWS_AHEAD = 768, /* bytes; up to 6144 were tried */
    ROWS_STRIPS = 2,   /* 1 and 8 read slower, 4 no faster on the whole */
};

typedef struct rows_work {
    _Alignas(64) int8_t q[FAST_MAX_T][2 * ROWS_K];         /* [chunk][plane][hi, lo][VB] */
    _Alignas(64) float qs[FAST_MAX_T][ROWS_SUBS];          /* sums of q */
    _Alignas(64) float part[FAST_MAX_T][ROWS_STRIPS * VL * ROWS_SUBS + VL]; /* [row][block]: isum*scale + bias*qsum */
} rows_work;

/* How the rows of one call are walked. */
typedef struct rows_walk {
    int sub_shift, group_shift;
    v_cut cut;
    int64_t fold;    /* rows that make one vector of blocks; 1: each row starts its own */
    int64_t n_sub;   /* blocks per row of this pass */
    int64_t stride;  /* of part */
} rows_walk;

/* VB columns in natural order -> VB / planes bytes of each plane, planes 2*VB apart. */
FM_INLINE void rows_split(const int8_t *from, int planes, int8_t *to)
{
    typedef uint16_t pairs __attribute__((vector_size(VB)));
    typedef uint8_t half __attribute__((vector_size(VB / 2)));
    typedef uint8_t quarter __attribute__((vector_size(VB / 4)));
    if (planes == 1) {
        memcpy(to, from, VB);
    } else if (planes == 2) {
        pairs v;
        memcpy(&v, from, sizeof v);
        for (int p = 0; p < 2; p++, to += 2 * VB) {
            const half h = __builtin_convertvector(v >> (8 * p) & 0xff, half);
            memcpy(to, &h, sizeof h);
        }
    } else {
        const vu v = vu_load(from);
        for (int p = 0; p < 4; p++, to += 2 * VB) {
            const quarter h = __builtin_convertvector(v >> (8 * p) & 0xff, quarter);
            memcpy(to, &h, sizeof h);
        }
    }
}

/* Columns k0 .. of x in chunk order, `fold` times over, zeros past x's padding. */
FM_INLINE void rows_spread(const fast_x *x, int64_t k0, int64_t padded, const rows_walk *v, int planes, int8_t *to,
                           float *qs)
{
    const int64_t kn = v->n_sub << v->sub_shift; /* a folded row has fewer than VL blocks: `all` is then one vector */
    const int64_t all = (v->n_sub + VL - 1) / VL * VL << v->sub_shift;
    for (int64_t c = 0; c < all; c += planes * VB, to += 2 * VB * planes) {
        const int64_t at = k0 + (v->fold > 1 ? c % kn : c);
        if (at >= padded) {
            memset(to, 0, (size_t)(2 * VB * planes));
            continue;
        }
        for (int j = 0; j < planes; j++)
            for (int term = 0; term < 2; term++)
                rows_split(fast_term(x, at + j * VB, term), planes, to + term * VB + j * VB / planes);
    }
    for (int64_t b = 0; b < all >> v->sub_shift; b++)
        qs[b] = v->fold > 1 ? x->qs[b % v->n_sub] : b < v->n_sub ? x->qs[(k0 >> v->sub_shift) + b] : 0;
}

/* Integer sums of VL blocks: n_chunks = sub / (4 * planes) chunks, `have` bytes of codes. */
FM_INLINE void rows_batch(const uint8_t *code, int64_t have, const rows_work *w, int64_t at, const v_cut *cut, int bits,
                          int planes, int n_chunks, bool wide, bool tail, int T, vi *out)
{
    const int64_t step = VB * planes * bits / 8;
    vi part[FAST_MAX_T][4] = {{{0}}};
#pragma GCC unroll 4
    for (int j = 0; j < n_chunks; j += 4) {
        vi h[FAST_MAX_T][4] = {{{0}}}, l[FAST_MAX_T][4] = {{{0}}};
        const int n = n_chunks < 4 ? n_chunks : 4; /* one condition: gcc -O0 warns of a pragma before two */
#pragma GCC unroll 4
        for (int i = 0; i < n; i++, code += step, have -= step) {
            vu d;
            if (bits == 8 || planes > 1) /* computing fills the core's window: too few lines are under way by itself */
                __builtin_prefetch(code + (planes == 4 ? 2 * ROWS_AHEAD : ROWS_AHEAD), 0, 3);
            if (planes == 1 && bits != 8)
                d = tail && have <= 0 ? (vu){0} : (vu)v_unpack(cut, code, have);
            else if (!tail || have >= VB)
                d = vu_load(code);
            else
                d = have <= 0 ? (vu){0} : vu_load_part(code, have / 4); /* rows are whole dwords: group >= 16 */
#pragma GCC unroll 4
            for (int p = 0; p < planes; p++) {
                const vu u = planes == 1 ? d : v_plane(d, planes, p);
#pragma GCC unroll 2
                for (int t = 0; t < T; t++) {
                    const int8_t *q = w->q[t] + at + ((j + i) * planes + p) * 2 * VB;
                    h[t][i] = vi_dp(h[t][i], u, (vi)vu_load(q), wide);
                    l[t][i] = vi_dp(l[t][i], u, (vi)vu_load(q + VB), wide);
                }
            }
        }
#pragma GCC unroll 2
        for (int t = 0; t < T; t++) {
            if (n_chunks >= 4)
                part[t][j / 4] = vi_quad(h[t], l[t], planes > 1);
            else if (n_chunks == 2)
                part[t][0] = vi_hadd((h[t][0] << 7) + l[t][0], (h[t][1] << 7) + l[t][1]);
            else
                part[t][0] = (h[t][0] << 7) + l[t][0];
        }
    }
#pragma GCC unroll 2
    for (int t = 0; t < T; t++)
        out[t] = n_chunks <= 4   ? part[t][0]
                 : n_chunks == 8 ? vi_hadd(part[t][0], part[t][1])
                                 : vi_hadd(vi_hadd(part[t][0], part[t][1]), vi_hadd(part[t][2], part[t][3]));
}

/* n <= VL scales or biases from block b on. */
FM_INLINE vf rows_numbers(const fm_mat *W, const uint8_t *row, int64_t b, int64_t n, int shift)
{
    const int64_t size = plain_bytes(W->scale_format);
    if (shift == 0 && n == VL)
        return W->scale_format == FM_QUANT_BF16  ? vf_from_bf16(row + b * size)
               : W->scale_format == FM_QUANT_F16 ? vf_from_f16(row + b * size)
                                                 : vf_load(row + b * size);
    if (shift == 0)
        return vf_load_num(row + b * size, W->scale_format, n);
    float f[VL] = {0};
    for (int64_t i = 0; i < n; i++)
        f[i] = vf_load_num(row + ((b + i) >> shift) * size, W->scale_format, 1)[0];
    return vf_load(f);
}

/* One row of W, or `fold` rows: blocks scaled to part[t]. */
FM_INLINE void rows_row(const fm_mat *W, const uint8_t *code, int64_t have, const uint8_t *scale, const uint8_t *bias,
                        rows_work *w, const rows_walk *v, int bits, int planes, int n_chunks, bool wide, bool usual, int T,
                        int64_t at)
{
    const int64_t step = (int64_t)n_chunks * VB * bits / 8 * planes, q_step = (int64_t)n_chunks * VB * 2 * planes;
    const int64_t n_sub = v->fold > 1 ? VL : v->n_sub;
    const int shift = usual ? 0 : v->group_shift - v->sub_shift;
    int64_t q_at = 0;
    for (int64_t b = 0; b < n_sub; b += VL, code += step, have -= step, q_at += q_step) {
        vi sum[FAST_MAX_T];
        const int64_t n = n_sub - b < VL ? n_sub - b : VL;
        if (n == VL)
            rows_batch(code, have, w, q_at, &v->cut, bits, planes, n_chunks, wide, false, T, sum);
        else
            rows_batch(code, have, w, q_at, &v->cut, bits, planes, n_chunks, wide, true, T, sum);
        __builtin_prefetch(scale + ROWS_AHEAD / 2 + b * 2, 0, 3);
        __builtin_prefetch(bias + ROWS_AHEAD / 2 + b * 2, 0, 3);
        const vf s = rows_numbers(W, scale, b, n, shift), o = rows_numbers(W, bias, b, n, shift);
        for (int t = 0; t < T; t++)
            vf_store(w->part[t] + at + b,
                     vf_fma(__builtin_convertvector(sum[t], vf), s, o * vf_load(w->qs[t] + b)));
    }
}

/* acc += the blocks of VL rows, in order. */
FM_INLINE vf rows_add(const float *part, const rows_walk *v, const float *xs, vf acc)
{
    for (int64_t b = 0; b < v->n_sub; b += VL) {
        vu d[VL];
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++)
            d[i] = vu_load(part + i * v->stride + b);
        v_transpose(d);
        const int64_t n = v->n_sub - b < VL ? v->n_sub - b : VL;
        if (n == VL) {
#pragma GCC unroll 16
            for (int i = 0; i < VL; i++)
                acc = vf_fma((vf)d[i], vf_set(xs[(b + i) << v->sub_shift >> 6]), acc);
        } else {
            for (int64_t i = 0; i < n; i++)
                acc = vf_fma((vf)d[i], vf_set(xs[(b + i) << v->sub_shift >> 6]), acc);
        }
    }
    return acc;
}

/* y gets, or in later passes is increased by, the blocks at part + from: of n rows of W. */
FM_INLINE void rows_put(const rows_work *w, const rows_walk *v, const fast_x *x, int64_t k0, int64_t from, float *y,
                        int64_t ldy, int64_t n, int T)
{
    for (int t = 0; t < T; t++, y += ldy) {
        const vf before = k0 == 0 ? (vf){0} : n == VL ? vf_load(y) : vf_load_part(y, n);
        const vf acc = rows_add(w->part[t] + from, v, x[t].xs + (k0 >> 6), before);
        if (n == VL)
            vf_store(y, acc);
        else
            vf_store_part(y, acc, n);
    }
}

/* VL rows from r of each strip, row by row in turn, or n < VL rows of the only strip; the columns of one pass from k0. */
FM_INLINE void rows_tiles(const fm_mat *W, rows_work *w, rows_walk *v, int64_t k0, int64_t r, int64_t n,
                          int64_t strip_rows, int64_t n_strips, int bits, int planes, int n_chunks, bool wide,
                          bool usual, int T)
{
    const int64_t from = k0 * bits / 8, g0 = k0 >> v->group_shift, size = plain_bytes(W->scale_format);
    for (int64_t i = 0; i < n; i += v->fold)
        for (int64_t s = 0; s < n_strips; s++) {
            const int64_t row = r + s * strip_rows + i;
            rows_row(W, W->codes + row * W->codes_stride + from, v->fold * W->codes_stride - from,
                     W->scales + row * W->scales_stride + g0 * size, W->biases + row * W->scales_stride + g0 * size,
                     w, v, bits, planes, n_chunks, wide, usual, T, (s * VL + i) * v->stride);
        }
    for (int64_t i = n; i < VL; i++)
        for (int t = 0; t < T; t++)
            memset(w->part[t] + i * v->stride, 0, (size_t)v->stride * sizeof(float));
}

/* Rows of one vector: with few blocks a row, and rows that follow each other without a gap. */
FM_INLINE int64_t rows_fold(const fm_mat *W, const rows_walk *v, int bits, int planes)
{
    const int64_t size = plain_bytes(W->scale_format), n_sub = W->n_cols >> v->sub_shift;
    const bool packed = W->codes_stride * 8 == W->n_cols * bits && W->scales_stride == n_sub * size &&
                        v->sub_shift == v->group_shift;
    return packed && n_sub < VL && VL % n_sub == 0 && n_sub << v->sub_shift >= VB * planes ? VL / n_sub : 1;
}

/* Where a strip begins: on its way while x is laid out. */
FM_INLINE void rows_prefetch(const fm_mat *W, int64_t row)
{
    for (int64_t i = 0; i < ROWS_AHEAD; i += 64)
        __builtin_prefetch(W->codes + row * W->codes_stride + i, 0, 3);
    for (int64_t i = 0; i < ROWS_AHEAD / 2; i += 64) {
        __builtin_prefetch(W->scales + row * W->scales_stride + i, 0, 3);
        __builtin_prefetch(W->biases + row * W->scales_stride + i, 0, 3);
    }
}

FM_INLINE void fast_few_as(const fm_mat *W, const fm_act *a, int64_t i0, float *y, int64_t ldy, int64_t r0, int64_t r1,
                           int T, int planes, bool usual)
{
    const fast_shape f = fast_shape_of(W);
    const int bits = planes == 1 ? f.bits : 8 / planes, sub_shift = usual ? 6 : f.sub_shift;
    const int n_chunks = (1 << sub_shift) / (4 * planes);
    const int64_t pass = (int64_t)ROWS_SUBS << sub_shift, padded = fast_padded(W->n_cols);
    const bool wide = !(VI_DP_SPLITS && f.bits < 8);
    rows_walk v = {.sub_shift = sub_shift, .group_shift = f.group_shift, .cut = v_cut_make(bits)};
    const int64_t fold = rows_fold(W, &v, bits, planes);
    rows_work w;
    fast_x x[FAST_MAX_T];
    for (int t = 0; t < T; t++)
        x[t] = fast_row(a, i0 + t, f.sub);
    const int64_t strip = (r1 - r0) / VL / ROWS_STRIPS * VL; /* two strips of whole tiles, and what is left over */
    for (int64_t s = 0; s < ROWS_STRIPS; s++)
        rows_prefetch(W, r0 + s * strip);
    for (int64_t k0 = 0; k0 < W->n_cols; k0 += pass) {
        const int64_t kn = W->n_cols - k0 < pass ? W->n_cols - k0 : pass;
        v.n_sub = kn >> sub_shift;
        v.fold = fold;
        v.stride = fold > 1 ? v.n_sub : (v.n_sub + VL - 1) / VL * VL;
        for (int t = 0; t < T; t++)
            rows_spread(&x[t], k0, padded, &v, planes, w.q[t], w.qs[t]);
        for (int64_t r = r0; r < r0 + strip; r += VL) {
            rows_tiles(W, &w, &v, k0, r, VL, strip, ROWS_STRIPS, bits, planes, n_chunks, wide, usual, T);
            for (int64_t s = 0; s < ROWS_STRIPS; s++)
                rows_put(&w, &v, x, k0, s * VL * v.stride, y + i0 * ldy + r + s * strip, ldy, VL, T);
        }
        for (int64_t r = r0 + ROWS_STRIPS * strip; r < r1; r += VL) {
            const int64_t n = r1 - r < VL ? r1 - r : VL;
            if (n % v.fold != 0) { /* the last few rows: x lies right for single ones too */
                v.fold = 1;
                v.stride = VL;
            }
            rows_tiles(W, &w, &v, k0, r, n, 0, 1, bits, planes, n_chunks, wide, usual, T);
            rows_put(&w, &v, x, k0, 0, y + i0 * ldy + r, ldy, n, T);
        }
    }
}

/* One or two rows; one by one where the group is unusual. */
#define FAST_FEW(name, planes)                                                                     \
    static void fast_few_##name(const fm_mat *W, const fm_act *a, int64_t n, float *y, int64_t ldy, int64_t r0,    \
                                int64_t r1)                                                        \
    {                                                                                              \
        if (W->group != 64)                                                                        \
            for (int64_t i = 0; i < n; i++)                                                        \
                fast_few_as(W, a, i, y, ldy, r0, r1, 1, planes, false);                                \
        else if (n == 1)                                                                           \
            fast_few_as(W, a, 0, y, ldy, r0, r1, 1, planes, true);                                   \
        else                                                                                       \
            fast_few_as(W, a, 0, y, ldy, r0, r1, 2, planes, true);                                   \
    }
FAST_FEW(p1, 1)
FAST_FEW(p2, 2)
FAST_FEW(p4, 4)

#endif
