/* Owns: a network ready to run: weights resolved per layer, scratch planned once, and the forward pass over a ragged
 * batch. Knows routers and blocks; gets experts from the store and computes through a backend. */
#ifndef FM_MODEL_MODEL_H
#define FM_MODEL_MODEL_H

#include <stdatomic.h>
#include <stdbool.h>

#include "backend/backend.h"
#include "base/trace.h"
#include "model/arch.h"
#include "model/config.h"
#include "model/state.h"
#include "store/experts.h"
#include "store/weights.h"

/* Where a forward's time went [ns]. On a device that runs ops later, a phase is the time to record it, and the device's
 * own time shows where the host waits: in router, experts and head. */
#define FM_PHASE_LIST(X) X(embed) X(attention) X(delta) X(router) X(experts) X(wait) X(shared) X(mlp) X(head)

typedef struct fm_phases {
#define X(name) int64_t name##_ns;
    FM_PHASE_LIST(X)
#undef X
} fm_phases;

typedef struct fm_layer {
    fm_mixer mixer;
    fm_ffn ffn;
    const float *input_norm, *post_norm;
    /* gated attention */
    const fm_mat *q, *k, *v, *o;
    const float *q_bias, *k_bias, *v_bias, *o_bias, *q_norm, *k_norm;
    /* Gated DeltaNet */
    const fm_mat *qkv, *z, *b, *a, *out;
    const float *conv, *A_log, *dt_bias, *lin_norm;
    /* MoE */
    const fm_mat *router, *shared_gate_proj, *shared_up_proj, *shared_down_proj, *shared_gate;
    const float *router_bias;
    /* dense */
    const fm_mat *gate_proj, *up_proj, *down_proj;
} fm_layer;

/* All f32 unless said; for at most max_rows rows. Mixer and FFN parts share memory. */
typedef struct fm_scratch {
    float *x, *h;                                   /* [rows, hidden]: residual stream, normed input */
    float *q, *k, *v, *attn;                        /* attention */
    float *qkv, *conv, *z, *a, *b, *delta;          /* delta net */
    float *router, *route_w, *shared_g, *shared_u, *shared_y, *shared_gate; /* MoE */
    int32_t *route_ids;
    float *exp_gate, *exp_up, *exp_out;             /* [part_rows, width], [.., width], [part_rows, hidden] */
    int32_t *exp_rows, *comb_start, *comb_index;
    float *comb_weight;
    float *mlp_g, *mlp_u;                           /* dense */
    float *logits;                                  /* [logit_rows, vocab] */
    int64_t part_rows, logit_rows;
} fm_scratch;

/* When the next layer's router is asked: before this layer's experts are added to the residual stream, or after. */
typedef enum fm_guess_time { FM_GUESS_EARLY, FM_GUESS_LATE, FM_GUESS_TIMES } fm_guess_time;

/* How many experts to read on a guess, learned from which guesses came true. See lookahead.c. */
typedef struct fm_lookahead {
    int64_t depth; /* experts guessed per row; 0: none, FM_LOOKAHEAD_AUTO: those that pay */
    float right[FM_GUESS_TIMES][FM_MAX_TOP_K]; /* running share of absent guesses that came true, by rank */
    struct {
        int32_t id;
        int16_t time, rank;
    } open[FM_GUESS_TIMES * FM_MAX_TOP_K]; /* guesses about open_layer, not yet judged */
    int32_t open_layer, n_open;
    int64_t n_predicted, n_right; /* judged so far; those that were in a slot already are not counted */
    float found[FM_GUESS_TIMES]; /* running number of them per asking */
    int32_t n_seen[FM_GUESS_TIMES][FM_MAX_TOP_K], n_judged[FM_GUESS_TIMES]; /* values in right and found, to a limit */
    bool asked[FM_GUESS_TIMES];  /* about open_layer */
    int64_t n_askings[FM_GUESS_TIMES];
} fm_lookahead;
enum { FM_LOOKAHEAD_AUTO = -1 };

typedef struct fm_model {
    fm_config c;
    const fm_arch *arch;
    fm_backend *be;
    const fm_weights *weights;
    fm_experts *experts; /* NULL when no layer has any */
    int64_t k;           /* experts per token in use */
    int64_t max_rows;
    fm_layer *layers;
    const fm_mat *embed, *head;
    const float *norm;
    double *inv_freq; /* [rotary_dim / 2] */
    fm_scratch s;
    void *scratch;
    size_t scratch_bytes;
    void *host; /* per-span arrays and the wave's lists */
    struct fm_wave *wave;
    struct fm_pipeline *pipe; /* NULL: every forward is a plain one */
    fm_kv *kv;
    const float **in;
    float **out;
    fm_phases phases;
    fm_trace trace;   /* off unless opened */
    fm_lookahead lookahead;
} fm_model;

/* One forward. Rows of a sequence are consecutive; spans[i] is state[i]'s share. */
typedef struct fm_batch {
    const int32_t *ids; /* [n_rows] */
    int64_t n_rows;
    const fm_span *spans;
    fm_state *const *states;
    int n_spans;
    float *const *last_logits;   /* [n_spans] of [vocab], of no use after a failure; an entry may be NULL */
    float *all_logits;           /* [n_rows, vocab] or NULL */
    int32_t *trace_router;       /* [n_rows, n_layers, k], -1 for dense layers; or NULL */
    float *trace_hidden;         /* [n_rows, n_layers, hidden] after each layer; or NULL */
    const atomic_bool *cancel;   /* or NULL */
} fm_batch;

/* What scratch is sized for. */
typedef struct fm_model_sizes {
    int64_t k /* experts per token */, max_rows, context, n_threads;
} fm_model_sizes;

/* Device bytes of scratch; host lists are counted in, and what the CPU backend keeps. */
fm_status fm_model_scratch_bytes(const fm_config *c, const fm_model_sizes *z, size_t *bytes);

fm_status fm_model_open(const fm_arch *arch, const fm_config *c, fm_backend *be, const fm_weights *w, fm_experts *e,
                        int64_t k, int64_t max_rows, fm_model **out);
void fm_model_close(fm_model *m); /* NULL is fine */

/* A phase of a layer ends now: add its time to the sum and to the trace. Layer -1: outside the layers. */
#define FM_PHASE_END(m, name, layer, t0)                                                           \
    do {                                                                                           \
        const int64_t t1_ = fm_clock_ns();                                                         \
        (m)->phases.name##_ns += t1_ - (t0);                                                       \
        fm_trace_add(&(m)->trace, FM_TRACE_##name, (layer), 0, (t0), t1_, 0);                      \
    } while (0)

/* Writes logits; states are begun, and committed only if all went well. */
fm_status fm_model_forward(fm_model *m, const fm_batch *b);

#endif
