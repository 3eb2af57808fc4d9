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
