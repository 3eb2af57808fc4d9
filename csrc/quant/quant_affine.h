/* MLX affine formats of 2, 3, 4, 5, 6 and 8 bits: W = scale * code + bias, scale and bias per group
 * of n_cols; the codes of a row are one little-endian bit stream (byte layout in quant.h). Encoding
 * is MLX's round to nearest: of the group's two edges the one farther from zero gets a code of its
 * own (exact but for the scale format), and zero falls on or next to a code. */
#ifndef FM_QUANT_QUANT_AFFINE_H
#define FM_QUANT_QUANT_AFFINE_H

#include "quant/quant.h"

#define FM_QUANT_AFFINE_DECLARE(ID)                                                                \
    enum { FM_QUANT_AFFINE_##ID = 1 };                                                             \
    void fm_quant_decode_##ID(const fm_quant_row *row, int64_t n_cols, float *y);                  \
    void fm_quant_encode_##ID(const float *x, int64_t n_cols, int32_t group,                       \
                              fm_quant scale_format, uint8_t *codes, uint8_t *scales,              \
                              uint8_t *biases);

FM_QUANT_AFFINE_DECLARE(AFFINE2)
FM_QUANT_AFFINE_DECLARE(AFFINE3)
FM_QUANT_AFFINE_DECLARE(AFFINE4)
FM_QUANT_AFFINE_DECLARE(AFFINE5)
FM_QUANT_AFFINE_DECLARE(AFFINE6)
FM_QUANT_AFFINE_DECLARE(AFFINE8)

/* Code j of a bit stream; touches only the bytes that hold it. */
static inline uint32_t fm_affine_code(const uint8_t *codes, int64_t j, int bits)
{
    const int64_t bit = j * bits;
    const int start = (int)(bit & 7);
    uint32_t v = codes[bit >> 3];
    if (start + bits > 8)
        v |= (uint32_t)codes[(bit >> 3) + 1] << 8;
    return v >> start & ((UINT32_C(1) << bits) - 1);
}

#endif
