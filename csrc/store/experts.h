/* Owns: routed experts in slots of backend memory, and the reads that fill them.
 * hint: start reading; claim: pin those that are ready, waiting for at least one; release: unpin.
 * Knows (layer, id), not routers. No claim ever returns an expert that is missing, short or corrupt.
 * Not thread-safe: the engine's lock is held. */
#ifndef FM_STORE_EXPERTS_H
#define FM_STORE_EXPERTS_H

#include <stdatomic.h>
#include <stdbool.h>

#include "backend/backend.h"
#include "base/trace.h"
#include "io/io.h"
#include "store/desc.h"
#include "store/expert_cache.h"

typedef struct fm_experts fm_experts;

typedef struct fm_experts_opts {
    int32_t n_slots;
    bool verify;            /* check recorded CRC-32C on every read */
    fm_cache_policy policy;
    size_t split_bytes;     /* read an expert in parts of about this size; 0: FM_EXPERTS_SPLIT_BYTES */
} fm_experts_opts;

enum { FM_EXPERTS_SPLIT_BYTES = 512 << 10 };

typedef struct fm_expert_stats {
    int64_t hits, misses;         /* of demanded experts; a miss was read for this demand or a guess of it */
    int64_t n_reads, bytes_read;  /* from the device, alignment included */
    int64_t wait_ns;              /* the compute thread waited for reads */
    int64_t read_ns, crc_ns;      /* summed over I/O workers */
    int64_t n_failed;
    int64_t guessed, guess_used;  /* experts read on a guess; of them, claimed */
    int64_t guess_wasted_bytes;   /* read on guesses that were wrong */
} fm_expert_stats;

/* d, io, be are borrowed and must outlive it. */
fm_status fm_experts_open(const fm_model_desc *d, fm_io *io, fm_backend *be, const fm_experts_opts *opts,
                          fm_experts **out);
void fm_experts_close(fm_experts *e); /* NULL is fine; waits for reads */

typedef enum fm_hint {
    FM_HINT_DEMAND, /* will be claimed now; a use to the cache */
    FM_HINT_AHEAD,  /* certain, but later: queued behind, in order */
    FM_HINT_GUESS,  /* may be wrong: lowest priority, a part of the slots at most, dropped by fm_experts_expire, never
                     * an error; a demand for it later overtakes the other guesses */
} fm_hint;

/* Start reads for what is not there, as far as free slots and requests go. DEMAND and AHEAD of one wave and what
 * follows it: at most n_slots experts together, else they evict each other. layer is the model's layer number. */
fm_status fm_experts_hint(fm_experts *e, int32_t layer, const int32_t *ids, int n, fm_hint kind);

/* Guesses for this layer that are not among ids are wrong: cancel those whose reads have not started, let the slots
 * of the others go first. */
void fm_experts_expire(fm_experts *e, int32_t layer, const int32_t *ids, int n);
int32_t fm_experts_guesses(const fm_experts *e); /* slots of guesses that may still come true */

/* For each i with !claimed[i] that is ready: pin, set claimed[i], fill mats[i] = {gate, up, down}. Blocks until at
 * least one new is ready; *n_new tells how many. cancel (may be NULL) ends the wait with FM_ERR_CANCELLED.
 * On error the pins taken so far stay: release what is claimed. */
fm_status fm_experts_claim(fm_experts *e, int32_t layer, const int32_t *ids, int n, bool *claimed,
                           fm_mat (*mats)[FM_ROLE_COUNT], const atomic_bool *cancel, int *n_new);
/* Like claim, but never waits: *n_new may be 0. What it pins, guesses that follow cannot evict. */
fm_status fm_experts_poll(fm_experts *e, int32_t layer, const int32_t *ids, int n, bool *claimed,
                          fm_mat (*mats)[FM_ROLE_COUNT], int *n_new);
/* Matrices like those of every expert of the layer: shape, format, strides. Their addresses only tell an alignment:
 * that of the least aligned expert. */
void fm_experts_like(const fm_experts *e, int32_t layer, fm_mat mats[FM_ROLE_COUNT]);
/* After a wave failed: nobody waits for the reads under way any more, so their failures are nobody's. */
void fm_experts_disown(fm_experts *e);
/* cool (may be NULL): cool[i] lets expert i go before any other, for sweeps that would flush the cache. */
void fm_experts_release(fm_experts *e, int32_t layer, const int32_t *ids, int n, const bool *claimed, const bool *cool);

/* Read experts into slots again though they may be there, as many at a time as the slots and requests allow, and wait
 * for all: what the device alone takes. None may be claimed. ids[i] is of layer layers[i]. */
fm_status fm_experts_reread(fm_experts *e, const int32_t *layers, const int32_t *ids, int64_t n);

/* Names the tensor of a claimed expert that holds NaN or infinity; FM_OK if none does. */
fm_status fm_experts_check_finite(const fm_experts *e, int32_t layer, int32_t id);

int32_t fm_experts_slots(const fm_experts *e);
int64_t fm_experts_total(const fm_experts *e); /* experts of all layers */
int64_t fm_experts_layers(const fm_experts *e);
bool fm_experts_present(const fm_experts *e, int32_t layer, int32_t id); /* read or being read */
/* Shrink or grow within what was opened; waits for reads first. Memory above is given back to the system. */
fm_status fm_experts_resize(fm_experts *e, int32_t n_slots);
int64_t fm_experts_pinned(const fm_experts *e);
void fm_experts_get_stats(const fm_experts *e, fm_expert_stats *out);
void fm_experts_reset_stats(fm_experts *e);
void fm_experts_set_trace(fm_experts *e, fm_trace *trace); /* borrowed */

#endif
