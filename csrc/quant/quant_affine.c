/* Owns: the codecs of the affine formats: one bit-stream codec for all widths.
 * The scale may be negative: then the exact edge is the group's maximum.
 * Source: MLX, mlx/backend/cpu/quantized.cpp (affine quantize), MIT. */
#include "quant/quant_affine.h"

#include <math.h>
#include <string.h>

#include "quant/quant_plain.h"

static void decode(const fm_quant_row *row, int64_t n_cols, float *y, int bits)
{
    const fm_quant format = row->scale_format;
    for (int64_t j = 0; j < n_cols; j += row->group) {
        const int64_t g = j / row->group;
        const float scale = fm_plain_load(format, row->scales, g);
        const float bias = fm_plain_load(format, row->biases, g);
        for (int64_t i = j; i < j + row->group; i++) {
            const float product = scale * (float)fm_affine_code(row->codes, i, bits);
            y[i] = product + bias;
        }
    }
}

/* Round to the scale format; beyond its range the nearest finite value, never infinity. */
static float store_rounded(fm_quant format, uint8_t *p, int64_t i, float value)
{
    const float max = fm_plain_max(format);
    fm_plain_store(format, p, i, fmaxf(-max, fminf(max, value)));
    return fm_plain_load(format, p, i);
}

static void put_code(uint8_t *codes, int64_t j, int bits, uint32_t code)
{
    const int64_t bit = j * bits;
    const uint32_t v = code << (bit & 7);
    codes[bit >> 3] |= (uint8_t)v;
    if (v > 0xff)
        codes[(bit >> 3) + 1] |= (uint8_t)(v >> 8);
}

static void encode_group(const float *x, int64_t j, int32_t group, fm_quant format, int bits,
                         uint8_t *codes, uint8_t *scales, uint8_t *biases)
{
    const float max_code = (float)((1 << bits) - 1), tiny = 1e-7f;
    float w_min = x[j], w_max = x[j], bias = 0.0f;
    for (int64_t i = j + 1; i < j + group; i++) {
        w_min = fminf(w_min, x[i]);
        w_max = fmaxf(w_max, x[i]);
    }
    const int min_is_edge = fabsf(w_min) > fabsf(w_max);
    const float edge = min_is_edge ? w_min : w_max;
    float scale = fmaxf((w_max - w_min) / max_code, tiny);
    scale = min_is_edge ? scale : -scale;
    const float edge_code = rintf(edge / scale);
    if (edge_code != 0.0f) {
        scale = edge / edge_code;
        bias = edge;
    }
    scale = store_rounded(format, scales, j / group, scale);
    bias = store_rounded(format, biases, j / group, bias);
    for (int64_t i = j; i < j + group; i++) {
        const float q = rintf((x[i] - bias) / scale);
        /* Written so that a NaN (the caller's error) becomes 0, not undefined behaviour. */
        put_code(codes, i, bits, q > 0.0f ? (uint32_t)fminf(q, max_code) : 0);
    }
}

static void encode(const float *x, int64_t n_cols, int32_t group, fm_quant format, uint8_t *codes,
                   uint8_t *scales, uint8_t *biases, int bits)
{
    memset(codes, 0, (size_t)(n_cols * bits / 8));
    for (int64_t j = 0; j < n_cols; j += group)
        encode_group(x, j, group, format, bits, codes, scales, biases);
}

#define AFFINE_CODEC(ID, bits)                                                                     \
    void fm_quant_decode_##ID(const fm_quant_row *row, int64_t n_cols, float *y)                   \
    {                                                                                              \
        decode(row, n_cols, y, bits);                                                              \
    }                                                                                              \
    void fm_quant_encode_##ID(const float *x, int64_t n_cols, int32_t group,                       \
                              fm_quant scale_format, uint8_t *codes, uint8_t *scales,              \
                              uint8_t *biases)                                                     \
    {                                                                                              \
        encode(x, n_cols, group, scale_format, codes, scales, biases, bits);                       \
    }

AFFINE_CODEC(AFFINE2, 2)
AFFINE_CODEC(AFFINE3, 3)
AFFINE_CODEC(AFFINE4, 4)
AFFINE_CODEC(AFFINE5, 5)
AFFINE_CODEC(AFFINE6, 6)
AFFINE_CODEC(AFFINE8, 8)
