/* Owns: numeric mode `fast` of matmul for affine weights: activations as int8 in blocks of 64 with one fp32 scale
 * (kernels.h, FM_NUMERIC_FAST), u8 x s8 dot products, exact in int32: a block adds at most 64*255*127 < 2^21.
 *
 * Lanes are weight rows: VL rows x VB bytes of codes are transposed in registers, so that a lane sees its own row and
 * an activation dword is broadcast to all. Per row and block b of min(group, 64) columns, in rising order of b:
 *   acc = fma( fma(isum, scale, bias * qsum), xs, acc )
 * The integer sums are exact, so the small-n path (codes go from register to dot product) and the tile path (codes
 * unpacked once to memory, used by all n rows) give the same bits. */
#ifndef FM_CPU_VEC_FAST_H
#define FM_CPU_VEC_FAST_H

#include "cpu/kernels.h"
#include "cpu/vec.h"

enum {
    FAST_BLOCK = 64,
    FAST_PAD = 256,   /* prepared rows are whole chunks of every format; the padding is 0 */
    FAST_KB = 2048,   /* columns per pass over scales */
    FAST_FAR = 6144,  /* bytes; tuned on Granite Rapids under load: tune again before believing it */
    FAST_FAR_STEP = 512,
    FAST_MAX_T = 2,   /* rows of the small-n path */
};

FM_INLINE int64_t fast_padded(int64_t n_cols) { return (n_cols + FAST_PAD - 1) / FAST_PAD * FAST_PAD; }

/* One prepared row, for a weight format with `planes` codes per byte: q in the order in which planes leave a dword
 * (code i*4P + b*P + p lies at (i*P + p)*4 + b), xs per 64 columns, qs = sum of q per sub-block. */
typedef struct fast_x {
    const int8_t *q;
    const float *xs, *qs;
} fast_x;

FM_STATIC size_t fast_act_bytes(int64_t n, int64_t n_cols) { return (size_t)n * (size_t)fast_padded(n_cols) * 7 / 2; }

FM_INLINE fast_x fast_row(const fm_act *a, int64_t i, int planes, int64_t sub)
{
    const int64_t cols = fast_padded(a->n_cols), r = a->rows ? a->rows[i] : a->row0 + i;
    const int8_t *base = (const int8_t *)a->prepared + r * (cols * 7 / 2);
    const float *xs = (const float *)(base + 3 * cols), *qs = xs + cols / 64;
    qs += sub == 16 ? 0 : sub == 32 ? cols / 16 : cols / 16 + cols / 32;
    return (fast_x){base + (planes == 1 ? 0 : planes == 2 ? cols : 2 * cols), xs, qs};
}

typedef int8_t s8x16 __attribute__((vector_size(16)));

/* 64 columns; x beyond n reads as 0. A NaN or inf makes the block's scale non-finite, and with it every y. */
FM_INLINE void fast_block(const float *x, int64_t n, int8_t *nat, int8_t *nib, int8_t *crumb, float *xs, float *qs16,
                          float *qs32, float *qs64)
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
    int32_t lanes[VL], max = 0;
    memcpy(lanes, &top, sizeof top);
    for (int i = 0; i < VL; i++)
        max = lanes[i] > max ? lanes[i] : max;
    float amax;
    memcpy(&amax, &max, sizeof amax);
    if (max < 0x0d800000) /* 2^-100: as good as 0, and 127 / amax must not overflow */
        amax = 0;
    const float inv = amax == 0 ? 0 : 127 / amax;
    *xs = amax / 127;
    typedef int8_t part __attribute__((vector_size(VL)));
#pragma GCC unroll 16
    for (int i = 0; i < 64 / VL; i++) {
        const part q = __builtin_convertvector(vf_round_i(v[i] * inv), part);
        memcpy(nat + i * VL, &q, sizeof q);
    }
    int32_t sum4[16];
