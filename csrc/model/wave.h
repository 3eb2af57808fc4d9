/* Owns: the lists of a MoE block, and the steps of it that the plain and the pipelined forward share.
 * Private to model/. */
#ifndef FM_MODEL_WAVE_H
#define FM_MODEL_WAVE_H

#include "model/block.h"

/* A slice: some rows of one expert. entry = row * k + rank. */
typedef struct fm_slice {
    int32_t begin, end; /* in entries */
    int32_t out0;       /* first part row */
} fm_slice;

struct fm_wave {
    int32_t *first;   /* [n_experts + 1]: an expert's entries are entries[first[e] .. first[e + 1]) */
    int32_t *entries; /* [rows * k], by expert, rows rising */
    int32_t *order;   /* experts in use, rising */
    int n_order;
    int32_t *hist;    /* [rows + 1] experts by number of rows */
    bool *keep;       /* [n_experts] stay cached after a sweep */
    int32_t *ids;     /* of the wave */
    int32_t *guess;   /* ids to be read on a guess */
    fm_slice *slices;
    bool *claimed, *ran, *cool;
    fm_mat (*mats)[FM_ROLE_COUNT];
    fm_expert_job *jobs;
    int n, max;
    int64_t rows; /* part rows in use */
};

/* combine's lists. */
typedef struct fm_parts {
    int32_t *start, *index; /* [rows + 1], [part rows] */
    float *weight;          /* [part rows] */
} fm_parts;

/* wave.c */
/* Counting sort of the n_entries choices by expert. */
void fm_wave_sort(struct fm_wave *w, const int32_t *ids, int64_t n_entries, int64_t n_experts);
/* Fill the wave from order[*at], entry *done of it onward. */
void fm_wave_next(struct fm_wave *w, const fm_scratch *s, int64_t k, int limit, int *at, int32_t *done);
/* Jobs of what is claimed and has not run; it counts as run from now on. */
int fm_wave_jobs(const fm_model *m, struct fm_wave *w);
/* Per row, the wave's part rows in rising expert id. */
void fm_wave_parts(const fm_model *m, const struct fm_wave *w, int64_t n_rows, const fm_parts *to);

/* block_moe.c */
/* Router logits and choices of n rows of h, recorded. */
fm_status fm_moe_route(fm_model *m, const fm_layer *y, const float *h, int64_t n, int32_t *ids, float *weights);
/* The shared expert's output goes to shared_y and is added last. */
fm_status fm_moe_shared(fm_model *m, const fm_batch *b, const fm_layer *y, int32_t layer);
fm_status fm_moe_add_shared(fm_model *m, const fm_batch *b, const fm_layer *y);
/* Routed ids that were read back: to the trace, sorted into the wave's lists; stale guesses expire. */
void fm_moe_take_routes(fm_model *m, const fm_batch *b, int32_t layer);
/* Fills w->keep, before fm_wave_next. Whether the layer would flush the cache: what is not kept cools on release. */
bool fm_moe_plan(fm_model *m, const fm_batch *b);
/* The error of a part that is not finite: names the tensor, or the expert. */
fm_status fm_moe_nonfinite(const fm_model *m, const struct fm_wave *w, int32_t layer, int64_t part);

/* lookahead.c */
typedef enum fm_guess { FM_GUESS_NONE, FM_GUESS_ALL, FM_GUESS_ROUTED } fm_guess;
/* How the experts of `layer` are guessed while the layer before it runs. */
fm_guess fm_moe_guess_kind(const fm_model *m, const fm_batch *b, int32_t layer);
/* ALL: read them in file order, as far as a sweep's window has room beside n_taken slots. */
fm_status fm_moe_guess_all(fm_model *m, int32_t layer, int64_t n_taken);
/* ROUTED: whether asking the router pays now; not asking is always right. */
bool fm_moe_guess_asks(fm_model *m, fm_guess_time time);
/* ROUTED: record the router of `layer` on the residual stream as it is, choices to ids; then, after a sync, hint what
 * it chose. */
fm_status fm_moe_guess_route(fm_model *m, int64_t n, int32_t layer, int32_t *ids);
fm_status fm_moe_guess_hint(fm_model *m, int64_t n, int32_t layer, const int32_t *ids, fm_guess_time time);
/* Both steps before this layer's experts run: scratch of parts and combine is used, s.h is kept. */
fm_status fm_moe_guess_early(fm_model *m, const fm_batch *b, int32_t layer);
/* The routers of `layer` have chosen w->order: which guesses came true. */
void fm_moe_guess_judge(fm_model *m, int32_t layer);
/* Slots that pass a layer's experts through when it wants more than its share. */
int32_t fm_moe_window(const fm_model *m);

#endif
