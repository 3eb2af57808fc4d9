/* Owns: numeric mode `fast` of matmul for affine weights: activations as 15-bit integers in blocks of 64 with one fp32
 * scale (kernels.h, FM_NUMERIC_FAST), held as two int8 terms q = 128 hi + lo; u8 x s8 dot products, exact in int32: a
 * block adds at most 64*255*16256 < 2^28.
 *
 * Per row of W and block b of min(group, 64) columns, in rising order of b:
 *   acc = fma( fma(isum, scale, bias * qsum), xs, acc )
 * The integer sums are exact, so every way to form them gives the same bits: vec_fast_rows.h walks W row by row for one
 * or two rows of x, vec_fast_mm.h unpacks it once to memory for more. */
#ifndef FM_CPU_VEC_FAST_H
#define FM_CPU_VEC_FAST_H

#include "cpu/kernels.h"
#include "cpu/vec.h"

enum {
    FAST_BLOCK = 64,
    FAST_PAD = 256,   /* prepared rows are whole chunks of every format; the padding is 0 */
    FAST_TOP = 16256, /* |q|: 127 * 128, so that both terms fit int8 */
};

FM_INLINE int64_t fast_padded(int64_t n_cols) { return (n_cols + FAST_PAD - 1) / FAST_PAD * FAST_PAD; }

/* One prepared row: q as [block of 64][hi, lo][64], xs per block, qs = sum of q per sub-block. */
typedef struct fast_x {
    const int8_t *q;
    const float *xs, *qs;
} fast_x;

FM_STATIC size_t fast_act_bytes(int64_t n, int64_t n_cols) { return (size_t)n * (size_t)fast_padded(n_cols) * 5 / 2; }

FM_INLINE fast_x fast_row(const fm_act *a, int64_t i, int64_t sub)
{
    const int64_t cols = fast_padded(a->n_cols), r = a->rows ? a->rows[i] : a->row0 + i;
    const int8_t *base = (const int8_t *)a->prepared + r * (cols * 5 / 2);
    const float *xs = (const float *)(base + 2 * cols), *qs = xs + cols / 64;
    qs += sub == 16 ? 0 : sub == 32 ? cols / 16 : cols / 16 + cols / 32;
    return (fast_x){base, xs, qs};
}

/* Where term 0 (hi) or 1 (lo) of columns c .. of the same block lies. */
FM_INLINE const int8_t *fast_term(const fast_x *x, int64_t c, int term)
{
    return x->q + (c >> 6 << 7) + (c & 63) + 64 * term;
}

/* 64 columns; x beyond n reads as 0. A NaN or inf makes the block's scale non-finite, and with it every y. */
FM_INLINE void fast_block(const float *x, int64_t n, int8_t *to, float *xs, float *qs16, float *qs32, float *qs64)
{
    vf v[64 / VL];
    vi top = {0};
#pragma GCC unroll 16
    for (int i = 0; i < 64 / VL; i++) {
        v[i] = n >= (i + 1) * VL ? vf_load(x + i * VL) : n > i * VL ? vf_load_part(x + i * VL, n - i * VL) : (vf){0};
        const vi abs = (vi)v[i] & 0x7fffffff; /* as integers NaN > inf > numbers */
        const vi more = abs > top;
        top = (abs & more) | (top & ~more);
    }
    const int32_t max = vi_top(top);
    float amax;
    memcpy(&amax, &max, sizeof amax);
    if (max < 0x0d800000) /* 2^-100: as good as 0, and FAST_TOP / amax must not overflow */
        amax = 0;
    const float inv = amax == 0 ? 0 : FAST_TOP / amax;
    *xs = amax / FAST_TOP;
    typedef int8_t part __attribute__((vector_size(VL)));
    vi q[64 / VL];
#pragma GCC unroll 16
    for (int i = 0; i < 64 / VL; i++) {
        const vi all = vf_round_i(v[i] * inv), hi = (all + 64) >> 7;
        const part h = __builtin_convertvector(hi, part), l = __builtin_convertvector(all - (hi << 7), part);
        memcpy(to + i * VL, &h, sizeof h);
        memcpy(to + 64 + i * VL, &l, sizeof l);
        q[i] = (vi)((vu)all << 8) >> 8; /* NaN rounds to anything: its scale settles the result */
    }
#pragma GCC unroll 4
    for (int n = 32 / VL; n > 0; n /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < n; i++)
            q[i] = vi_hadd(q[2 * i], q[2 * i + 1]);
#pragma GCC unroll 2
    for (int n = VL; n > 4; n /= 2)
        q[0] = vi_hadd(q[0], q[0]);
    int32_t s16[VL];
    memcpy(s16, &q[0], sizeof s16);
    for (int i = 0; i < 4; i++)
        qs16[i] = (float)s16[i];
    qs32[0] = (float)(s16[0] + s16[1]);
    qs32[1] = (float)(s16[2] + s16[3]);
    *qs64 = (float)(s16[0] + s16[1] + s16[2] + s16[3]);
}

FM_STATIC void fast_act_prepare(const fm_act *a, int64_t n, int64_t r0, int64_t r1)
{
    (void)n;
    const int64_t cols = fast_padded(a->n_cols);
    for (int64_t r = r0; r < r1; r++) {
        int8_t *q = (int8_t *)a->prepared + r * (cols * 5 / 2);
        float *xs = (float *)(q + 2 * cols), *qs16 = xs + cols / 64, *qs32 = qs16 + cols / 16, *qs64 = qs32 + cols / 32;
        for (int64_t c = 0; c < cols; c += 64)
            fast_block(a->x + r * a->ldx + c, a->n_cols - c, q + 2 * c, xs + c / 64, qs16 + c / 16, qs32 + c / 32,
                       qs64 + c / 64);
    }
}