#pragma GCC unroll 4
    for (int i = 0; i < 64 / VB; i++) {
        const vi s = vi_dp((vi){0}, vu_set(0x01010101), (vi)vu_load(nat + i * VB), false);
        memcpy(sum4 + i * VL, &s, sizeof s);
    }
    int32_t s16[4];
    for (int i = 0; i < 4; i++) {
        s16[i] = sum4[4 * i] + sum4[4 * i + 1] + sum4[4 * i + 2] + sum4[4 * i + 3];
        qs16[i] = (float)s16[i];
        s8x16 q;
        memcpy(&q, nat + 16 * i, sizeof q);
        const s8x16 two = __builtin_shufflevector(q, q, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
        const s8x16 four = __builtin_shufflevector(q, q, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
        memcpy(nib + 16 * i, &two, sizeof two);
        memcpy(crumb + 16 * i, &four, sizeof four);
    }
    qs32[0] = (float)(s16[0] + s16[1]);
    qs32[1] = (float)(s16[2] + s16[3]);
    *qs64 = (float)(s16[0] + s16[1] + s16[2] + s16[3]);
}

FM_STATIC void fast_act_prepare(const fm_act *a, int64_t n, int64_t r0, int64_t r1)
{
    (void)n;
    const int64_t cols = fast_padded(a->n_cols);
    for (int64_t r = r0; r < r1; r++) {
        int8_t *nat = (int8_t *)a->prepared + r * (cols * 7 / 2);
        float *xs = (float *)(nat + 3 * cols), *qs16 = xs + cols / 64, *qs32 = qs16 + cols / 16,
              *qs64 = qs32 + cols / 32;
        for (int64_t c = 0; c < cols; c += 64)
            fast_block(a->x + r * a->ldx + c, a->n_cols - c, nat + c, nat + cols + c, nat + 2 * cols + c, xs + c / 64,
                       qs16 + c / 16, qs32 + c / 32, qs64 + c / 64);
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
    const int64_t size = format == FM_QUANT_F32 ? 4 : 2;
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

/* acc[t] = the tile's VL rows times row x[t], t < T; T, planes and g64 (the group is 64) are constants. */
FM_INLINE void fast_small(const fm_mat *W, const fast_tile *tile, fast_shape f, const fast_x *x, vf *acc, int T,
                          int planes, bool g64)
{
    enum { CHAINS = 2 }; /* per row, to hide the latency of vi_dp */
    _Alignas(64) float sc[FAST_KB / 16 * VL], bi[FAST_KB / 16 * VL];
    const int64_t sub = g64 ? 64 : f.sub, chunk = VL * 4 * planes;
    const int sub_shift = g64 ? 6 : f.sub_shift, group_shift = g64 ? 6 : f.group_shift;
    const uint32_t mask = (uint32_t)(0x01010101u * ((1u << (8 / planes)) - 1));
    const int bits = planes == 1 ? f.bits : 8 / planes;
    const int64_t ahead = VL * W->codes_stride;
    const v_cut cut = v_cut_make(bits);
    for (int64_t k0 = 0; k0 < W->n_cols; k0 += FAST_KB) {
        const int64_t kn = W->n_cols - k0 < FAST_KB ? W->n_cols - k0 : FAST_KB;
        fast_scales(W, tile, k0 >> group_shift, kn >> group_shift, fast_padded(kn) >> group_shift, sc, bi);
        vi isum[FAST_MAX_T][CHAINS] = {{{0}}};
        for (int64_t c = k0; c < k0 + kn; c += chunk) {
            vu d[VL];
            /* The next tile lies right behind this one: fetch it in memory order. The sparse touches further on
             * wake the hardware's stream prefetcher, which is not bound by the core's fill buffers. */
            const uint8_t *next = tile->code[0] + ahead + c * bits / 8 * VL;
            for (int64_t b = 0; b < VL * 4 * planes * bits / 8 * VL; b += 64) {
                __builtin_prefetch(next + b, 0, 2);
                if (b % FAST_FAR_STEP == 0)
                    __builtin_prefetch(next + b + FAST_FAR, 0, 2);
            }
            for (int64_t b = 0; b < VL * 4 * planes / 64 * 2 * VL || b == 0; b += 64) { /* and its share of scales */
                const int64_t off = VL * W->scales_stride + (c >> group_shift) * 2 * VL + b;
                __builtin_prefetch(tile->scale[0] + off, 0, 2);
                __builtin_prefetch(tile->bias[0] + off, 0, 2);
            }
            fast_chunk(W, tile, c, planes, bits, &cut, d);
#pragma GCC unroll 16
            for (int j = 0; j < VL * planes / 4; j++) { /* 16 columns */
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) {
                    const vu w = (d[j * 4 / planes + i / planes] >> (i % planes * bits)) & mask;
#pragma GCC unroll 4
                    for (int t = 0; t < T; t++) {
                        const vi q = (vi)vu_set(dword_at(x[t].q + c + 16 * j + 4 * i));
                        isum[t][i % CHAINS] = vi_dp(isum[t][i % CHAINS], planes == 1 ? d[j * 4 + i] : w, q,
                                                     planes == 1);
                    }
                }
                const int64_t end = c + 16 * (j + 1);
                if ((end & (sub - 1)) == 0) {
                    const int64_t g = (end - 1 - k0) >> group_shift;
                    const vf s = vf_load(sc + g * VL), b = vf_load(bi + g * VL);
#pragma GCC unroll 4
                    for (int t = 0; t < T; t++) {
                        fast_add(&acc[t], isum[t][0] + isum[t][1], s, b, x[t].qs[(end - 1) >> sub_shift],
                                 x[t].xs[(end - 1) >> 6]);
                        isum[t][0] = isum[t][1] = (vi){0};
                    }
                }
            }
        }
    }
}

#endif
