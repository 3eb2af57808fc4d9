/* Slots hang in doubly linked lists, one per bucket; a victim is the last unpinned slot of the lowest bucket that has
 * one. Bucket 0: free; 1: cooled; from 2 the policy's: LRU and CLOCK use one, LFU one per count of uses. */
#include "store/expert_cache.h"

#include <assert.h>
#include <stdbool.h>
#include <string.h>

#include "base/mem.h"

enum { FREE, COOL, WARM, LFU_COUNTS = 32, BUCKETS = WARM + LFU_COUNTS, LFU_AGE_FACTOR = 16 };

typedef struct slot {
    int64_t key; /* -1: free */
    int32_t prev, next, pins;
    int16_t bucket;
    bool used; /* CLOCK: since it was last looked at */
} slot;

struct fm_cache {
    fm_cache_policy policy;
    int32_t *slot_of; /* [n_keys], -1: not there */
    uint8_t *uses;    /* [n_keys] LFU */
    int64_t n_keys, n_pinned, n_touches;
    int32_t n_slots, n_open;
    slot *slots; /* [n_open + BUCKETS]: the last are the lists' heads, next = newest, prev = oldest */
};

static const char *const policy_names[] = {
#define X(id, name) name,
    FM_CACHE_POLICY_LIST(X)
#undef X
};

const char *fm_cache_policy_name(int p) { return p >= 0 && p < FM_CACHE_POLICY_COUNT ? policy_names[p] : NULL; }

fm_status fm_cache_policy_find(const char *name, fm_cache_policy *out)
{
    for (int p = 0; p < FM_CACHE_POLICY_COUNT; p++)
        if (strcmp(name, policy_names[p]) == 0) {
            *out = (fm_cache_policy)p;
            return FM_OK;
        }
    return fm_fail(FM_ERR_ARG, "cache policy '%s' is unknown; there are: lru, clock, lfu", name);
}

static void unlink_slot(fm_cache *c, int32_t s)
{
    c->slots[c->slots[s].prev].next = c->slots[s].next;
    c->slots[c->slots[s].next].prev = c->slots[s].prev;
}

static void link_newest(fm_cache *c, int32_t s, int bucket)
{
    const int32_t head = c->n_open + bucket;
    c->slots[s].bucket = (int16_t)bucket;
    c->slots[s].prev = head;
    c->slots[s].next = c->slots[head].next;
    c->slots[c->slots[s].next].prev = s;
    c->slots[head].next = s;
}

static void move_newest(fm_cache *c, int32_t s, int bucket)
{
    unlink_slot(c, s);
    link_newest(c, s, bucket);
}

fm_status fm_cache_open(fm_cache_policy policy, int32_t n_slots, int64_t n_keys, fm_cache **out)
{
    *out = NULL;
    if (n_slots < 1 || n_keys < 1)
        return fm_fail(FM_ERR_ARG, "expert cache: %d slots for %lld experts", n_slots, (long long)n_keys);
    void *mem, *slots = NULL, *map = NULL, *uses = NULL;
    FM_TRY(fm_alloc(sizeof(fm_cache), &mem));
    fm_cache *c = mem;
    fm_status s = fm_alloc(((size_t)n_slots + BUCKETS) * sizeof(slot), &slots);
    s = s == FM_OK ? fm_alloc((size_t)n_keys * sizeof(int32_t), &map) : s;
    s = s == FM_OK ? fm_alloc((size_t)n_keys, &uses) : s;
    if (s != FM_OK) {
        fm_free(slots);
        fm_free(map);
        fm_free(c);
        return s;
    }
    *c = (fm_cache){policy, map, uses, n_keys, 0, 0, n_slots, n_slots, slots};
    for (int64_t k = 0; k < n_keys; k++)
        c->slot_of[k] = -1;
    for (int b = 0; b < BUCKETS; b++)
        c->slots[n_slots + b] = (slot){-1, n_slots + b, n_slots + b, 0, (int16_t)b, false};
    for (int32_t i = n_slots - 1; i >= 0; i--) {
        c->slots[i].key = -1;
        link_newest(c, i, FREE);
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
    fm_free(c->uses);
    fm_free(c);
}

int32_t fm_cache_find(const fm_cache *c, int64_t key)
{
    assert(key >= 0 && key < c->n_keys);
    return c->slot_of[key];
}

int64_t fm_cache_key(const fm_cache *c, int32_t s) { return c->slots[s].key; }

/* LFU: old uses count half, so that yesterday's topic leaves. */
static void age(fm_cache *c)
{
    for (int64_t k = 0; k < c->n_keys; k++)
        c->uses[k] /= 2;
    for (int b = WARM + 1; b < BUCKETS; b++) { /* rising: newer slots of a count stay newer */
        const int32_t head = c->n_open + b;
        for (int32_t s = c->slots[head].prev; s != head; s = c->slots[head].prev)
            move_newest(c, s, WARM + (b - WARM) / 2);
    }
}

static int use_bucket(fm_cache *c, int64_t key)
{
    if (c->policy != FM_CACHE_LFU)
        return WARM;
    if (++c->n_touches % ((int64_t)LFU_AGE_FACTOR * c->n_slots) == 0)
        age(c);
    if (c->uses[key] < LFU_COUNTS - 1)
        c->uses[key]++;
    return WARM + c->uses[key];
}

void fm_cache_touch(fm_cache *c, int32_t s)
{
    const int bucket = use_bucket(c, c->slots[s].key);
    c->slots[s].used = true;
    if (c->policy == FM_CACHE_CLOCK && c->slots[s].bucket == WARM)
        return; /* it moves when the hand passes */
    move_newest(c, s, bucket);
}

void fm_cache_cool(fm_cache *c, int32_t s)
{
    if (c->slots[s].key >= 0)
        move_newest(c, s, COOL);
}

static int32_t oldest_unpinned(fm_cache *c, int bucket)
{
    const int32_t head = c->n_open + bucket;
    /* Two rounds of CLOCK: the first may only clear marks. */
    for (int32_t s = c->slots[head].prev, seen = 0; s != head && seen <= 2 * c->n_slots; seen++) {
        const int32_t newer = c->slots[s].prev;
        if (c->slots[s].pins == 0) {
            if (c->policy != FM_CACHE_CLOCK || bucket != WARM || !c->slots[s].used)
                return s;
            c->slots[s].used = false;
            move_newest(c, s, WARM);
            s = newer == head ? c->slots[head].prev : newer;
            continue;
        }
        s = newer;
    }
    return -1;
}

int32_t fm_cache_take(fm_cache *c, int64_t key)
{
    assert(fm_cache_find(c, key) < 0);
    int32_t s = -1;
    for (int b = 0; b < BUCKETS && s < 0; b++)
        s = oldest_unpinned(c, b);
    if (s < 0)
        return -1;
    if (c->slots[s].key >= 0)
        c->slot_of[c->slots[s].key] = -1;
    c->slots[s].key = key;
    c->slot_of[key] = s;
    move_newest(c, s, use_bucket(c, key));
    c->slots[s].used = false; /* CLOCK: its second chance comes with its second use */
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
        link_newest(c, s, FREE);
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
        fm_cache_drop(c, s); /* above n_slots now: leaves the lists */
    for (int32_t s = n - 1; s >= was; s--) {
        c->slots[s].key = -1;
        link_newest(c, s, FREE);
    }
    return FM_OK;
}

int32_t fm_cache_slots(const fm_cache *c) { return c->n_slots; }