/* VL rows of W from r; rows past r1 repeat the last one and are not stored. */
typedef struct fast_tile {
    const uint8_t *code[VL], *scale[VL], *bias[VL];
} fast_tile;

FM_INLINE fast_tile fast_tile_at(const fm_mat *W, int64_t r, int64_t r1)
{
    fast_tile t;
    for (int i = 0; i < VL; i++) {
        const int64_t row = r + i < r1 ? r + i : r1 - 1;
        t.code[i] = W->codes + row * W->codes_stride;
        t.scale[i] = W->scales + row * W->scales_stride;
        t.bias[i] = W->biases + row * W->scales_stride;
    }
    return t;
}

/* n <= VL numbers of a plain format as f32, lanes past n are 0. */
FM_INLINE vf vf_load_num(const uint8_t *p, fm_quant format, int64_t n)
{
    if (format == FM_QUANT_F32)
        return (vf)vu_load_part(p, n);
    const vh h = vh_load_part(p, n);
    return format == FM_QUANT_BF16 ? (vf)(__builtin_convertvector(h, vu) << 16) : vf_from_f16(&h);
}

#if VB == 64
#define V_CONCAT(a, b)                                                                             \
    __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, \
                            23, 24, 25, 26, 27, 28, 29, 30, 31)
#elif VB == 32
#define V_CONCAT(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)
#else
#define V_CONCAT(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7)
#endif

/* bf16 scales and biases of groups g0 .. g0+n of VL rows as f32, lanes = rows. A dword holds two groups, half a vector
 * the scales and half the biases of VL groups: one transpose does for all of them. */
FM_INLINE void fast_bf16(const fast_tile *t, int64_t g0, int64_t n, int64_t n_padded, float *sc, float *bi)
{
    for (int64_t g = 0; g < n_padded; g += VL) {
        const int64_t left = n - g, have = left < 0 ? 0 : left < VL ? left : VL;
        vu d[VL];
#pragma GCC unroll 16
        for (int r = 0; r < VL; r++) {
            const vh s = vh_load_part(t->scale[r] + (g0 + g) * 2, have);
            const vh b = vh_load_part(t->bias[r] + (g0 + g) * 2, have);
            d[r] = (vu)V_CONCAT(s, b);
        }
        v_transpose(d);
#pragma GCC unroll 8
        for (int i = 0; i < VL / 2; i++) {
            const int64_t at = (g + 2 * i) * VL;
            vu_store(sc + at, d[i] << 16);
            vu_store(sc + at + VL, d[i] & 0xffff0000u);
            vu_store(bi + at, d[VL / 2 + i] << 16);
            vu_store(bi + at + VL, d[VL / 2 + i] & 0xffff0000u);
        }
    }
}

/* The same for any format and n. */
FM_INLINE void fast_numbers(const uint8_t *const *row, fm_quant format, int64_t g0, int64_t n, int64_t n_padded,
                            float *out)
{
    const int64_t size = plain_bytes(format);
    for (int64_t g = 0; g < n_padded; g += VL) {
        const int64_t have = n - g < 0 ? 0 : n - g < VL ? n - g : VL;
        vu d[VL];
        for (int r = 0; r < VL; r++)
            d[r] = (vu)vf_load_num(row[r] + (g0 + g) * size, format, have);
        v_transpose(d);
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++)
            vu_store(out + (g + i) * VL, d[i]);
    }
}

/* Scales and biases of groups g0 .. g0+n, lanes = rows; zeros up to the end of the padding. */
static __attribute__((unused, noinline)) void fast_scales(const fm_mat *W, const fast_tile *t, int64_t g0, int64_t n,
                                                          int64_t n_padded, float *sc, float *bi)
{
    if (W->scale_format == FM_QUANT_BF16) {
        fast_bf16(t, g0, n, n_padded, sc, bi);
    } else {
        fast_numbers(t->scale, W->scale_format, g0, n, n_padded, sc);
        fast_numbers(t->bias, W->scale_format, g0, n, n_padded, bi);
    }
}

/* d[i] = dword i of every row's chunk: VL*4*planes columns from column c. */
FM_INLINE void fast_chunk(const fm_mat *W, const fast_tile *t, int64_t c, int planes, int bits,
                          const v_cut *cut, vu *d)
{
    const int64_t off = c * bits / 8, have = W->codes_stride - off;
    if (planes == 1 && bits != 8) {
#pragma GCC unroll 16
        for (int r = 0; r < VL; r++)
            d[r] = (vu)v_unpack(cut, t->code[r] + off, have);
    } else if (have >= VB) {
#pragma GCC unroll 16
        for (int r = 0; r < VL; r++)
            d[r] = vu_load(t->code[r] + off);
    } else {
        for (int r = 0; r < VL; r++)
            d[r] = vu_load_part(t->code[r] + off, have / 4); /* rows are whole dwords: group >= 16 */
    }
    v_transpose(d);
}

typedef struct fast_shape {
    int bits, sub, sub_shift, group_shift;
} fast_shape;

FM_INLINE int log2_of(int64_t n) { return 63 - __builtin_clzll((unsigned long long)n); }

FM_INLINE fast_shape fast_shape_of(const fm_mat *W)
{
    const int sub = W->group < FAST_BLOCK ? W->group : FAST_BLOCK;
    return (fast_shape){fm_quant_get(W->format)->bits, sub, log2_of(sub), log2_of(W->group)};
}

FM_INLINE void fast_add(vf *acc, vi isum, vf scale, vf bias, float qs, float xs)
{
    const vf local = vf_fma(__builtin_convertvector(isum, vf), scale, bias * qs);
    *acc = vf_fma(local, vf_set(xs), *acc);
}

#endif
