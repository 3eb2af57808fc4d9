/* Owns: the weight formats, their byte layout and their reference codecs.
 *
 * A matrix [n_rows, n_cols] is up to three byte areas, rows back to back in each:
 *   codes   plain formats: the numbers themselves. affineB: one little-endian bit stream per row, code j
 *           in bits j*B .. j*B+B-1 counted from the row's first byte; a row is n_cols*B/8 whole bytes.
 *   scales  affine only: n_cols/group numbers per row, of a plain format (bf16 in the wild).
 *   biases  affine only: the same shape.         W[r][c] = scale[r][c/group] * code + bias[r][c/group]
 * Areas may start at ANY byte address (foreign files are read in place): use memcpy or unaligned loads.
 * Source: MLX affine quantisation; docs/format.md. */
#ifndef FM_QUANT_QUANT_H
#define FM_QUANT_QUANT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/status.h"
#include "quant/quant_list.h"

typedef enum fm_quant {
#define X(id, disk, name, bits) FM_QUANT_##id,
    FM_QUANT_LIST(X)
#undef X
    FM_QUANT_COUNT
} fm_quant;

/* One row's (or row range's) areas. scales, biases NULL and group 0 for plain formats. */
typedef struct fm_quant_row {
    const uint8_t *codes, *scales, *biases;
    int32_t group;
    fm_quant scale_format; /* F32, F16 or BF16 */
} fm_quant_row;

typedef struct fm_quant_traits {
    const char *name;
    int32_t disk_id;
    int bits;
    bool affine;
    /* y[0..n_cols) = the row's values, f32 arithmetic scale*code + bias in one rounding each. */
    void (*decode_ref)(const fm_quant_row *row, int64_t n_cols, float *y);
    /* Nearest values in the format. Affine: scales/biases are written in scale_format, codes chosen
     * against the rounded scale and bias. Non-finite input is the caller's error. */
    void (*encode_ref)(const float *x, int64_t n_cols, int32_t group, fm_quant scale_format,
                       uint8_t *codes, uint8_t *scales, uint8_t *biases);
} fm_quant_traits;

const fm_quant_traits *fm_quant_get(fm_quant q);      /* never NULL for q < FM_QUANT_COUNT */
bool fm_quant_find_name(const char *name, fm_quant *out);
bool fm_quant_find_disk(int32_t disk_id, fm_quant *out);

/* Legal: plain, or affine with group in {16, 32, 64, 128}, n_cols % group == 0, plain scale format, and
 * whole bytes per row. The error message says which rule broke. */
fm_status fm_quant_check(fm_quant q, int64_t n_cols, int32_t group, fm_quant scale_format);
/* Bytes of one row in each area; 0 for scales of plain formats. Only for legal combinations. */
int64_t fm_quant_codes_bytes(fm_quant q, int64_t n_cols);
int64_t fm_quant_scales_bytes(fm_quant q, int64_t n_cols, int32_t group, fm_quant scale_format);

#endif
