/* Owns: routed experts in slots of backend memory, and the reads that fill them.
 * hint: start reading; claim: pin those that are ready, waiting for at least one; release: unpin.
 * Knows (layer, id), not routers. No claim ever returns an expert that is missing, short or corrupt.
 * Not thread-safe: the engine's lock is held. */
#ifndef FM_STORE_EXPERTS_H
#define FM_STORE_EXPERTS_H

#include <stdatomic.h>
#include <stdbool.h>

#include "backend/backend.h"
#include "io/io.h"
#include "store/desc.h"

typedef struct fm_experts fm_experts;

typedef struct fm_experts_opts {
    int32_t n_slots;
    bool verify; /* check recorded CRC-32C on every read */
} fm_experts_opts;

typedef struct fm_expert_stats {
    int64_t hits, misses;         /* of demanded experts */
    int64_t n_reads, bytes_read;  /* from the device, windows included */
    int64_t wait_ns;              /* the compute thread waited for reads */
    int64_t read_ns, crc_ns;      /* summed over I/O workers */
    int64_t n_failed;
} fm_expert_stats;

/* Bytes of one slot: the largest record of any layer, with the windows of direct I/O (align of fm_io_caps). */
fm_status fm_experts_slot_bytes(const fm_model_desc *d, size_t align, size_t *bytes);

/* d, io, be are borrowed and must outlive it. */
fm_status fm_experts_open(const fm_model_desc *d, fm_io *io, fm_backend *be, const fm_experts_opts *opts,
                          fm_experts **out);
void fm_experts_close(fm_experts *e); /* NULL is fine; waits for reads */

/* Start reads for what is not there, as far as free slots go; touches what is there, so that the wave's own
 * hits are not evicted. n <= n_slots for priority 0. layer is the model's layer number. */
fm_status fm_experts_hint(fm_experts *e, int32_t layer, const int32_t *ids, int n, int priority);

/* For each i with !claimed[i] that is ready: pin, set claimed[i], fill mats[i] = {gate, up, down}. Blocks until at
 * least one new is ready; *n_new tells how many. cancel (may be NULL) ends the wait with FM_ERR_CANCELLED.
 * On error the pins taken so far stay: release what is claimed. */
fm_status fm_experts_claim(fm_experts *e, int32_t layer, const int32_t *ids, int n, bool *claimed,
                           fm_mat (*mats)[FM_ROLE_COUNT], const atomic_bool *cancel, int *n_new);
void fm_experts_release(fm_experts *e, int32_t layer, const int32_t *ids, int n, const bool *claimed);

/* Names the tensor of a claimed expert that holds NaN or infinity; FM_OK if none does. */
fm_status fm_experts_check_finite(const fm_experts *e, int32_t layer, int32_t id);

int32_t fm_experts_slots(const fm_experts *e);
size_t fm_experts_bytes_per_slot(const fm_experts *e);
/* Shrink or grow within what was opened; waits for reads first. Memory above is given back to the system. */
fm_status fm_experts_resize(fm_experts *e, int32_t n_slots);
int64_t fm_experts_pinned(const fm_experts *e);
void fm_experts_get_stats(const fm_experts *e, fm_expert_stats *out);
void fm_experts_reset_stats(fm_experts *e);

#endif
