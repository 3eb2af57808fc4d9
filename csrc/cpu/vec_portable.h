/* The operations that vec.h asks of an ISA, in plain C: so that every template header compiles alone. No variant
 * uses it. */
#ifndef FM_CPU_VEC_PORTABLE_H
#define FM_CPU_VEC_PORTABLE_H

#include "cpu/vec_types.h"
#include "quant/half.h"

#if FM_VEC_ISA == FM_VEC_PORTABLE

FM_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }
FM_INLINE vf vf_max(vf a, vf b) { return vf_select(a > b, a, b); }

FM_INLINE vi vf_round_i(vf x)
{
    return (vi){(int32_t)rintf(x[0]), (int32_t)rintf(x[1]), (int32_t)rintf(x[2]), (int32_t)rintf(x[3])};
}

FM_INLINE vh vh_load_part(const void *p, int64_t n)
{
    vh v = {0};
    memcpy(&v, p, (size_t)n * 2);
    return v;
}

FM_INLINE vu vu_load_part(const void *p, int64_t n)
{
    vu v = {0};
    memcpy(&v, p, (size_t)n * 4);
    return v;
}

FM_INLINE vf vf_from_f16(const void *p)
{
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    return (vf){fm_f16_to_f32(h[0]), fm_f16_to_f32(h[1]), fm_f16_to_f32(h[2]), fm_f16_to_f32(h[3])};
}

FM_INLINE vf vf_from_bf16(const void *p)
{
    vh h;
    memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

FM_INLINE vh vf_to_f16(vf x)
{
    return (vh){fm_f32_to_f16(x[0]), fm_f32_to_f16(x[1]), fm_f32_to_f16(x[2]), fm_f32_to_f16(x[3])};
}

FM_INLINE vf vf_from_u8(const uint8_t *p) { return (vf){p[0], p[1], p[2], p[3]}; }

#define VI_DP_SPLITS 0
FM_INLINE vi vi_dp(vi acc, vu u, vi s, bool wide)
{
    (void)wide;
    for (int i = 0; i < 32; i += 8)
        acc += (vi)((u >> i) & 0xff) * ((s << (24 - i)) >> 24);
    return acc;
}

FM_INLINE vu v_plane(vu d, int planes, int p)
{
    return d >> (p * 8 / planes) & (uint32_t)(0x01010101u * ((1u << (8 / planes)) - 1));
}

FM_INLINE void vf_stream(float *p, vf v) { vf_store(p, v); }
FM_INLINE void vf_stream_end(void) {}

FM_INLINE vi vi_hadd(vi a, vi b) { return (vi){a[0] + a[1], a[2] + a[3], b[0] + b[1], b[2] + b[3]}; }

FM_INLINE vi vi_quad(const vi *h, const vi *l, bool small)
{
    (void)small;
    return vi_hadd(vi_hadd((h[0] << 7) + l[0], (h[1] << 7) + l[1]), vi_hadd((h[2] << 7) + l[2], (h[3] << 7) + l[3]));
}

FM_INLINE void v_transpose(vu *d)
{
    const vu a = d[0], b = d[1], c = d[2], e = d[3];
    for (int i = 0; i < 4; i++)
        d[i] = (vu){a[i], b[i], c[i], e[i]};
}

typedef struct v_cut {
    int bits;
} v_cut;

FM_INLINE v_cut v_cut_make(int bits) { return (v_cut){bits}; }

FM_INLINE vb v_unpack(const v_cut *c, const uint8_t *p, int64_t n)
{
    const int bits = c->bits;
    vb out = {0};
    for (int i = 0; i < VB; i++) {
        const int at = i * bits;
        const uint32_t lo = at / 8 < n ? p[at / 8] : 0, hi = at / 8 + 1 < n ? p[at / 8 + 1] : 0;
        out[i] = (uint8_t)(((lo | hi << 8) >> (at % 8)) & ((1u << bits) - 1));
    }
    return out;
}

#endif
#endif
