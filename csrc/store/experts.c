/* The state machine of slots. A slot being read holds one pin of its own, so it cannot be evicted; its reads carry
 * slot and part in their tag. Nothing here words an error for a guess: nobody asked for it yet. */
#include "store/experts.h"

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/clock.h"
#include "base/crc32c.h"
#include "base/mem.h"
#include "store/expert_layout.h"
#include "store/weights.h"

enum { GUESS_SHARE = 4 /* guesses fill at most one slot in so many */, MAX_IN_FLIGHT = 4096, WAIT_STEP_NS = 50 * 1000 * 1000 };

typedef enum slot_state { SLOT_EMPTY, SLOT_LOADING, SLOT_READY } slot_state;

typedef struct expert_slot {
    slot_state state;
    int16_t pending;     /* reads not yet completed */
    bool failed, demand;
    bool fresh;          /* read and not yet claimed: its first claim is a miss */
    bool guess;          /* read on a guess that no claim confirmed yet */
    bool stale;          /* that guess was wrong */
    int32_t guess_at;    /* in guesses, while it may still come true */
    int32_t first_req;   /* its reads under way, linked by sibling; -1: none */
    uint32_t crc[FM_MAX_PARTS];
} expert_slot;

struct fm_experts {
    const fm_model_desc *d;
    fm_io *io;
    fm_backend *be;
    fm_cache *cache;
    expert_slot *slots;
    uint8_t *region;
    size_t slot_bytes, region_bytes, align, split_bytes;
    int32_t *layer_at; /* model layer -> index into d->experts, -1 */
    int32_t n_layers;
    int64_t stride; /* keys per layer */
    fm_io_req *reqs, *free_reqs;
    int32_t *sibling; /* [n_reqs] the next read of the same slot, -1 */
    int n_reqs, in_flight;
    int32_t *guesses; /* [n_slots] slots of guesses that may come true: being read, or ready and not claimed */
    int32_t n_guesses;
    bool verify;
    fm_expert_stats stats;
    fm_trace *trace; /* borrowed, or NULL */
};

static const fm_expert_desc *layer_desc(const fm_experts *e, int32_t layer)
{
    assert(layer >= 0 && layer < e->n_layers && e->layer_at[layer] >= 0);
    return &e->d->experts[e->layer_at[layer]];
}

static int64_t key_of(const fm_experts *e, int32_t layer, int32_t id) { return e->layer_at[layer] * e->stride + id; }

static uint8_t *slot_base(const fm_experts *e, int32_t slot) { return e->region + (size_t)slot * e->slot_bytes; }

static void lay_out(const fm_experts *e, const fm_expert_desc *x, int64_t id, fm_expert_layout *l)
{
    fm_expert_lay_out(x, id, e->align, e->split_bytes, l);
}

#define NO_TAG UINT64_MAX

static void free_request(fm_experts *e, fm_io_req *r)
{
    r->tag = NO_TAG;
    r->next = e->free_reqs;
    e->free_reqs = r;
}

/* ---- opening ------------------------------------------------------------------------------------------ */

