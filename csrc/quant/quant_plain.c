/* Owns: the codecs of f32, f16 and bf16, and access to arrays of them (affine scales). */
#include "quant/quant_plain.h"

#include <assert.h>
#include <float.h>

#include "quant/half.h"

#define PLAIN_CODEC(ID, name)                                                                      \
    void fm_quant_decode_##ID(const fm_quant_row *row, int64_t n_cols, float *y)                   \
    {                                                                                              \
        for (int64_t i = 0; i < n_cols; i++)                                                       \
            y[i] = fm_load_##name(row->codes, i);                                                  \
    }                                                                                              \
    void fm_quant_encode_##ID(const float *x, int64_t n_cols, int32_t group,                       \
                              fm_quant scale_format, uint8_t *codes, uint8_t *scales,              \
                              uint8_t *biases)                                                     \
    {                                                                                              \
        (void)group, (void)scale_format, (void)scales, (void)biases;                               \
        for (int64_t i = 0; i < n_cols; i++)                                                       \
            fm_store_##name(codes, i, x[i]);                                                       \
    }

PLAIN_CODEC(F32, f32)
PLAIN_CODEC(F16, f16)
PLAIN_CODEC(BF16, bf16)

float fm_plain_load(fm_quant q, const uint8_t *p, int64_t i)
{
    assert(q == FM_QUANT_F32 || q == FM_QUANT_F16 || q == FM_QUANT_BF16);
    if (q == FM_QUANT_BF16)
        return fm_load_bf16(p, i);
    return q == FM_QUANT_F16 ? fm_load_f16(p, i) : fm_load_f32(p, i);
}

void fm_plain_store(fm_quant q, uint8_t *p, int64_t i, float value)
{
    assert(q == FM_QUANT_F32 || q == FM_QUANT_F16 || q == FM_QUANT_BF16);
    if (q == FM_QUANT_BF16)
        fm_store_bf16(p, i, value);
    else if (q == FM_QUANT_F16)
        fm_store_f16(p, i, value);
    else
        fm_store_f32(p, i, value);
}

float fm_plain_max(fm_quant q)
{
    if (q == FM_QUANT_F16)
        return 65504.0f;
    return q == FM_QUANT_BF16 ? 0x1.fep127f : FLT_MAX;
}
