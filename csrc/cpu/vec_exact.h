/* Owns: numeric mode `exact` of matmul for every format: each weight is decoded to f32 (one rounding), products are
 * accumulated in f32 by FMA. Lanes are columns: output (i, r) is the chain acc = fma(w[c..c+VL), x[c..c+VL), acc) for
 * rising c, then vf_sum; a lane adds n_cols/VL terms, so the error stays below (n_cols/VL + 5) * u * S. */
#ifndef FM_CPU_VEC_EXACT_H
#define FM_CPU_VEC_EXACT_H

#include "cpu/kernels.h"
#include "cpu/vec.h"

#if FM_VEC_ISA == FM_VEC_AVX2
enum { EX_RB = 4, EX_TB = 2 }; /* weight rows and rows of x of a block: 8 sums of 16 registers */
#else
enum { EX_RB = 8, EX_TB = 3 }; /* 24 of 32 */
#endif
enum {
    EX_KB = 512, /* decoded columns of a block: 16 KiB at most, stays in L1 */
    EX_NB = 32,  /* rows of x per decoded block */
    EX_ONE = 4,  /* weight rows at once for a single row of x: their sums overlap */
};

FM_INLINE float exact_number(const uint8_t *p, fm_quant format)
{
    uint32_t bits = 0;
    float f;
    if (format == FM_QUANT_F32) {
        memcpy(&bits, p, 4);
    } else if (format == FM_QUANT_BF16) {
        memcpy((uint8_t *)&bits + 2, p, 2);
    } else {
        uint16_t h[VL] = {0};
        memcpy(h, p, 2);
        return vf_from_f16(h)[0];
    }
    memcpy(&f, &bits, 4);
    return f;
}

/* A row's affine data from some column on. */
typedef struct exact_src {
    const uint8_t *code, *scale, *bias;
    int64_t have; /* bytes of codes */
    v_cut cut;
    fm_quant scale_format;
    int shift; /* a group is a power of two; dividing would cost more than all else */
} exact_src;

FM_INLINE exact_src exact_from(const fm_mat *W, int64_t r, int64_t c, int bits)
{
    const int64_t skip = r * W->scales_stride + c / W->group * plain_bytes(W->scale_format);
    return (exact_src){W->codes + r * W->codes_stride + c * bits / 8, W->scales + skip, W->biases + skip,
                       W->codes_stride - c * bits / 8, v_cut_make(bits), W->scale_format,
                       __builtin_ctz((unsigned)W->group)};
}

/* The weights of 16 * n columns (VB at most) from column c, a multiple of VB. */
FM_INLINE void exact_cut(const exact_src *s, int64_t c, int n, int bits, vf *w)
{
    const int64_t size = plain_bytes(s->scale_format);
    uint8_t u[VB];
    const vb codes = v_unpack(&s->cut, s->code + c * bits / 8, s->have - c * bits / 8);
    memcpy(u, &codes, sizeof u);
    vf scale = {0}, bias = {0};
#pragma GCC unroll 4
    for (int j = 0; j < n; j++) { /* groups are whole sixteens */
        const int64_t at = c + 16 * j, g = (at >> s->shift) * size;
        if (j == 0 || (at & ((1 << s->shift) - 1)) == 0) {
            scale = vf_set(exact_number(s->scale + g, s->scale_format));
            bias = vf_set(exact_number(s->bias + g, s->scale_format));
        }
#pragma GCC unroll 4
        for (int i = 0; i < 16; i += VL)
            w[(16 * j + i) / VL] = vf_fma(vf_from_u8(u + 16 * j + i), scale, bias);
    }
}

/* n <= EX_KB columns of a row, whole sixteens. */
FM_INLINE void exact_affine(const exact_src *s, int64_t n, int bits, float *w)
{
    vf part[VB / VL];
    int64_t c = 0;
    for (; c + VB <= n; c += VB) {
        exact_cut(s, c, VB / 16, bits, part);
        memcpy(w + c, part, sizeof part);
    }
    if (c < n) {
        exact_cut(s, c, (int)(n - c) / 16, bits, part);
        memcpy(w + c, part, (size_t)(n - c) * sizeof *w);
    }
}

/* Rows [r, r + EX_ONE) of an affine matrix times one row of x, the same sums as exact_block's but from registers. Rows
 * past `last` repeat it. The rows after these are asked for: pieces of rows are no stream that the processor sees. */