static fm_status open_tables(fm_experts *e, const fm_experts_opts *o)
{
    void *p;
    int32_t last = 0;
    for (int64_t i = 0; i < e->d->n_expert_layers; i++) {
        last = e->d->experts[i].layer;
        e->stride = e->d->experts[i].n_experts > e->stride ? e->d->experts[i].n_experts : e->stride;
    }
    e->n_layers = last + 1;
    FM_TRY(fm_alloc((size_t)e->n_layers * sizeof(int32_t), &p));
    e->layer_at = p;
    memset(e->layer_at, 0xff, (size_t)e->n_layers * sizeof(int32_t));
    for (int64_t i = 0; i < e->d->n_expert_layers; i++)
        e->layer_at[e->d->experts[i].layer] = (int32_t)i;
    FM_TRY(fm_cache_open(o->policy, o->n_slots, e->d->n_expert_layers * e->stride, &e->cache));
    FM_TRY(fm_alloc((size_t)o->n_slots * sizeof(expert_slot), &p));
    e->slots = p;
    const int64_t most = (int64_t)o->n_slots * FM_MAX_PARTS;
    e->n_reqs = (int)(most < MAX_IN_FLIGHT ? most : MAX_IN_FLIGHT);
    FM_TRY(fm_alloc((size_t)e->n_reqs * sizeof(fm_io_req), &p));
    e->reqs = p;
    FM_TRY(fm_alloc((size_t)e->n_reqs * sizeof(int32_t), &p));
    e->sibling = p;
    FM_TRY(fm_alloc((size_t)o->n_slots * sizeof(int32_t), &p));
    e->guesses = p;
    for (int i = 0; i < e->n_reqs; i++)
        free_request(e, &e->reqs[i]);
    e->slot_bytes = fm_expert_layout_max(e->d, e->align);
    if (!fm_mul_size(e->slot_bytes, (size_t)o->n_slots, &e->region_bytes))
        return fm_fail(FM_ERR_NOMEM, "%d expert slots of %zu bytes overflow", o->n_slots, e->slot_bytes);
    FM_TRY(e->be->v->alloc(e->be, e->region_bytes, FM_USAGE_SLOTS, &p));
    e->region = p;
    fm_io_set_buffers(e->io, e->region, e->slot_bytes, o->n_slots);
    return FM_OK;
}

fm_status fm_experts_open(const fm_model_desc *d, fm_io *io, fm_backend *be, const fm_experts_opts *opts,
                          fm_experts **out)
{
    *out = NULL;
    if (d->n_expert_layers < 1)
        return fm_fail(FM_ERR_ARG, "the model has no experts");
    void *p;
    FM_TRY(fm_alloc(sizeof(fm_experts), &p));
    fm_experts *e = p;
    e->d = d;
    e->io = io;
    e->be = be;
    e->verify = opts->verify;
    e->split_bytes = opts->split_bytes ? opts->split_bytes : FM_EXPERTS_SPLIT_BYTES;
    e->align = fm_io_get_caps(io).align;
    const fm_status s = open_tables(e, opts);
    if (s != FM_OK) {
        fm_experts_close(e);
        return s;
    }
    *out = e;
    return FM_OK;
}

/* ---- completions ---------------------------------------------------------------------------------------- */

static fm_status word_failure(fm_experts *e, const fm_io_req *r, int64_t key)
{
    const fm_expert_desc *x = &e->d->experts[key / e->stride];
    char what[96];
    snprintf(what, sizeof what, "layer %d expert %" PRId64, x->layer, key % e->stride);
    return fm_io_fail(e->io, r, what);
}

/* Whether a whole record carries its recorded checksum; *have is the one it carries. */
static bool crc_matches(const fm_experts *e, int32_t slot, int64_t key, uint32_t *have)
{
    const fm_expert_desc *x = &e->d->experts[key / e->stride];
    fm_expert_layout l;
    if (!e->verify || !x->crc)
        return true;
    lay_out(e, x, key % e->stride, &l);
    uint32_t crc = e->slots[slot].crc[0];
    for (int i = 1; i < l.n_parts; i++)
        crc = fm_crc32c_combine(crc, e->slots[slot].crc[i], l.part[i].crc_bytes);
    *have = crc;
    return crc == x->crc[key % e->stride];
}

static fm_status word_damage(const fm_experts *e, int64_t key, uint32_t have)
{
    const fm_expert_desc *x = &e->d->experts[key / e->stride];
    const int64_t id = key % e->stride;
    const char *path = fm_io_file_path(e->io, x->seg_file[id * x->n_sources]);
    return fm_fail_path(FM_ERR_FORMAT, 0, path,
                        "%s: layer %d expert %" PRId64 ": checksum %08x, recorded %08x: the file is damaged", path,
                        x->layer, id, have, x->crc[id]);
}

