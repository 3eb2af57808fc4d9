/* Owns: the vector of the variant being compiled: types, the few operations that differ per ISA, e^x. The vec_*.h
 * templates are written once over it; a kernels_<isa>.c includes them inside its target region after setting
 * FM_VEC_ISA. Everything is static: each variant has its own copy under its own instruction set. */
#ifndef FM_CPU_VEC_H
#define FM_CPU_VEC_H

#include "cpu/vec_types.h"
#include "quant/quant.h"

/* Per ISA: vf_fma(a, b, c) = a*b + c in one rounding; vf_max (of two numbers); vf_round_i (to nearest even);
 * vi_dp(acc, u, s, wide): lane += sum of 4 products u8 * s8 (wide: u may be 64 or more; VI_DP_SPLITS tells whether it
 * matters); v_plane(d, planes, p): codes p of every byte; vi_hadd(a, b): sums of neighbours, a's then b's; vi_quad: in
 * vec_avx512.h; vf_stream: a store past the caches, vf_stream_end after the last; v_transpose(d): d[i] lane r <- d[r]
 * lane i; vh_load_part, vu_load_part; vf_from_f16, vf_from_bf16, vf_from_u8, vf_to_f16 (to nearest even): VL numbers;
 * v_cut_make(bits), v_unpack: VB codes. */
#if FM_VEC_ISA == FM_VEC_AVX512
#include "cpu/vec_avx512.h"
#elif FM_VEC_ISA == FM_VEC_AVX2
#include "cpu/vec_avx2.h"
#elif FM_VEC_ISA == FM_VEC_NEON
#include "cpu/vec_neon.h"
#else
#include "cpu/vec_portable.h"
#endif

/* Bytes of an f32, f16 or bf16 number. */
FM_INLINE int64_t plain_bytes(fm_quant format) { return format == FM_QUANT_F32 ? 4 : 2; }

/* Keeps v in a register, whatever the compiler thinks of loading it again. */
#if defined(__x86_64__)
#define V_KEEP(v) __asm__("" : "+v"(v))
#elif defined(__aarch64__)
#define V_KEEP(v) __asm__("" : "+w"(v))
#else
#define V_KEEP(v) ((void)0)
#endif

/* Loads v and no more. */
#if defined(__x86_64__)
#define V_TOUCH(v) __asm__ volatile("" ::"v"(v))
#else
#define V_TOUCH(v) ((void)(v))
#endif

/* Every second element of a, then of b. */
#if VB == 64
#define V_EVEN(a, b)                                                                               \
    __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define V_ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)
#elif VB == 32
#define V_EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14)
#define V_ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15)
#else
#define V_EVEN(a, b) __builtin_shufflevector(a, b, 0, 2, 4, 6)
#define V_ODD(a, b) __builtin_shufflevector(a, b, 1, 3, 5, 7)
#endif

/* To nearest even; NaN stays NaN, infinity infinity. */
FM_INLINE vh vf_to_bf16(vf x)
{
    const vu a = (vu)x;
    const vu r = (vu)vf_select(x == x, (vf)((a + 0x7fff + ((a >> 16) & 1)) >> 16), (vf)(a >> 16 | 0x40));
    return __builtin_convertvector(r, vh);
}

/* Sum of lanes by a fixed tree: (lane i) + (lane i + w/2), halving. */
FM_INLINE float vf_sum(vf v)
{
#if VB == 64
    v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif VB == 32
    v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
#else
    v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
#endif
    return v[0] + v[1];
}

/* The largest lane; no lane may be NaN. */
FM_INLINE float vf_top(vf v)
{
#if VB == 64
    v = vf_max(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    v = vf_max(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    v = vf_max(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
#elif VB == 32
    v = vf_max(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
    v = vf_max(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
#else
    v = vf_max(v, __builtin_shufflevector(v, v, 2, 3, 0, 1));
#endif
    return v[0] > v[1] ? v[0] : v[1];
}

FM_INLINE int32_t vi_top(vi v)
{
#if VB == 64
    vi w = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v = ((v > w) & v) | ((v <= w) & w);
    w = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v = ((v > w) & v) | ((v <= w) & w);
#elif VB == 32
    vi w = __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
    v = ((v > w) & v) | ((v <= w) & w);
#endif
    int32_t m = v[0];
    for (int i = 1; i < 4; i++)
        m = v[i] > m ? v[i] : m;
    return m;
}

/* e^y = 2^k p: y = k ln2 + r, |r| <= ln2/2, p = e^r by its Taylor series to r^7/7! (truncation < 2^-27). */
FM_INLINE vf vf_exp_parts(vf y, vi *k)
{
    *k = vf_round_i(y * vf_set(1.44269504088896f));
    const vf kf = __builtin_convertvector(*k, vf);
    const vf r = vf_fma(kf, -vf_set(1.42860682030941723e-6f), vf_fma(kf, -vf_set(0.693145751953125f), y));
    vf p = vf_set(1.0f / 5040);
    p = vf_fma(p, r, vf_set(1.0f / 720));
    p = vf_fma(p, r, vf_set(1.0f / 120));
    p = vf_fma(p, r, vf_set(1.0f / 24));
    p = vf_fma(p, r, vf_set(1.0f / 6));
    p = vf_fma(p, r, vf_set(0.5f));
    return vf_fma(p, r * r, r) + vf_set(1.0f);
}

/* e^x: |error| <= 2 ulp for -87.3 <= x <= 88.7; 0 below (no denormals), +inf above, NaN stays NaN. */
FM_INLINE vf vf_exp(vf x)
{
    const vi low = x < vf_set(-87.33654f), high = x > vf_set(88.72283f);
    const vi nan = x != x;
    vi k;
    vf p = vf_exp_parts(vf_select(low | high | nan, (vf){0}, x), &k);
    /* 2^k in two factors: k = 128 alone would be inf */
    const vi half = k >> 1;
    p = p * (vf)((half + 127) << 23) * (vf)((k - half + 127) << 23);
    p = vf_select(high, vf_set(INFINITY), vf_select(low, (vf){0}, p));
    return vf_select(nan, x, p);
}

/* x where limit <= at or at is NaN, else 0. */
FM_INLINE vf vf_from(vf x, vf at, float limit)
{
#if VB == 64
    return (vf)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)at, (__m512)vf_set(limit), _CMP_NLT_UQ), (__m512)x);
#else
    return vf_select(at < vf_set(limit), (vf){0}, x);
#endif
}

/* vf_exp of x <= 0 or NaN: the same bits for half the work. */
FM_INLINE vf vf_exp_down(vf x)
{
    const float low = -87.33654f;
    vi k; /* -126 <= k <= 0: one factor will do */
    const vf p = vf_exp_parts(vf_from(x, x, low), &k);
    return vf_from(p * (vf)((k + 127) << 23), x, low);
}

/* 1 / (1 + e^-x): bound 4u relative, and 0 where e^-x overflows. */
FM_INLINE vf vf_sigmoid(vf x) { return vf_set(1.0f) / (vf_set(1.0f) + vf_exp(-x)); }

FM_INLINE vf vf_silu(vf x)
{
    /* x = -inf: the limit, not -inf * 0 */
    return vf_select(x < vf_set(-88.7f), (vf){0} * vf_set(1.0f), x / (vf_set(1.0f) + vf_exp(-x)));
}

#endif
