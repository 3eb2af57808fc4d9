/* Owns: which key lies in which slot, pins, and who is evicted. No I/O, no threads, no bytes.
 * Keys are small integers; a pinned slot is never evicted. Policy: least recently used. */
#ifndef FM_STORE_EXPERT_CACHE_H
#define FM_STORE_EXPERT_CACHE_H

#include <stdint.h>

#include "base/status.h"

typedef struct fm_cache fm_cache;

fm_status fm_cache_open(int32_t n_slots, int64_t n_keys, fm_cache **out);
void fm_cache_close(fm_cache *c); /* NULL is fine */

int32_t fm_cache_find(const fm_cache *c, int64_t key); /* slot, or -1 */
int64_t fm_cache_key(const fm_cache *c, int32_t slot); /* key, or -1 when the slot is free */
void fm_cache_touch(fm_cache *c, int32_t slot);        /* now the most recently used */
/* A slot for a key that is not there: a free one, else the least recently used unpinned one, whose key is
 * forgotten. -1 when all are pinned. The slot comes back unpinned and most recently used. */
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
