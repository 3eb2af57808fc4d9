/* Argument structs and constants shared by the host (metal, Objective-C) and the shaders.
 * Every struct is asserted to the same size on both sides; all counts are elements, all strides
 * elements unless they say bytes. Pointers are GPU addresses on the host side. */
#ifndef FM_METAL_ARGS_H
#define FM_METAL_ARGS_H

#ifdef __METAL_VERSION__
#define FM_PTR(T) device T *
#define FM_ASSERT_SIZE(T, n) static_assert(sizeof(T) == n, #T " has another size on the host")
#else
#include <stdint.h>
#define FM_PTR(T) uint64_t
#define FM_ASSERT_SIZE(T, n) _Static_assert(sizeof(T) == n, #T " has another size in the shaders")
#endif

typedef unsigned int fm_u32;
typedef int fm_i32;

/* Function constants: numbers of [[function_constant(n)]] in kernels/common.h. */
enum {
    FM_FC_FORMAT = 0, /* FM_FMT_* of a weight matrix */
    FM_FC_GROUP = 1,  /* columns per scale: 16, 32, 64, 128 */
    FM_FC_SCALE = 2,  /* FM_FMT_F32, F16 or BF16 of scales and biases */
    FM_FC_VEC = 3,    /* 1: rows of codes and of x are 16-byte aligned */
    FM_FC_GATED = 4,  /* 1: two matrices, out = silu(gate) * up */
    FM_FC_DIM = 5,    /* head_dim, or dk: sizes registers */
    FM_FC_BYTES = 6,  /* 1: areas may lie at any byte address (experts read in place from foreign files) */
    FM_FC_LONG = 7    /* 1: more columns than mat_vec's tile holds */
};

/* Weight formats as the shaders number them: affine formats are their bits. */
enum {
    FM_FMT_AFFINE2 = 2,
    FM_FMT_AFFINE3 = 3,
    FM_FMT_AFFINE4 = 4,
    FM_FMT_AFFINE5 = 5,
    FM_FMT_AFFINE6 = 6,
    FM_FMT_AFFINE8 = 8,
    FM_FMT_F16 = 16,
    FM_FMT_BF16 = 17,
    FM_FMT_F32 = 32
};

enum {
    FM_WIDTH = 32,       /* lanes of a simdgroup */
    FM_MV_SLICES = 4,     /* matvec: simdgroups of 32 * FM_WIDTH columns that share a row, at most */
    FM_MV_SIMDGROUPS = 4, /* of a threadgroup, at most */
    FM_MV_PAIRS = 16,     /* pairs of matrix rows that a simdgroup takes, at most */
    FM_MU_COLUMNS = 4096,  /* matvec on matrix units: columns, at most */
    FM_MU_PARTS = 160,     /* tiles of 16 matrix rows of a threadgroup, times slices, at most */
    FM_MU_SIMDGROUPS = 16, /* of a threadgroup, at most */
    FM_MU_THREADS = 512,   /* FM_MU_SIMDGROUPS * FM_WIDTH: an attribute takes no product */
    FM_MM_TILE = 32,     /* matmul: rows, outputs and columns of a tile */
    FM_MM_THREADS = 128,
    FM_NORM_THREADS = 256,
    FM_ATTN_MAX_DIM = 256,
    FM_ATTN_SIMDGROUPS = 8,
    FM_ATTN_LEAST_PART = 256, /* decode attention: fewest positions of a part ... */
    FM_ATTN_MOST_PARTS = 32,  /* ... and most parts of a row */
    FM_ATTN_MERGE = 64,  /* threads that merge the parts of a row and head */
    FM_ATTN_QUERIES = 8, /* tiled attention: queries and keys of a tile */
    FM_ATTN_KEYS = 16,
    FM_DELTA_MAX_DK = 256,
    FM_DELTA_CHUNK_DK = 128, /* largest dk of the chunked kernel */
    FM_DELTA_CHUNK = 32,     /* rows of a chunk */
    FM_DELTA_SIMDGROUPS = 8,
    FM_ROUTE_MAX_EXPERTS = 2048,
    FM_ROUTE_MAX_GROUPS = 64
};

/* One matrix (or, gated, two of one shape) applied to rows of x. Codes begin codes_at bytes past a
 * pointer that is a multiple of 4; 0 unless FM_FC_BYTES. */
