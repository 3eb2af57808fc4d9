/* The blocks of the network: each adds its part to the residual stream s.x, reading the normed rows s.h.
 * Private to model/. */
#ifndef FM_MODEL_BLOCK_H
#define FM_MODEL_BLOCK_H

#include "base/mem.h"
#include "model/model.h"

fm_status fm_block_attn(fm_model *m, const fm_batch *b, int32_t layer);
fm_status fm_block_delta(fm_model *m, const fm_batch *b, int32_t layer);
fm_status fm_block_moe(fm_model *m, const fm_batch *b, int32_t layer);
fm_status fm_block_mlp(fm_model *m, const fm_batch *b, int32_t layer);

/* Steps of a forward that its plain and its pipelined form share. model.c: begin and embed; both norms of a layer and
 * the mixer between them; FM_ERR_CANCELLED when the caller asked. */
fm_status fm_run_embed(fm_model *m, const fm_batch *b);
fm_status fm_run_mixer(fm_model *m, const fm_batch *b, int32_t layer);
fm_status fm_check_cancel(const fm_batch *b);

/* head.c. At most FM_LOGIT_ROWS rows of logits at a time. */
enum { FM_LOGIT_ROWS = 16 };
fm_status fm_norm_rows(fm_model *m, const float *w, int64_t n); /* s.h = norm of s.x */
fm_status fm_head(fm_model *m, const fm_batch *b);
/* Its steps: the normed rows whose logits are wanted, and where these go; logits of n of them from the r-th on to
 * y; from s.logits to their places; what the logits of all rows and of the last ones share. */
fm_status fm_head_input(fm_model *m, const fm_batch *b, int64_t *n, float *const **to);
fm_status fm_head_matmul(fm_model *m, int64_t r, int64_t n, float *y);
void fm_head_output(fm_model *m, int64_t n, float *const *to);
void fm_head_last(fm_model *m, const fm_batch *b);
fm_status fm_head_nonfinite(void);

/* Start reading what the next layer may want, while its mixer computes: its router on this layer's output when a
 * few rows decode, everything in order when the rows will want nearly all. */
fm_status fm_guess_next(fm_model *m, const fm_batch *b, int32_t layer);

/* Scratch of each part, taken from an arena (twice: measuring, then for real). */
void fm_scratch_attn(fm_scratch *s, const fm_config *c, int64_t rows, fm_arena *a);
void fm_scratch_delta(fm_scratch *s, const fm_config *c, int64_t rows, fm_arena *a);
void fm_scratch_moe(fm_scratch *s, const fm_config *c, int64_t k, int64_t rows, fm_arena *a);
void fm_scratch_mlp(fm_scratch *s, const fm_config *c, int64_t rows, fm_arena *a);

/* The MoE block's host lists. */
fm_status fm_wave_open(const fm_config *c, int64_t k, int64_t max_rows, struct fm_wave **out);
void fm_wave_close(struct fm_wave *w);

static inline float *fm_take_floats(fm_arena *a, int64_t rows, int64_t cols)
{
    return fm_arena_take(a, (size_t)(rows * cols) * sizeof(float));
}

static inline int32_t *fm_take_ints(fm_arena *a, int64_t n) { return fm_arena_take(a, (size_t)n * sizeof(int32_t)); }

#endif
