/* AVX2 + FMA + F16C + BMI2: the operations that vec.h asks of an ISA. */
#ifndef FM_CPU_VEC_AVX2_H
#define FM_CPU_VEC_AVX2_H

#include "cpu/vec_types.h"

#if FM_VEC_ISA == FM_VEC_AVX2
#include <immintrin.h>

FM_INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
FM_INLINE vf vf_max(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
FM_INLINE vi vf_round_i(vf x) { return (vi)_mm256_cvtps_epi32((__m256)x); }

FM_INLINE vf vf_from_f16(const void *p) { return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p)); }
FM_INLINE vf vf_from_bf16(const void *p)
{
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p)), 16);
}

FM_INLINE vh vf_to_f16(vf x) { return (vh)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

FM_INLINE void vf_stream(float *p, vf v)
{
    if (((uintptr_t)p & 31) == 0)
        _mm256_stream_ps(p, (__m256)v);
    else
        vf_store(p, v);
}

FM_INLINE void vf_stream_end(void) { _mm_sfence(); }

/* n <= VL elements, the rest 0; no byte past them is touched. */
FM_INLINE vh vh_load_part(const void *p, int64_t n)
{
    vh v = {0};
    memcpy(&v, p, n == VL ? sizeof v : (size_t)n * 2);
    return v;
}

FM_INLINE vu vu_load_part(const void *p, int64_t n)
{
    const __m256i want = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return (vu)_mm256_maskload_epi32((const int *)p, want);
}

FM_INLINE vf vf_from_u8(const uint8_t *p)
{
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}

/* vpmaddubsw adds two products in int16 and saturates: 2*255*127 does not fit, so wide codes are split into nibbles
 * (2*15*127 = 3810); codes of 6 bits or less fit as they are (2*63*127 = 16002). */
#define VI_DP_SPLITS 1
FM_INLINE vi vi_dp(vi acc, vu u, vi s, bool wide)
{
    const __m256i one = _mm256_set1_epi16(1), x = (__m256i)s;
    if (!wide)
        return acc + (vi)_mm256_madd_epi16(_mm256_maddubs_epi16((__m256i)u, x), one);
    const __m256i low = _mm256_maddubs_epi16((__m256i)(u & 0x0f0f0f0f), x);
    const __m256i high = _mm256_maddubs_epi16((__m256i)((u >> 4) & 0x0f0f0f0f), x);
    return acc + (vi)_mm256_madd_epi16(low, one) + (vi)_mm256_madd_epi16(high, _mm256_set1_epi16(16));
}

FM_INLINE vu v_plane(vu d, int planes, int p)
{
    return d >> (p * 8 / planes) & (uint32_t)(0x01010101u * ((1u << (8 / planes)) - 1));
}

FM_INLINE vi vi_hadd(vi a, vi b)
{
    return (vi)_mm256_permute4x64_epi64(_mm256_hadd_epi32((__m256i)a, (__m256i)b), 0xd8);
}

FM_INLINE vi vi_quad(const vi *h, const vi *l, bool small)
{
    (void)small;
    return vi_hadd(vi_hadd((h[0] << 7) + l[0], (h[1] << 7) + l[1]), vi_hadd((h[2] << 7) + l[2], (h[3] << 7) + l[3]));
}

FM_INLINE void v_transpose(vu *d)
{
    __m256i a[8], b[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        a[i] = _mm256_unpacklo_epi32((__m256i)d[i], (__m256i)d[i + 1]);
        a[i + 1] = _mm256_unpackhi_epi32((__m256i)d[i], (__m256i)d[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) { /* b[i + j]: dword j of each 128-bit lane, rows i..i+3 */
        b[i] = _mm256_unpacklo_epi64(a[i], a[i + 2]);
        b[i + 1] = _mm256_unpackhi_epi64(a[i], a[i + 2]);
        b[i + 2] = _mm256_unpacklo_epi64(a[i + 1], a[i + 3]);
        b[i + 3] = _mm256_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        d[j] = (vu)_mm256_permute2x128_si256(b[j], b[4 + j], 0x20);
        d[4 + j] = (vu)_mm256_permute2x128_si256(b[j], b[4 + j], 0x31);
    }
}

/* pdep spreads 8 codes over the bytes of a qword. */
typedef struct v_cut {
    uint64_t spread;
    int bits;
} v_cut;

FM_INLINE v_cut v_cut_make(int bits) { return (v_cut){0x0101010101010101ull * ((1u << bits) - 1), bits}; }

/* VB codes from the first VB*bits/8 of n bytes at p (missing bytes read as 0), one byte per code. */
FM_INLINE vb v_unpack(const v_cut *c, const uint8_t *p, int64_t n)
{
    uint8_t tail[40] = {0};
    uint64_t q[4];
    if (n < 3 * c->bits + 8) { /* the last load would pass the end */
        memcpy(tail, p, (size_t)(n < 4 * c->bits ? n : 4 * c->bits));
        p = tail;
    }
    for (int i = 0; i < 4; i++, p += c->bits) {
        memcpy(&q[i], p, 8);
        q[i] = _pdep_u64(q[i], c->spread);
    }
    return (vb)_mm256_set_epi64x((long long)q[3], (long long)q[2], (long long)q[1], (long long)q[0]);
}

#endif
#endif
