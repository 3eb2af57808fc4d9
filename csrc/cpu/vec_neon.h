/* NEON with dotprod (and i8mm when FM_VEC_I8MM is set): the operations that vec.h asks of an ISA. */
#ifndef FM_CPU_VEC_NEON_H
#define FM_CPU_VEC_NEON_H

#include "cpu/vec_types.h"

#if FM_VEC_ISA == FM_VEC_NEON
#include <arm_neon.h>

FM_INLINE vf vf_fma(vf a, vf b, vf c) { return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
FM_INLINE vf vf_max(vf a, vf b) { return (vf)vmaxnmq_f32((float32x4_t)a, (float32x4_t)b); }
FM_INLINE vi vf_round_i(vf x) { return (vi)vcvtnq_s32_f32((float32x4_t)x); }

FM_INLINE vf vf_from_f16(const void *p)
{
    uint16x4_t h;
    memcpy(&h, p, sizeof h);
    return (vf)vcvt_f32_f16(vreinterpret_f16_u16(h));
}
FM_INLINE vf vf_from_bf16(const void *p)
{
    uint16x4_t h;
    memcpy(&h, p, sizeof h);
    return (vf)vshll_n_u16(h, 16);
}

FM_INLINE vh vf_to_f16(vf x) { return (vh)vcvt_f16_f32((float32x4_t)x); }

/* n <= VL elements, the rest 0; no byte past them is touched. */
FM_INLINE vh vh_load_part(const void *p, int64_t n)
{
    vh v = {0};
    if (n == VL)
        memcpy(&v, p, sizeof v);
    else
        memcpy(&v, p, (size_t)n * 2);
    return v;
}

FM_INLINE vu vu_load_part(const void *p, int64_t n)
{
    vu v = {0};
    if (n == VL)
        memcpy(&v, p, sizeof v);
    else
        memcpy(&v, p, (size_t)n * 4);
    return v;
}

FM_INLINE vf vf_from_u8(const uint8_t *p)
{
    return (vf){(float)p[0], (float)p[1], (float)p[2], (float)p[3]};
}

/* Older clangs declare these intrinsics only when the whole file is compiled for the extension; their assembler goes
 * by the function's target. */
#if defined(__clang__)
FM_INLINE vi dot_signed(vi acc, vu u, vi s)
{
    __asm__("sdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(u), "w"(s));
    return acc;
}
#else
FM_INLINE vi dot_signed(vi acc, vu u, vi s) { return (vi)vdotq_s32((int32x4_t)acc, (int8x16_t)u, (int8x16_t)s); }
#endif

#if defined(FM_VEC_I8MM)
#define VI_DP_SPLITS 0
FM_INLINE vi vi_dp(vi acc, vu u, vi s, bool wide)
{
    (void)wide;
#if defined(__clang__)
    __asm__("usdot %0.4s, %1.16b, %2.16b" : "+w"(acc) : "w"(u), "w"(s));
    return acc;
#else
    return (vi)vusdotq_s32((int32x4_t)acc, (uint8x16_t)u, (int8x16_t)s);
#endif
}
#else
/* sdot takes signed bytes: codes below 128 are the same signed, of wider ones the top bit is added by itself. */
#define VI_DP_SPLITS 1
FM_INLINE vi vi_dp(vi acc, vu u, vi s, bool wide)
{
    if (!wide)
        return dot_signed(acc, u, s);
    return dot_signed(acc, u & 0x7f7f7f7f, s) + dot_signed((vi){0}, (u >> 7) & 0x01010101, s) * 128;
}
#endif

FM_INLINE vu v_plane(vu d, int planes, int p)
{
    return d >> (p * 8 / planes) & (uint32_t)(0x01010101u * ((1u << (8 / planes)) - 1));
}

FM_INLINE void vf_stream(float *p, vf v) { vf_store(p, v); }
FM_INLINE void vf_stream_end(void) {}

FM_INLINE vi vi_hadd(vi a, vi b) { return (vi)vpaddq_s32((int32x4_t)a, (int32x4_t)b); }

FM_INLINE vi vi_quad(const vi *h, const vi *l, bool small)
{
    (void)small;
    return vi_hadd(vi_hadd((h[0] << 7) + l[0], (h[1] << 7) + l[1]), vi_hadd((h[2] << 7) + l[2], (h[3] << 7) + l[3]));
}

FM_INLINE void v_transpose(vu *d)
{
    const uint64x2_t a = vreinterpretq_u64_u32(vtrn1q_u32((uint32x4_t)d[0], (uint32x4_t)d[1]));
    const uint64x2_t b = vreinterpretq_u64_u32(vtrn2q_u32((uint32x4_t)d[0], (uint32x4_t)d[1]));
    const uint64x2_t c = vreinterpretq_u64_u32(vtrn1q_u32((uint32x4_t)d[2], (uint32x4_t)d[3]));
    const uint64x2_t e = vreinterpretq_u64_u32(vtrn2q_u32((uint32x4_t)d[2], (uint32x4_t)d[3]));
    d[0] = (vu)vtrn1q_u64(a, c);
    d[1] = (vu)vtrn1q_u64(b, e);
    d[2] = (vu)vtrn2q_u64(a, c);
    d[3] = (vu)vtrn2q_u64(b, e);
}

/* A code spans two bytes at most: tbl brings them to a 16-bit lane, a shift by lane and a mask cut it. */
typedef struct v_cut {
    uint8x16_t pair[2];
    int16x8_t shift;
    uint16x8_t mask;
    int bits;
} v_cut;

FM_INLINE v_cut v_cut_make(int bits)
{
    uint8_t pair[2][16];
    int16_t shift[8];
    for (int k = 0; k < 16; k++) {
        pair[k / 8][k % 8 * 2] = (uint8_t)(k * bits / 8);
        pair[k / 8][k % 8 * 2 + 1] = (uint8_t)(k * bits / 8 + 1);
        shift[k % 8] = (int16_t)-(k * bits % 8);
    }
    return (v_cut){{vld1q_u8(pair[0]), vld1q_u8(pair[1])}, vld1q_s16(shift), vdupq_n_u16((uint16_t)((1 << bits) - 1)),
                   bits};
}

/* VB codes from the first VB*bits/8 of n bytes at p (missing bytes read as 0), one byte per code. */
FM_INLINE vb v_unpack(const v_cut *c, const uint8_t *p, int64_t n)
{
    uint8x16_t in = vdupq_n_u8(0);
    if (n >= 16)
        in = vld1q_u8(p);
    else
        memcpy(&in, p, (size_t)(n < 2 * c->bits ? n : 2 * c->bits));
    const uint16x8_t lo = vreinterpretq_u16_u8(vqtbl1q_u8(in, c->pair[0]));
    const uint16x8_t hi = vreinterpretq_u16_u8(vqtbl1q_u8(in, c->pair[1]));
    return (vb)vcombine_u8(vmovn_u16(vandq_u16(vshlq_u16(lo, c->shift), c->mask)),
                           vmovn_u16(vandq_u16(vshlq_u16(hi, c->shift), c->mask)));
}

#endif
#endif
