/* The plain formats f32, f16, bf16: one little-endian number per weight, no scales. */
#ifndef FM_QUANT_QUANT_PLAIN_H
#define FM_QUANT_QUANT_PLAIN_H

#include "quant/quant.h"

enum { FM_QUANT_AFFINE_F32 = 0, FM_QUANT_AFFINE_F16 = 0, FM_QUANT_AFFINE_BF16 = 0 };

void fm_quant_decode_F32(const fm_quant_row *row, int64_t n_cols, float *y);
void fm_quant_decode_F16(const fm_quant_row *row, int64_t n_cols, float *y);
void fm_quant_decode_BF16(const fm_quant_row *row, int64_t n_cols, float *y);

void fm_quant_encode_F32(const float *x, int64_t n_cols, int32_t group, fm_quant scale_format,
                         uint8_t *codes, uint8_t *scales, uint8_t *biases);
void fm_quant_encode_F16(const float *x, int64_t n_cols, int32_t group, fm_quant scale_format,
                         uint8_t *codes, uint8_t *scales, uint8_t *biases);
void fm_quant_encode_BF16(const float *x, int64_t n_cols, int32_t group, fm_quant scale_format,
                          uint8_t *codes, uint8_t *scales, uint8_t *biases);

/* Element i of an array of plain numbers (scales, biases) at any address; q must be plain. */
float fm_plain_load(fm_quant q, const uint8_t *p, int64_t i);
void fm_plain_store(fm_quant q, uint8_t *p, int64_t i, float value);
float fm_plain_max(fm_quant q); /* the largest finite value */

#endif
