/* AVX-512 F/BW/DQ/VL + VBMI + VNNI: the operations that vec.h asks of an ISA. */
#ifndef FM_CPU_VEC_AVX512_H
#define FM_CPU_VEC_AVX512_H

#include "cpu/vec_types.h"

#if FM_VEC_ISA == FM_VEC_AVX512
#include <immintrin.h>

#define DP_FULL_U8 1

FM_INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FM_INLINE vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
FM_INLINE vi vf_round_i(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }
FM_INLINE vf vf_sqrt(vf x) { return (vf)_mm512_sqrt_ps((__m512)x); }

FM_INLINE vf vf_from_f16(const void *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }

/* n <= VL elements, the rest 0; no byte past them is touched. */
FM_INLINE vh vh_load_part(const void *p, int64_t n)
{
    return (vh)_mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
}

FM_INLINE vu vu_load_part(const void *p, int64_t n)
{
    return (vu)_mm512_maskz_loadu_epi32((__mmask16)((1u << n) - 1), p);
}

/* VL bytes as numbers. */
FM_INLINE vf vf_from_u8(const uint8_t *p)
{
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}

FM_INLINE vi vi_dp(vi acc, vu u, vi s)
{
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)s);
}

/* Two rounds inside 128-bit lanes (dwords, then qwords), two rounds of whole lanes. */
FM_INLINE void v_transpose(vu *d)
{
    __m512i a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32((__m512i)d[i], (__m512i)d[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32((__m512i)d[i], (__m512i)d[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) { /* b[i + j]: dword j of each lane, rows i..i+3 */
        b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        const __m512i even_lo = _mm512_shuffle_i32x4(b[j], b[4 + j], 0x88);  /* lanes 0, 2 of rows 0-7 */
        const __m512i odd_lo = _mm512_shuffle_i32x4(b[j], b[4 + j], 0xdd);   /* lanes 1, 3 */
        const __m512i even_hi = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88);
        const __m512i odd_hi = _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xdd);
        d[j] = (vu)_mm512_shuffle_i32x4(even_lo, even_hi, 0x88);
        d[8 + j] = (vu)_mm512_shuffle_i32x4(even_lo, even_hi, 0xdd);
        d[4 + j] = (vu)_mm512_shuffle_i32x4(odd_lo, odd_hi, 0x88);
        d[12 + j] = (vu)_mm512_shuffle_i32x4(odd_lo, odd_hi, 0xdd);
    }
}

/* VB codes of `bits` each, from n <= VB*bits/8 bytes at p (missing bytes read as 0): one byte per code. vpermb brings
 * the bits-byte run of 8 codes to its qword, vpmultishiftqb cuts it. */
FM_INLINE vb v_unpack(const uint8_t *p, int64_t n, int bits)
{
    const __mmask64 have = n >= 64 ? ~0ull : (1ull << n) - 1;
    const __m512i in = _mm512_maskz_loadu_epi8(have, p);
    const __m512i lane = _mm512_set_epi64(0x0707070707070707, 0x0606060606060606, 0x0505050505050505,
                                          0x0404040404040404, 0x0303030303030303, 0x0202020202020202,
                                          0x0101010101010101, 0);
    const __m512i step = _mm512_set1_epi64(0x0706050403020100);
    __m512i from = step; /* byte j*bits + 0..7 */
    for (int i = 0; i < bits; i++)
        from = _mm512_add_epi8(from, lane);
    __m512i at = _mm512_setzero_si512(); /* bit k*bits within the qword */
    for (int i = 0; i < bits; i++)
        at = _mm512_add_epi8(at, step);
    const __m512i runs = _mm512_permutexvar_epi8(from, in);
    return (vb)_mm512_and_si512(_mm512_multishift_epi64_epi8(at, runs), _mm512_set1_epi8((char)((1 << bits) - 1)));
}

#endif
#endif