FM_INLINE void exact_affine_one(const fm_mat *W, const float *x, int64_t r, int64_t last, int bits, vf *acc)
{
    exact_src s[EX_ONE];
    vf w[VB / VL];
    const int64_t n = W->n_cols, ahead = r + 2 * EX_ONE - 1 <= last ? EX_ONE * W->codes_stride : 0;
    int64_t c = 0;
#pragma GCC unroll 4
    for (int j = 0; j < EX_ONE; j++) {
        s[j] = exact_from(W, r + j < last ? r + j : last, 0, bits);
        acc[j] = (vf){0};
    }
    for (; c + VB <= n; c += VB)
#pragma GCC unroll 4
        for (int j = 0; j < EX_ONE; j++) {
            __builtin_prefetch(s[j].code + c * bits / 8 + ahead, 0, 3);
            exact_cut(&s[j], c, VB / 16, bits, w);
#pragma GCC unroll 4
            for (int i = 0; i < VB / VL; i++)
                acc[j] = vf_fma(w[i], vf_load(x + c + i * VL), acc[j]);
        }
    for (int j = 0; j < EX_ONE && c < n; j++) {
        exact_cut(&s[j], c, (int)(n - c) / 16, bits, w);
        for (int i = 0; i < (n - c) / VL; i++)
            acc[j] = vf_fma(w[i], vf_load(x + c + i * VL), acc[j]);
    }
}

FM_INLINE vf exact_plain_part(const uint8_t *p, fm_quant format, int64_t n)
{
    if (format == FM_QUANT_F32)
        return (vf)vu_load_part(p, n);
    const vh h = vh_load_part(p, n);
    return format == FM_QUANT_BF16 ? vf_from_bf16(&h) : vf_from_f16(&h);
}

FM_INLINE void exact_plain(const uint8_t *p, fm_quant format, int64_t n, float *w)
{
    int64_t c = 0;
    for (; c + VL <= n; c += VL)
        vf_store(w + c, format == FM_QUANT_F32    ? vf_load(p + c * 4)
                        : format == FM_QUANT_BF16 ? vf_from_bf16(p + c * 2)
                                                  : vf_from_f16(p + c * 2));
    if (c < n)
        vf_store(w + c, exact_plain_part(p + c * plain_bytes(format), format, n - c));
}

FM_INLINE void exact_decode(const fm_mat *W, int64_t r, int64_t c, int64_t n, int bits, fm_quant plain, float *w)
{
    if (bits >= 16) {
        exact_plain(W->codes + r * W->codes_stride + c * bits / 8, plain, n, w);
        return;
    }
    const exact_src s = exact_from(W, r, c, bits);
    exact_affine(&s, n, bits, w);
}

/* acc[t][r] += w[r] . x[t] over n columns. T is a constant. */
FM_INLINE void exact_block(float (*w)[EX_KB], const float *const *x, int64_t n, vf (*acc)[EX_RB], int T)
{
    vf a[EX_TB][EX_RB];
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int r = 0; r < EX_RB; r++)
            a[t][r] = acc[t][r];
    int64_t c = 0;
    for (; c + VL <= n; c += VL)
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            const vf v = vf_load(x[t] + c);
#pragma GCC unroll 8
            for (int r = 0; r < EX_RB; r++)
                a[t][r] = vf_fma(vf_load(w[r] + c), v, a[t][r]);
        }
    if (c < n)
        for (int t = 0; t < T; t++) {
            const vf v = vf_load_part(x[t] + c, n - c);
            for (int r = 0; r < EX_RB; r++)
                a[t][r] = vf_fma(vf_load(w[r] + c), v, a[t][r]);
        }
#pragma GCC unroll 8
    for (int t = 0; t < T; t++)
#pragma GCC unroll 8
        for (int r = 0; r < EX_RB; r++)
            acc[t][r] = a[t][r];
}

FM_INLINE void exact_rows(const fm_act *a, int64_t i, int64_t nb, int64_t k0, int64_t kn, float (*w)[EX_KB],
                          vf (*acc)[EX_RB])
{
    for (int64_t t = 0; t < nb; t += EX_TB) {
        const float *x[EX_TB];
        const int T = (int)(nb - t < EX_TB ? nb - t : EX_TB);
        for (int j = 0; j < T; j++)
            x[j] = a->x + (a->rows ? a->rows[i + t + j] : a->row0 + i + t + j) * a->ldx + k0;
        switch (T) {
        case 1: exact_block(w, x, kn, acc + t, 1); break;
        case 2: exact_block(w, x, kn, acc + t, 2); break;
        default: exact_block(w, x, kn, acc + t, EX_TB); break;
        }
    }
}