static void trace_read(const fm_experts *e, const fm_io_req *r, int64_t key, bool guess)
{
    const int64_t t0 = r->submitted_ns + r->ns_queued;
    if (e->trace)
        fm_trace_add(e->trace, guess ? FM_TRACE_guess : FM_TRACE_read, e->d->experts[key / e->stride].layer,
                     (int32_t)(key % e->stride), t0, t0 + r->ns_read, (int64_t)r->done_bytes);
}

static void unlink_request(fm_experts *e, expert_slot *s, const fm_io_req *r)
{
    const int32_t i = (int32_t)(r - e->reqs);
    int32_t *at = &s->first_req;
    while (*at != i)
        at = &e->sibling[*at];
    *at = e->sibling[i];
}

/* Whether the guess in this slot came true is known now, or does not matter any more. */
static void settle_guess(fm_experts *e, expert_slot *s)
{
    if (s->guess && !s->stale) {
        const int32_t last = e->guesses[--e->n_guesses];
        e->guesses[s->guess_at] = last;
        e->slots[last].guess_at = s->guess_at;
    }
    s->guess = s->stale = false;
}

/* Takes one read in. A failed one that someone waits for (demand) is that someone's error, unless the caller has one
 * already: word is then false and the message stays. A guess's failure is nobody's. */
static fm_status complete(fm_experts *e, fm_io_req *r, bool word)
{
    const int32_t slot = (int32_t)(r->tag & 0xffffffffu), part = (int32_t)(r->tag >> 32);
    expert_slot *s = &e->slots[slot];
    const int64_t key = fm_cache_key(e->cache, slot);
    fm_status status = FM_OK;
    uint32_t have;
    e->in_flight--;
    e->stats.n_reads++;
    e->stats.bytes_read += (int64_t)r->done_bytes;
    e->stats.read_ns += r->ns_read;
    e->stats.crc_ns += r->ns_crc;
    e->stats.guess_wasted_bytes += s->stale ? (int64_t)r->done_bytes : 0;
    s->crc[part] = r->crc;
    trace_read(e, r, key, s->guess);
    if (r->status != FM_OK) {
        e->stats.n_failed += r->status != FM_ERR_CANCELLED;
        if (s->demand && !s->failed && word && r->status != FM_ERR_CANCELLED)
            status = word_failure(e, r, key);
        s->failed = true;
    }
    unlink_request(e, s, r);
    free_request(e, r);
    if (--s->pending > 0)
        return status;
    e->stats.guessed += s->guess && !s->failed;
    if (!s->failed && !crc_matches(e, slot, key, &have)) {
        s->failed = true;
        e->stats.n_failed++;
        if (s->demand && word)
            status = word_damage(e, key, have);
    }
    fm_cache_unpin(e->cache, slot);
    s->state = s->failed ? SLOT_EMPTY : SLOT_READY;
    if (s->failed) {
        settle_guess(e, s);
        fm_cache_drop(e->cache, slot);
    }
    return status;
}

static fm_status wait_reads(fm_experts *e, int min_done, int64_t timeout_ns)
{
    fm_io_req *done[64];
    int n = 0;
    FM_TRY(fm_io_wait(e->io, done, FM_COUNT(done), min_done, timeout_ns, &n));
    fm_status first = FM_OK;
    for (int i = 0; i < n; i++) { /* every completion is taken in, whatever the others said */
        const fm_status s = complete(e, done[i], first == FM_OK);
        first = first == FM_OK ? s : first;
    }
    return first;
}

static void drain(fm_experts *e)
{
    while (e->in_flight > 0)
        (void)wait_reads(e, 1, -1);
}

