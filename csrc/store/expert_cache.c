/* LRU as an intrusive doubly linked list over slots: every operation is O(1) but for skipping pinned slots. */
#include "store/expert_cache.h"

#include <assert.h>

#include "base/mem.h"

typedef struct slot {
    int64_t key; /* -1: free */
    int32_t prev, next, pins;
} slot;

struct fm_cache {
    int32_t *slot_of; /* [n_keys], -1: not there */
    int64_t n_keys, n_pinned;
    int32_t n_slots, n_open;
    slot *slots; /* [n_open + 1]; the last is the list's head: next = most, prev = least recently used */
};

static void unlink_slot(fm_cache *c, int32_t s)
{
    c->slots[c->slots[s].prev].next = c->slots[s].next;
    c->slots[c->slots[s].next].prev = c->slots[s].prev;
}

/* Put s in front of (newer = true) or at the back of the list. */
static void link_slot(fm_cache *c, int32_t s, int newest)
{
    const int32_t head = c->n_open, after = newest ? head : c->slots[head].prev;
    c->slots[s].prev = after;
    c->slots[s].next = c->slots[after].next;
    c->slots[c->slots[s].next].prev = s;
    c->slots[after].next = s;
}

fm_status fm_cache_open(int32_t n_slots, int64_t n_keys, fm_cache **out)
{
    *out = NULL;
    if (n_slots < 1 || n_keys < 1)
        return fm_fail(FM_ERR_ARG, "expert cache: %d slots for %lld experts", n_slots, (long long)n_keys);
    void *mem;
    FM_TRY(fm_alloc(sizeof(fm_cache), &mem));
    fm_cache *c = mem;
    void *slots = NULL, *map = NULL;
    fm_status s = fm_alloc((size_t)(n_slots + 1) * sizeof(slot), &slots);
    if (s == FM_OK)
        s = fm_alloc((size_t)n_keys * sizeof(int32_t), &map);
    if (s != FM_OK) {
        fm_free(slots);
        fm_free(c);
        return s;
    }
    *c = (fm_cache){map, n_keys, 0, n_slots, n_slots, slots};
    for (int64_t k = 0; k < n_keys; k++)
        c->slot_of[k] = -1;
    c->slots[n_slots] = (slot){-1, n_slots, n_slots, 0};
    for (int32_t i = 0; i < n_slots; i++) {
        c->slots[i].key = -1;
        link_slot(c, i, 0); /* slot 0 is the newest free one, so fills go from the last; order is no matter */
    }
    *out = c;
    return FM_OK;
}

void fm_cache_close(fm_cache *c)
{
    if (!c)
        return;
    fm_free(c->slots);
    fm_free(c->slot_of);
    fm_free(c);
}

int32_t fm_cache_find(const fm_cache *c, int64_t key)
{
    assert(key >= 0 && key < c->n_keys);
    return c->slot_of[key];
}

int64_t fm_cache_key(const fm_cache *c, int32_t s) { return c->slots[s].key; }

void fm_cache_touch(fm_cache *c, int32_t s)
{
    unlink_slot(c, s);
    link_slot(c, s, 1);
}

int32_t fm_cache_take(fm_cache *c, int64_t key)
{
    assert(fm_cache_find(c, key) < 0);
    int32_t s = c->slots[c->n_open].prev;
    while (s != c->n_open && c->slots[s].pins > 0)
        s = c->slots[s].prev;
    if (s == c->n_open)
        return -1;
    if (c->slots[s].key >= 0)
        c->slot_of[c->slots[s].key] = -1;
    c->slots[s].key = key;
    c->slot_of[key] = s;
    fm_cache_touch(c, s);
    return s;
}

void fm_cache_drop(fm_cache *c, int32_t s)
{
    assert(c->slots[s].pins == 0);
    if (c->slots[s].key >= 0)
        c->slot_of[c->slots[s].key] = -1;
    c->slots[s].key = -1;
    unlink_slot(c, s);
    if (s < c->n_slots)
        link_slot(c, s, 0); /* free slots are taken first */
}

void fm_cache_pin(fm_cache *c, int32_t s)
{
    if (c->slots[s].pins++ == 0)
        c->n_pinned++;
}

void fm_cache_unpin(fm_cache *c, int32_t s)
{
    assert(c->slots[s].pins > 0);
    if (--c->slots[s].pins == 0)
        c->n_pinned--;
}

int32_t fm_cache_pins(const fm_cache *c, int32_t s) { return c->slots[s].pins; }

int64_t fm_cache_pinned(const fm_cache *c) { return c->n_pinned; }

fm_status fm_cache_resize(fm_cache *c, int32_t n)
{
    if (n < 1 || n > c->n_open)
        return fm_fail(FM_ERR_ARG, "expert cache: %d slots, 1 to %d are possible", n, c->n_open);
    for (int32_t s = n; s < c->n_slots; s++)
        if (c->slots[s].pins > 0)
            return fm_fail(FM_ERR_STATE, "expert cache: slot %d is in use", s);
    const int32_t was = c->n_slots;
    c->n_slots = n;
    for (int32_t s = n; s < was; s++)
        fm_cache_drop(c, s); /* above n_slots now: leaves the list */
    for (int32_t s = was; s < n; s++) {
        c->slots[s].key = -1;
        link_slot(c, s, 0);
    }
    return FM_OK;
}

int32_t fm_cache_slots(const fm_cache *c) { return c->n_slots; }
