/* Owns: what matrices that go out together have in common, and their dispatch. For metal_encode_mat and metal_later. */
#ifndef FM_METAL_MAT_H
#define FM_METAL_MAT_H

#include "metal_encode.h"

/* What makes two matrices one dispatch. */
typedef struct fm_metal_kind {
    fm_metal_constants c;
    int64_t n_cols, codes_stride, scales_stride;
} fm_metal_kind;

bool fm_metal_same_kind(const fm_metal_kind *a, const fm_metal_kind *b);
fm_status fm_metal_kind_of(const fm_mat *W, fm_metal_kind *out);

/* fm_metal_address or fm_metal_gpu_address. */
typedef fm_status (*fm_metal_addresser)(fm_metal *m, const void *p, size_t bytes, const char *what, uint64_t *out);

/* GPU addresses of a matrix's areas; plain formats name their codes three times. Codes at any byte: the multiple of 4
 * before them, and how far they lie past it. */
fm_status fm_metal_mat_address(fm_metal *m, const fm_mat *W, fm_metal_addresser address, uint64_t *codes, fm_u32 *at,
                               uint64_t *scales, uint64_t *biases);

/* A dispatch of n table entries; an entry with n = 0 rows does nothing. */
typedef struct fm_metal_items {
    bool gated, vec; /* vec: mat_vec, else mat_mul */
    fm_metal_place x, table;
    int64_t ldx;
    const fm_metal_place *rows; /* the row list, or NULL */
    int64_t n, most_out, most_rows;
} fm_metal_items;

fm_status fm_metal_run_items(fm_metal *m, fm_metal_kind kind, const fm_metal_items *a);

#endif