void fm_experts_close(fm_experts *e)
{
    if (!e)
        return;
    drain(e);
    if (e->region) {
        fm_io_drop_buffers(e->io, 0);
        e->be->v->free(e->be, e->region, e->region_bytes, FM_USAGE_SLOTS);
    }
    fm_cache_close(e->cache);
    fm_free(e->slots);
    fm_free(e->layer_at);
    fm_free(e->sibling);
    fm_free(e->guesses);
    fm_free(e->reqs);
    fm_free(e);
}

/* ---- hint, claim, release ---------------------------------------------------------------------------------- */

static int free_requests(const fm_experts *e) { return e->n_reqs - e->in_flight; }

/* *started is false when no slot or request is free now. */
static fm_status start_read(fm_experts *e, int32_t layer, int32_t id, fm_hint kind, bool *started)
{
    const fm_expert_desc *x = layer_desc(e, layer);
    fm_expert_layout l;
    fm_io_req *reqs[FM_MAX_PARTS];
    lay_out(e, x, id, &l);
    *started = false;
    if (free_requests(e) < l.n_parts)
        return FM_OK;
    const int32_t slot = fm_cache_take(e->cache, key_of(e, layer, id));
    if (slot < 0)
        return FM_OK;
    expert_slot *s = &e->slots[slot];
    if (s->guess && !s->stale) /* evicted before anybody knew */
        e->stats.guess_wasted_bytes += (int64_t)e->slot_bytes;
    settle_guess(e, s);
    *s = (expert_slot){.state = SLOT_LOADING,
                       .pending = (int16_t)l.n_parts,
                       .demand = kind != FM_HINT_GUESS,
                       .fresh = true,
                       .guess = kind == FM_HINT_GUESS,
                       .guess_at = e->n_guesses,
                       .first_req = -1};
    for (int i = 0; i < l.n_parts; i++) {
        fm_io_req *r = reqs[i] = e->free_reqs;
        e->free_reqs = r->next;
        e->sibling[r - e->reqs] = s->first_req;
        s->first_req = (int32_t)(r - e->reqs);
        *r = (fm_io_req){
            .file = l.part[i].file,
            .priority = kind == FM_HINT_GUESS,
            .off = l.part[i].off,
            .bytes = l.part[i].bytes,
            .bytes_wanted = l.part[i].wanted,
            .dst = slot_base(e, slot) + l.part[i].place,
            .tag = (uint64_t)slot | (uint64_t)i << 32,
        };
        if (e->verify && x->crc) {
            r->crc_skip = l.part[i].crc_skip;
            r->crc_bytes = l.part[i].crc_bytes;
        }
    }
    fm_cache_pin(e->cache, slot);
    const fm_status status = fm_io_submit(e->io, reqs, l.n_parts);
    if (status != FM_OK) {
        for (int i = 0; i < l.n_parts; i++)
            free_request(e, reqs[i]);
        *s = (expert_slot){.state = SLOT_EMPTY};
        fm_cache_unpin(e->cache, slot);
        fm_cache_drop(e->cache, slot);
        return status;
    }
    e->in_flight += l.n_parts;
    if (kind == FM_HINT_GUESS)
        e->guesses[e->n_guesses++] = slot;
    *started = true;
    return FM_OK;
}

/* Somebody waits for this slot from now on: its reads overtake all guesses. */
static void demand_slot(fm_experts *e, expert_slot *s)
{
    if (s->state == SLOT_LOADING && !s->demand)
        for (int32_t i = s->first_req; i >= 0; i = e->sibling[i])
            (void)fm_io_promote(e->io, &e->reqs[i]);
    s->demand = true;
}

