/* f16 and bf16 to f32 and back: exact one way, round to nearest even the other. Infinities and NaN
 * stay what they are. Integer arithmetic only, so the result hangs on no CPU mode or compiler flag.
 * fm_load_* and fm_store_* take element i of an array at any byte address. */
#ifndef FM_QUANT_HALF_H
#define FM_QUANT_HALF_H

#include <stdint.h>
#include <string.h>

static inline float fm_f32_from_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

static inline uint32_t fm_f32_to_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    return bits;
}

static inline float fm_bf16_to_f32(uint16_t h)
{
    return fm_f32_from_bits((uint32_t)h << 16);
}

static inline uint16_t fm_f32_to_bf16(float f)
{
    const uint32_t a = fm_f32_to_bits(f);
    if ((a & 0x7fffffff) > 0x7f800000) /* NaN: rounding could carry it into infinity */
        return (uint16_t)(a >> 16 | 0x40);
    return (uint16_t)((a + 0x7fff + (a >> 16 & 1)) >> 16);
}

static inline float fm_f16_to_f32(uint16_t h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, exp = h >> 10 & 31, frac = h & 0x3ff;
    if (exp == 31)
        return fm_f32_from_bits(sign | 0x7f800000 | frac << 13);
    if (exp != 0)
        return fm_f32_from_bits(sign | (exp + 112) << 23 | frac << 13);
    const float tiny = (float)frac * 0x1p-24f; /* subnormal: exact in f32 */
    return fm_f32_from_bits(sign | fm_f32_to_bits(tiny));
}

static inline uint16_t fm_f32_to_f16(float f)
{
    const uint32_t bits = fm_f32_to_bits(f), a = bits & 0x7fffffff;
    const uint16_t sign = (uint16_t)(bits >> 16 & 0x8000);
    if (a > 0x7f800000) /* NaN */
        return (uint16_t)(sign | 0x7e00 | (a >> 13 & 0x3ff));
    if (a >= 0x477ff000) /* 65520 and more round to infinity */
        return sign | 0x7c00;
    if (a >= 0x38800000) { /* normal: rebias, round off 13 bits */
        const uint32_t r = a - (UINT32_C(112) << 23);
        return (uint16_t)(sign | (r + 0xfff + (r >> 13 & 1)) >> 13);
    }
    if (a <= 0x33000000) /* up to half of the smallest subnormal */
        return sign;
    const uint32_t m = (a & 0x7fffff) | 0x800000, n_off = 126 - (a >> 23);
    const uint32_t rest = m & ((UINT32_C(1) << n_off) - 1), half = UINT32_C(1) << (n_off - 1);
    const uint32_t r = m >> n_off;
    return (uint16_t)(sign | (r + (rest > half || (rest == half && (r & 1) != 0))));
}

static inline float fm_load_f32(const uint8_t *p, int64_t i)
{
    float f;
    memcpy(&f, p + 4 * i, sizeof(f));
    return f;
}

static inline float fm_load_f16(const uint8_t *p, int64_t i)
{
    uint16_t h;
    memcpy(&h, p + 2 * i, sizeof(h));
    return fm_f16_to_f32(h);
}

static inline float fm_load_bf16(const uint8_t *p, int64_t i)
{
    uint16_t h;
    memcpy(&h, p + 2 * i, sizeof(h));
    return fm_bf16_to_f32(h);
}

static inline void fm_store_f32(uint8_t *p, int64_t i, float f)
{
    memcpy(p + 4 * i, &f, sizeof(f));
}

static inline void fm_store_f16(uint8_t *p, int64_t i, float f)
{
    const uint16_t h = fm_f32_to_f16(f);
    memcpy(p + 2 * i, &h, sizeof(h));
}

static inline void fm_store_bf16(uint8_t *p, int64_t i, float f)
{
    const uint16_t h = fm_f32_to_bf16(f);
    memcpy(p + 2 * i, &h, sizeof(h));
}

#endif
