/* Owns: one function per op, from the contract's arguments to dispatches. Shapes are checked against what the
 * kernels can do (FM_ERR_UNSUPPORTED, with both numbers); addresses by metal_device. */
#ifndef FM_METAL_ENCODE_H
#define FM_METAL_ENCODE_H

#include "metal_pipeline.h"

/* Where many rows switch to the tiled kernels, which read weights and keys once per tile. Tiles sum in another order
 * than the row kernels, so a row's last bits depend on how many rows came with it, never on which. With all three at
 * INT_MAX a batch equals its members bit for bit, as on the CPU. */
typedef struct fm_metal_tuning {
    int vec_rows;   /* matrices: up to this many rows of x by mat_vec */
    int short_span; /* attention: spans up to this long by attend_rows */
    int chunk_rows; /* DeltaNet: spans from this long on by delta_chunk */
    int units;      /* 1: 2- and 4-bit matrices by mat_vec_units where they fit it; 0 unless asked for: no gain where
                       matrix products run on the ordinary units */
} fm_metal_tuning;
extern fm_metal_tuning fm_metal_tune;

/* A dispatch under construction: pipeline chosen, buffers bound by index. */
typedef struct fm_metal_call {
    fm_metal *m;
    id<MTLComputeCommandEncoder> encoder;
    const char *kernel;
} fm_metal_call;

fm_status fm_metal_call_begin(fm_metal *m, const char *kernel, fm_metal_constants c, fm_metal_call *out);
/* Binds [p, p + bytes) of backend memory; offset must suit the kernel's element type. */
fm_status fm_metal_bind(const fm_metal_call *c, int index, const void *p, int64_t bytes, const char *what);
void fm_metal_bind_place(const fm_metal_call *c, int index, fm_metal_place place);
/* A copy of at most 4096 bytes, for argument structs. */
void fm_metal_bind_bytes(const fm_metal_call *c, int index, const void *p, size_t bytes);
/* Dispatch gx * gy * gz threadgroups of tx * ty threads. */
void fm_metal_run(const fm_metal_call *c, int64_t gx, int64_t gy, int64_t gz, int tx, int ty);

/* metal_encode_mat.m */
fm_status fm_metal_embed(fm_backend *b, const fm_mat *W, const int32_t *ids, int64_t n, float *y, int64_t ldy);
fm_status fm_metal_matmul(fm_backend *b, const float *x, int64_t ldx, int64_t n, const fm_matmul_item *items,
                          int n_items);
fm_status fm_metal_experts(fm_backend *b, const fm_expert_args *a);

/* metal_encode.m */
fm_status fm_metal_rmsnorm(fm_backend *b, const float *x, int64_t ldx, const float *w, float eps, float *y,
                           int64_t ldy, int64_t n, int64_t n_cols);
fm_status fm_metal_clip(fm_backend *b, float *x, int64_t n, float limit);
fm_status fm_metal_rope(fm_backend *b, const fm_rope_args *a);
fm_status fm_metal_swiglu(fm_backend *b, const float *gate, const float *up, float *y, int64_t n);
fm_status fm_metal_route(fm_backend *b, const fm_route_args *a, const float *logits, int64_t n, int32_t *ids,
                         float *weights);
fm_status fm_metal_combine(fm_backend *b, const fm_combine_args *a);
fm_status fm_metal_add_gated(fm_backend *b, const float *x, const float *gate, float *y, int64_t n, int64_t n_cols);
fm_status fm_metal_find_nonfinite(fm_backend *b, const float *x, int64_t n, int64_t n_cols, int64_t *row);
fm_status fm_metal_mark_nonfinite(fm_backend *b, const float *x, int64_t n, int64_t n_cols, uint32_t *marks);

/* metal_later.m */
fm_status fm_metal_experts_later(fm_backend *b, const fm_expert_later *a);
fm_status fm_metal_set_jobs(fm_backend *b, const fm_expert_later *a, const fm_expert_job *jobs, int n_jobs);

/* metal_encode_mix.m */
fm_status fm_metal_attention(fm_backend *b, const fm_attention_args *a);
fm_status fm_metal_conv(fm_backend *b, const fm_conv_args *a);
fm_status fm_metal_delta(fm_backend *b, const fm_delta_batch *a);

#endif