fm_status fm_experts_hint(fm_experts *e, int32_t layer, const int32_t *ids, int n, fm_hint kind)
{
    for (int i = 0; i < n && kind != FM_HINT_GUESS; i++) {
        const int32_t slot = fm_cache_find(e->cache, key_of(e, layer, ids[i]));
        if (slot < 0)
            continue;
        fm_cache_touch(e->cache, slot); /* so that the wave's own hits are not evicted */
        demand_slot(e, &e->slots[slot]);
    }
    for (int i = 0; i < n; i++) {
        if (fm_cache_find(e->cache, key_of(e, layer, ids[i])) >= 0)
            continue;
        if (kind == FM_HINT_GUESS && e->n_guesses >= fm_cache_slots(e->cache) / GUESS_SHARE)
            break;
        bool started; /* a demanded read that cannot start yet is started by claim */
        FM_TRY(start_read(e, layer, ids[i], kind, &started));
        if (!started)
            break;
    }
    return FM_OK;
}

static bool among(int32_t id, const int32_t *ids, int n)
{
    for (int i = 0; i < n; i++)
        if (ids[i] == id)
            return true;
    return false;
}

void fm_experts_expire(fm_experts *e, int32_t layer, const int32_t *ids, int n)
{
    for (int32_t i = e->n_guesses; i-- > 0;) {
        const int32_t slot = e->guesses[i];
        expert_slot *s = &e->slots[slot];
        const int64_t key = fm_cache_key(e->cache, slot);
        if (s->demand || key / e->stride != e->layer_at[layer] || among((int32_t)(key % e->stride), ids, n))
            continue;
        settle_guess(e, s);
        fm_cache_cool(e->cache, slot);
        if (s->state == SLOT_READY) {
            e->stats.guess_wasted_bytes += (int64_t)e->slot_bytes;
            continue;
        }
        s->guess = s->stale = true; /* for the counters, when its reads end */
        for (int32_t r = s->first_req; r >= 0; r = e->sibling[r])
            (void)fm_io_cancel(e->io, &e->reqs[r]); /* a completion follows either way */
    }
}

int32_t fm_experts_guesses(const fm_experts *e) { return e->n_guesses; }

typedef const uint8_t *role_areas[FM_ROLE_COUNT][FM_AREA_COUNT];

/* Where an expert's areas lie if its slot begins at base. */
static void find_areas(const fm_experts *e, const fm_expert_desc *x, int64_t id, const uint8_t *base, role_areas area)
{
    fm_expert_layout l;
    lay_out(e, x, id, &l);
    fm_segment seg[FM_MAX_SEGMENTS];
    fm_expert_segments(x, seg);
    memset(area, 0, sizeof(role_areas));
    for (int s = 0; s < l.n_segments; s++)
        area[seg[s].role][seg[s].area] = base + l.segment[s];
}

static void make_mats(const fm_expert_desc *x, const role_areas area, fm_mat mats[FM_ROLE_COUNT])
{
    for (int r = 0; r < FM_ROLE_COUNT; r++) {
        const fm_format *f = &x->role[r];
        mats[r] = fm_mat_make((fm_quant)f->quant, f->group, (fm_quant)f->scale_quant, f->n_rows, f->n_cols, area[r][0],
                              area[r][1], area[r][2]);
    }
}

static void fill_mats(const fm_experts *e, int32_t layer, int32_t id, int32_t slot, fm_mat mats[FM_ROLE_COUNT])
{
    const fm_expert_desc *x = layer_desc(e, layer);
    role_areas area;
    find_areas(e, x, id, slot_base(e, slot), area);
    make_mats(x, area, mats);
}

void fm_experts_like(const fm_experts *e, int32_t layer, fm_mat mats[FM_ROLE_COUNT])
{
    enum { PAGE = 4096 }; /* slots begin on pages, so that places in them tell the alignment */
    const fm_expert_desc *x = layer_desc(e, layer);
    uintptr_t low[FM_ROLE_COUNT][FM_AREA_COUNT] = {{0}};
    role_areas area;
    for (int64_t id = 0; id < x->n_experts; id++) {
        find_areas(e, x, id, e->region, area);
        for (int r = 0; r < FM_ROLE_COUNT; r++)
            for (int a = 0; a < FM_AREA_COUNT; a++)
                low[r][a] |= (uintptr_t)area[r][a] % PAGE;
    }
    for (int r = 0; r < FM_ROLE_COUNT; r++)
        for (int a = 0; a < FM_AREA_COUNT; a++)
            if (area[r][a])
                area[r][a] = e->region + low[r][a];
    make_mats(x, area, mats);
}

