/* Owns: which key lies in which slot, pins, and who is evicted. No I/O, no threads, no bytes.
 * Keys are small integers; a pinned slot is never evicted. Free slots go first, then cooled ones, then what the
 * policy says. Every operation is O(1) but for skipping pinned slots (and LFU's rare ageing). */
#ifndef FM_STORE_EXPERT_CACHE_H
#define FM_STORE_EXPERT_CACHE_H

#include <stdint.h>

#include "base/status.h"

/* X(ID, "name"): LRU evicts the least recently used; CLOCK gives a used slot a second chance; LFU evicts the least
 * often used (uses outlive eviction and are halved with time), the least recently used among equals. */
#define FM_CACHE_POLICY_LIST(X) X(LRU, "lru") X(CLOCK, "clock") X(LFU, "lfu")

typedef enum fm_cache_policy {
#define X(id, name) FM_CACHE_##id,
    FM_CACHE_POLICY_LIST(X)
#undef X
    FM_CACHE_POLICY_COUNT
} fm_cache_policy;

const char *fm_cache_policy_name(int policy);                     /* NULL past the end */
fm_status fm_cache_policy_find(const char *name, fm_cache_policy *out); /* FM_ERR_ARG lists what exists */

typedef struct fm_cache fm_cache;

fm_status fm_cache_open(fm_cache_policy policy, int32_t n_slots, int64_t n_keys, fm_cache **out);
void fm_cache_close(fm_cache *c); /* NULL is fine */

int32_t fm_cache_find(const fm_cache *c, int64_t key); /* slot, or -1 */
int64_t fm_cache_key(const fm_cache *c, int32_t slot); /* key, or -1 when the slot is free */
void fm_cache_touch(fm_cache *c, int32_t slot);        /* a use, to the policy */
void fm_cache_cool(fm_cache *c, int32_t slot);         /* evict it before any that is not cooled; touch undoes it */
/* A slot for a key that is not there; its former key is forgotten. -1 when all are pinned. Counts as a use. */
int32_t fm_cache_take(fm_cache *c, int64_t key);
void fm_cache_drop(fm_cache *c, int32_t slot); /* forget its key; must be unpinned */
void fm_cache_pin(fm_cache *c, int32_t slot);
void fm_cache_unpin(fm_cache *c, int32_t slot);
int32_t fm_cache_pins(const fm_cache *c, int32_t slot);
int64_t fm_cache_pinned(const fm_cache *c); /* slots with pins; 0 between steps */

/* Use only the first n slots, 1 <= n <= the number opened with. Slots above are dropped; FM_ERR_STATE if one of
 * them is pinned (nothing changes then). */
fm_status fm_cache_resize(fm_cache *c, int32_t n);
int32_t fm_cache_slots(const fm_cache *c);

#endif