/* y = W x for one row of x, W affine. */
FM_INLINE void exact_matvec(const fm_mat *W, const fm_act *a, float *y, int64_t r0, int64_t r1, int bits)
{
    const float *x = a->x + (a->rows ? a->rows[0] : a->row0) * a->ldx;
    vf acc[EX_ONE];
    for (int64_t r = r0; r < r1; r += EX_ONE) {
        exact_affine_one(W, x, r, r1 - 1, bits, acc);
        for (int64_t j = 0; j < EX_ONE && r + j < r1; j++)
            y[r + j] = vf_sum(acc[j]);
    }
}

FM_INLINE void exact_matmul(const fm_mat *W, const fm_act *a, int64_t n, float *y, int64_t ldy, int64_t r0, int64_t r1,
                            int bits, fm_quant plain)
{
    _Alignas(64) float w[EX_RB][EX_KB];
    vf acc[EX_NB][EX_RB];
    if (n == 1 && bits < 16) {
        exact_matvec(W, a, y, r0, r1, bits);
        return;
    }
    for (int64_t i = 0; i < n; i += EX_NB) {
        const int64_t nb = n - i < EX_NB ? n - i : EX_NB;
        for (int64_t r = r0; r < r1; r += EX_RB) {
            memset(acc, 0, (size_t)nb * sizeof acc[0]);
            for (int64_t k0 = 0; k0 < W->n_cols; k0 += EX_KB) {
                const int64_t kn = W->n_cols - k0 < EX_KB ? W->n_cols - k0 : EX_KB;
                for (int j = 0; j < EX_RB; j++)
                    exact_decode(W, r + j < r1 ? r + j : r1 - 1, k0, kn, bits, plain, w[j]);
                exact_rows(a, i, nb, k0, kn, w, acc);
            }
            for (int64_t t = 0; t < nb; t++)
                for (int64_t j = 0; j < EX_RB && r + j < r1; j++)
                    y[(i + t) * ldy + r + j] = vf_sum(acc[t][j]);
        }
    }
}

#define EXACT(name, ID, bits)                                                                      \
    static void matmul_exact_##name(const fm_mat *W, const fm_act *a, int64_t n, float *y, int64_t ldy, int64_t r0, \
                                    int64_t r1)                                                    \
    {                                                                                              \
        exact_matmul(W, a, n, y, ldy, r0, r1, bits, FM_QUANT_##ID);                                \
    }                                                                                              \
    static void decode_row_##name(const fm_mat *W, int64_t r, float *y)                            \
    {                                                                                              \
        _Alignas(64) float w[EX_KB];                                                               \
        for (int64_t c = 0; c < W->n_cols; c += EX_KB) {                                           \
            const int64_t n = W->n_cols - c < EX_KB ? W->n_cols - c : EX_KB;                       \
            exact_decode(W, r, c, n, bits, FM_QUANT_##ID, w);                                      \
            memcpy(y + c, w, (size_t)n * sizeof *y);                                               \
        }                                                                                          \
    }
/* One body per width: the width must be a constant where bits are cut. */
#define EXACT_LIST(X)                                                                              \
    X(f32, F32, 32)                                                                                \
    X(f16, F16, 16)                                                                                \
    X(bf16, BF16, 16)                                                                              \
    X(affine2, AFFINE2, 2)                                                                         \
    X(affine3, AFFINE3, 3)                                                                         \
    X(affine4, AFFINE4, 4)                                                                         \
    X(affine5, AFFINE5, 5)                                                                         \
    X(affine6, AFFINE6, 6)                                                                         \
    X(affine8, AFFINE8, 8)
EXACT_LIST(EXACT)

FM_STATIC void exact_overlay(fm_kernels *k)
{
#define SET(name, ID, bits)                                                                        \
    k->matmul[FM_QUANT_##ID] = matmul_exact_##name;                                                \
    k->decode_row[FM_QUANT_##ID] = decode_row_##name;
    EXACT_LIST(SET)
#undef SET
}

#endif