static void take_ready(fm_experts *e, int32_t slot)
{
    expert_slot *s = &e->slots[slot];
    fm_cache_pin(e->cache, slot);
    if (s->fresh)
        e->stats.misses++;
    else
        e->stats.hits++;
    e->stats.guess_used += s->guess && !s->stale;
    s->fresh = false;
    settle_guess(e, s);
}

/* One round over what is not claimed yet; *missing is how many were not. */
static fm_status claim_ready(fm_experts *e, int32_t layer, const int32_t *ids, int n, bool *claimed,
                             fm_mat (*mats)[FM_ROLE_COUNT], int *n_new, int *missing)
{
    *n_new = *missing = 0;
    for (int i = 0; i < n; i++) {
        if (claimed[i])
            continue;
        ++*missing;
        const int32_t slot = fm_cache_find(e->cache, key_of(e, layer, ids[i]));
        if (slot < 0) {
            bool started;
            FM_TRY(start_read(e, layer, ids[i], FM_HINT_DEMAND, &started));
        } else if (e->slots[slot].state == SLOT_READY) {
            take_ready(e, slot);
            fill_mats(e, layer, ids[i], slot, mats[i]);
            claimed[i] = true;
            ++*n_new;
        } else
            demand_slot(e, &e->slots[slot]);
    }
    return FM_OK;
}

fm_status fm_experts_poll(fm_experts *e, int32_t layer, const int32_t *ids, int n, bool *claimed,
                          fm_mat (*mats)[FM_ROLE_COUNT], int *n_new)
{
    int missing;
    if (e->in_flight > 0)
        FM_TRY(wait_reads(e, 0, 0));
    return claim_ready(e, layer, ids, n, claimed, mats, n_new, &missing);
}

fm_status fm_experts_claim(fm_experts *e, int32_t layer, const int32_t *ids, int n, bool *claimed,
                           fm_mat (*mats)[FM_ROLE_COUNT], const atomic_bool *cancel, int *n_new)
{
    for (;;) {
        int missing;
        FM_TRY(claim_ready(e, layer, ids, n, claimed, mats, n_new, &missing));
        if (*n_new > 0 || missing == 0)
            return FM_OK;
        if (cancel && atomic_load_explicit(cancel, memory_order_relaxed))
            return fm_fail(FM_ERR_CANCELLED, "cancelled while waiting for experts of layer %d", layer);
        if (e->in_flight == 0)
            return fm_fail(FM_ERR_STATE, "layer %d: all %d expert slots are pinned, none is free for expert %d", layer,
                           fm_cache_slots(e->cache), ids[0]);
        const int64_t t0 = fm_clock_ns();
        const fm_status s = wait_reads(e, 1, WAIT_STEP_NS);
        e->stats.wait_ns += fm_clock_ns() - t0;
        FM_TRY(s);
    }
}

void fm_experts_disown(fm_experts *e)
{
    for (int i = 0; i < e->n_reqs && e->in_flight > 0; i++)
        if (e->reqs[i].tag != NO_TAG)
            e->slots[e->reqs[i].tag & 0xffffffffu].demand = false;
}

void fm_experts_release(fm_experts *e, int32_t layer, const int32_t *ids, int n, const bool *claimed, const bool *cool)
{
    for (int i = 0; i < n; i++) {
        if (!claimed[i])
            continue;
        const int32_t slot = fm_cache_find(e->cache, key_of(e, layer, ids[i]));
        fm_cache_unpin(e->cache, slot);
        if (cool && cool[i])
            fm_cache_cool(e->cache, slot);
    }
}