typedef struct fm_metal_item {
    FM_PTR(const fm_u32) codes;
    FM_PTR(const unsigned char) scales;
    FM_PTR(const unsigned char) biases;
    FM_PTR(const fm_u32) up_codes; /* gated only */
    FM_PTR(const unsigned char) up_scales;
    FM_PTR(const unsigned char) up_biases;
    FM_PTR(const float) bias; /* [n_out], used when has_bias */
    FM_PTR(float) y;          /* [n, n_out], rows ldy apart */
    fm_u32 n_out, ldy;
    fm_u32 n;     /* rows of x */
    fm_u32 row0;  /* first entry in the row list, or first row of x without one */
    fm_u32 has_bias, add;
    fm_u32 codes_at, up_at; /* 0..3 */
} fm_metal_item;
FM_ASSERT_SIZE(fm_metal_item, 96);

typedef struct fm_mat_args {
    fm_u32 n_cols, ldx;
    fm_u32 codes_stride, scales_stride; /* bytes per row */
    fm_u32 gather;                      /* 1: row i of x is rows[row0 + i] */
    fm_u32 slices, pairs;               /* mat_vec: simdgroups that share a row; pairs of rows of each, even
                                           mat_vec_units: slices of a row, full passes; tiles of a threadgroup */
} fm_mat_args;
FM_ASSERT_SIZE(fm_mat_args, 28);

typedef struct fm_embed_args {
    fm_u32 n, n_cols, ldy, codes_stride, scales_stride;
    fm_u32 codes_at; /* as in fm_metal_item */
} fm_embed_args;
FM_ASSERT_SIZE(fm_embed_args, 24);

typedef struct fm_norm_args {
    fm_u32 n_cols, ldx, ldy;
    float eps;
} fm_norm_args;
FM_ASSERT_SIZE(fm_norm_args, 16);

typedef struct fm_rotary_args {
    fm_u32 n, ld, ld_head, n_heads, half_rot;
} fm_rotary_args;
FM_ASSERT_SIZE(fm_rotary_args, 20);

typedef struct fm_rows_args {
    fm_u32 n, n_cols;
    float limit; /* clip */
} fm_rows_args;
FM_ASSERT_SIZE(fm_rows_args, 12);

/* A row of a decode batch: its sequence's cache, how much of it the row sees, and by parts of how many positions.
 * The length of a part follows from n_pos alone: what else is in the batch leaves no trace in a row's bits. */
typedef struct fm_attn_row {
    FM_PTR(const float) k;
    FM_PTR(const float) v;
    fm_u32 row, n_pos, capacity, part;
} fm_attn_row;
FM_ASSERT_SIZE(fm_attn_row, 32);

typedef struct fm_attend_args {
    fm_u32 n_heads, n_kv_heads, head_dim, ld_q, ld_q_head, ld_y, has_gate;
    float scale;
    fm_u32 row0, n, pos0, capacity; /* tiled kernel only: one sequence's rows */
    fm_u32 max_parts;               /* parts per row and head that there is room for; not tiled */
} fm_attend_args;
FM_ASSERT_SIZE(fm_attend_args, 52);

typedef struct fm_store_args {
    fm_u32 n_kv_heads, head_dim, ld, capacity, row0, n, pos0;
} fm_store_args;
FM_ASSERT_SIZE(fm_store_args, 28);

typedef struct fm_conv_silu_args {
    fm_u32 n, n_ch, kern, ldm, ldy;
} fm_conv_silu_args;
FM_ASSERT_SIZE(fm_conv_silu_args, 20);

typedef struct fm_delta_shape {
    fm_u32 n, n_k_heads, n_v_heads, dk, dv; /* n: rows of one sequence */
    fm_u32 ld_qkv, ld_z, ld_ab, ld_y;
    float eps;
} fm_delta_shape;
FM_ASSERT_SIZE(fm_delta_shape, 40);

typedef struct fm_topk_args {
    fm_u32 n_experts, k, sigmoid, renorm, has_bias, n_group, topk_group;
    float eps, scale;
} fm_topk_args;
FM_ASSERT_SIZE(fm_topk_args, 36);

typedef struct fm_argmax_args {
    fm_u32 n_cols, n_valid; /* ids >= n_valid are never chosen */
} fm_argmax_args;
FM_ASSERT_SIZE(fm_argmax_args, 8);

#endif
