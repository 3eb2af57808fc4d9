/* AVX-512 F/BW/DQ/VL + VBMI + VNNI: the operations that vec.h asks of an ISA. */
#ifndef FM_CPU_VEC_AVX512_H
#define FM_CPU_VEC_AVX512_H

#include "cpu/vec_types.h"

#if FM_VEC_ISA == FM_VEC_AVX512
#include <immintrin.h>

FM_INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
FM_INLINE vf vf_max(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
FM_INLINE vi vf_round_i(vf x) { return (vi)_mm512_cvtps_epi32((__m512)x); }

FM_INLINE vf vf_from_f16(const void *p) { return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
/* Not __builtin_convertvector: GCC makes two halves of it. */
FM_INLINE vf vf_from_bf16(const void *p)
{
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16);
}

FM_INLINE vh vf_to_f16(vf x) { return (vh)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

/* Past the caches, where p is aligned; vf_stream_end before another thread may look. */
FM_INLINE void vf_stream(float *p, vf v)
{
    if (((uintptr_t)p & 63) == 0)
        _mm512_stream_ps(p, (__m512)v);
    else
        vf_store(p, v);
}

FM_INLINE void vf_stream_end(void) { _mm_sfence(); }

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

#define VI_DP_SPLITS 0
FM_INLINE vi vi_dp(vi acc, vu u, vi s, bool wide)
{
    (void)wide;
    return (vi)_mm512_dpbusd_epi32((__m512i)acc, (__m512i)u, (__m512i)s);
}

/* One product with a bit matrix moves and masks at once: bit i of a byte <- its bit i + p*8/planes, or 0. */
FM_INLINE vu v_plane(vu d, int planes, int p)
{
    const int bits = 8 / planes;
    if (p == 0)
        return d & (uint32_t)(0x01010101u * ((1u << bits) - 1));
    uint64_t m = 0;
    for (int i = 0; i < bits; i++)
        m |= (uint64_t)1 << (8 * (7 - i) + i + p * bits);
    return (vu)_mm512_gf2p8affine_epi64_epi8((__m512i)d, _mm512_set1_epi64((long long)m), 0);
}

/* Sums of neighbours: a's pairs, then b's. */
FM_INLINE vi vi_hadd(vi a, vi b)
{
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    return (vi)_mm512_permutex2var_epi32((__m512i)a, even, (__m512i)b) +
           (vi)_mm512_permutex2var_epi32((__m512i)a, odd, (__m512i)b);
}

/* Sums of fours of 128 h[i] + l[i]: those of i = 0, then 1, 2, 3. small: h and l fit int16; then the packing that pairs
 * them also does half of the adding. */
FM_INLINE vi vi_quad(const vi *h, const vi *l, bool small)
{
    if (!small)
        return vi_hadd(vi_hadd((h[0] << 7) + l[0], (h[1] << 7) + l[1]), vi_hadd((h[2] << 7) + l[2], (h[3] << 7) + l[3]));
    const __m512i k = _mm512_set1_epi16(128), one = _mm512_set1_epi16(1);
    __m512i r[2]; /* per 128-bit lane: two pairs of h[2i], l[2i], two of the next */
    for (int i = 0; i < 2; i++)
        r[i] = _mm512_dpwssd_epi32(
            _mm512_madd_epi16(_mm512_packs_epi32((__m512i)h[2 * i], (__m512i)h[2 * i + 1]), k),
            _mm512_packs_epi32((__m512i)l[2 * i], (__m512i)l[2 * i + 1]), one);
    const __m512i even = _mm512_setr_epi32(0, 4, 8, 12, 2, 6, 10, 14, 16, 20, 24, 28, 18, 22, 26, 30);
    const __m512i odd = _mm512_setr_epi32(1, 5, 9, 13, 3, 7, 11, 15, 17, 21, 25, 29, 19, 23, 27, 31);
    return (vi)_mm512_permutex2var_epi32(r[0], even, r[1]) + (vi)_mm512_permutex2var_epi32(r[0], odd, r[1]);
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

/* How to cut codes of `bits` each out of bytes: vpermb brings the run of 8 codes to its qword, vpmultishiftqb cuts it. */
typedef struct v_cut {
    __m512i run, at, mask;
    int bits;
} v_cut;

FM_INLINE v_cut v_cut_make(int bits)
{
    uint8_t run[64], at[64];
    for (int i = 0; i < 64; i++) {
        run[i] = (uint8_t)(i / 8 * bits + i % 8);
        at[i] = (uint8_t)(i % 8 * bits);
    }
    return (v_cut){_mm512_loadu_si512(run), _mm512_loadu_si512(at), _mm512_set1_epi8((char)((1 << bits) - 1)), bits};
}

/* VB codes from the first VB*bits/8 of n bytes at p (missing bytes read as 0), one byte per code. */
FM_INLINE vb v_unpack(const v_cut *c, const uint8_t *p, int64_t n)
{
    const int64_t want = 8 * c->bits;
    const __mmask64 have = ~0ull >> (64 - (n < want ? n : want));
    const __m512i runs = _mm512_permutexvar_epi8(c->run, _mm512_maskz_loadu_epi8(have, p));
    return (vb)_mm512_and_si512(_mm512_multishift_epi64_epi8(c->at, runs), c->mask);
}

#endif
#endif