fm_status fm_experts_reread(fm_experts *e, const int32_t *layers, const int32_t *ids, int64_t n)
{
    fm_status first = FM_OK;
    for (int64_t i = 0; i < n && first == FM_OK;) {
        const int32_t layer = layers[i], slot = fm_cache_find(e->cache, key_of(e, layer, ids[i]));
        bool started = slot >= 0 && e->slots[slot].state == SLOT_LOADING; /* it is asked twice */
        if (slot >= 0 && !started && fm_cache_pins(e->cache, slot) == 0) {
            settle_guess(e, &e->slots[slot]);
            fm_cache_drop(e->cache, slot);
        }
        first = started ? FM_OK : start_read(e, layer, ids[i], FM_HINT_DEMAND, &started);
        i += started;
        if (first == FM_OK && !started)
            first = e->in_flight > 0 ? wait_reads(e, 1, -1) : fm_fail(FM_ERR_STATE, "all expert slots are pinned");
    }
    while (e->in_flight > 0) { /* all are taken in, whatever the first failure was */
        const fm_status s = wait_reads(e, 1, -1);
        first = first == FM_OK ? s : first;
    }
    return first;
}

fm_status fm_experts_check_finite(const fm_experts *e, int32_t layer, int32_t id)
{
    const int32_t slot = fm_cache_find(e->cache, key_of(e, layer, id));
    if (slot < 0)
        return FM_OK;
    const fm_expert_desc *x = layer_desc(e, layer);
    fm_mat mats[FM_ROLE_COUNT];
    fill_mats(e, layer, id, slot, mats);
    fm_segment seg[FM_MAX_SEGMENTS];
    const int n = fm_expert_segments(x, seg);
    for (int s = 0; s < n; s++) {
        if (seg[s].area != FM_AREA_CODES)
            continue;
        const fm_mat *m = &mats[seg[s].role];
        const uint8_t *area[FM_AREA_COUNT] = {m->codes, m->scales, m->biases};
        char what[256];
        snprintf(what, sizeof what, "layer %d expert %d (%s)", layer, id, x->source[s]);
        FM_TRY(fm_format_check_finite(&x->role[seg[s].role], area, fm_io_file_path(e->io, x->seg_file[id * n + s]), what));
    }
    return FM_OK;
}

/* ---- size and counters ----------------------------------------------------------------------------------- */

int32_t fm_experts_slots(const fm_experts *e) { return fm_cache_slots(e->cache); }

int64_t fm_experts_layers(const fm_experts *e) { return e->d->n_expert_layers; }

int64_t fm_experts_total(const fm_experts *e)
{
    int64_t n = 0;
    for (int64_t i = 0; i < e->d->n_expert_layers; i++)
        n += e->d->experts[i].n_experts;
    return n;
}

bool fm_experts_present(const fm_experts *e, int32_t layer, int32_t id)
{
    return fm_cache_find(e->cache, key_of(e, layer, id)) >= 0;
}

fm_status fm_experts_resize(fm_experts *e, int32_t n_slots)
{
    drain(e);
    while (e->n_guesses > 0) /* their slots may go */
        settle_guess(e, &e->slots[e->guesses[e->n_guesses - 1]]);
    const int32_t was = fm_cache_slots(e->cache);
    FM_TRY(fm_cache_resize(e->cache, n_slots));
    if (n_slots < was) {
        fm_io_drop_buffers(e->io, n_slots);
        fm_region_drop(slot_base(e, n_slots), (size_t)(was - n_slots) * e->slot_bytes);
    }
    return FM_OK;
}

int64_t fm_experts_pinned(const fm_experts *e) { return fm_cache_pinned(e->cache); }

void fm_experts_get_stats(const fm_experts *e, fm_expert_stats *out) { *out = e->stats; }

void fm_experts_reset_stats(fm_experts *e) { e->stats = (fm_expert_stats){0}; }

void fm_experts_set_trace(fm_experts *e, fm_trace *trace) { e->trace = trace; }
