/* Mixture of experts over a batch of any size: route, then walk the chosen experts in rising id in waves that fit the
 * slots and the scratch; within a wave whatever is ready computes first. Each row's parts are added in rising expert
 * id, whatever arrived when, so slots, waves and batch never change a result. Source: tests/oracle/moe.py. */
#include <assert.h>
#include <string.h>

#include "base/clock.h"
#include "model/block.h"

enum { MAX_WAVE = 1024, PART_ROWS = 1024 };

/* A slice: some rows of one expert. entry = row * k + rank. */
typedef struct slice {
    int32_t begin, end; /* in entries */
    int32_t out0;       /* first part row */
} slice;

struct fm_wave {
    int32_t *first;   /* [n_experts + 1]: an expert's entries are entries[first[e] .. first[e + 1]) */
    int32_t *entries; /* [rows * k], by expert, rows rising */
    int32_t *order;   /* experts in use, rising */
    int n_order;
    int32_t *hist;    /* [rows + 1] experts by number of rows */
    bool *keep;       /* [n_experts] stay cached after a sweep */
    int32_t *ids;     /* of the wave */
    slice *slices;
    bool *claimed, *ran, *cool;
    fm_mat (*mats)[FM_ROLE_COUNT];
    fm_expert_job *jobs;
    int n, max;
    int64_t rows; /* part rows in use */
};

static int64_t part_rows(int64_t k, int64_t rows) { return rows * k < PART_ROWS ? rows * k : PART_ROWS; }

void fm_scratch_moe(fm_scratch *s, const fm_config *c, int64_t k, int64_t rows, fm_arena *a)
{
    const int64_t H = c->hidden_size, I = c->moe_intermediate_size, Is = c->shared_expert_intermediate_size;
    const int64_t parts = part_rows(k, rows);
    s->part_rows = parts;
    s->router = fm_take_floats(a, rows, c->num_experts);
    s->route_w = fm_take_floats(a, rows, k);
    s->route_ids = fm_take_ints(a, rows * k);
    s->shared_g = fm_take_floats(a, rows, Is);
    s->shared_u = fm_take_floats(a, rows, Is);
    s->shared_y = fm_take_floats(a, Is > 0 ? rows : 0, H);
    s->shared_gate = fm_take_floats(a, rows, 1);
    s->exp_gate = fm_take_floats(a, parts, I);
    s->exp_up = fm_take_floats(a, parts, I);
    s->exp_out = fm_take_floats(a, parts, H);
    s->exp_rows = fm_take_ints(a, parts);
    s->comb_start = fm_take_ints(a, rows + 1);
    s->comb_index = fm_take_ints(a, parts);
    s->comb_weight = fm_take_floats(a, parts, 1);
}

fm_status fm_wave_open(const fm_config *c, int64_t k, int64_t max_rows, struct fm_wave **out)
{
    const size_t E = (size_t)c->num_experts, n = E < MAX_WAVE ? E : MAX_WAVE;
    fm_arena measure = {NULL, 0, 0}, fill;
    void *mem = NULL;
    struct fm_wave *w = NULL;
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1)
            FM_TRY(fm_alloc(measure.used, &mem));
        fill = (fm_arena){mem, 0, measure.used};
        fm_arena *a = pass == 0 ? &measure : &fill;
        struct fm_wave tmp = {0};
        w = fm_arena_take(a, sizeof *w); /* first, so that freeing w frees all */
        tmp.first = fm_take_ints(a, (int64_t)E + 1);
        tmp.entries = fm_take_ints(a, max_rows * k);
        tmp.order = fm_take_ints(a, (int64_t)E);
        tmp.hist = fm_take_ints(a, max_rows + 1);
        tmp.keep = fm_arena_take(a, E * sizeof(bool));
        tmp.ids = fm_take_ints(a, (int64_t)n);
        tmp.slices = fm_arena_take(a, n * sizeof(slice));
        tmp.claimed = fm_arena_take(a, n * sizeof(bool));
        tmp.ran = fm_arena_take(a, n * sizeof(bool));
        tmp.cool = fm_arena_take(a, n * sizeof(bool));
        tmp.mats = fm_arena_take(a, n * sizeof *tmp.mats);
        tmp.jobs = fm_arena_take(a, n * sizeof *tmp.jobs);
        tmp.max = (int)n;
        if (w)
            *w = tmp;
    }
    *out = w;
    return FM_OK;
}

void fm_wave_close(struct fm_wave *w) { fm_free(w); }

/* Counting sort of the n * k choices by expert. */
static void sort_entries(struct fm_wave *w, const int32_t *ids, int64_t n_entries, int64_t n_experts)
{
    memset(w->first, 0, (size_t)(n_experts + 1) * sizeof(int32_t));
    for (int64_t i = 0; i < n_entries; i++)
        w->first[ids[i] + 1]++;
    w->n_order = 0;
    for (int64_t e = 0; e < n_experts; e++) {
        if (w->first[e + 1] > 0)
            w->order[w->n_order++] = (int32_t)e;
        w->first[e + 1] += w->first[e];
    }
    for (int64_t i = 0; i < n_entries; i++)
        w->entries[w->first[ids[i]]++] = (int32_t)i;
    for (int64_t e = n_experts; e > 0; e--) /* first[e] was moved to the end of e: shift back */
        w->first[e] = w->first[e - 1];
    w->first[0] = 0;
}

/* Fill the wave from order[*at], entry *done of it onward. */
static void next_wave(struct fm_wave *w, const fm_scratch *s, int64_t k, int limit, int *at, int32_t *done)
{
    w->n = 0;
    w->rows = 0;
    while (*at < w->n_order && w->n < limit && w->rows < s->part_rows) {
        const int32_t e = w->order[*at], begin = w->first[e] + *done, all = w->first[e + 1] - begin;
        const int64_t room = s->part_rows - w->rows;
        const int32_t n = all < room ? all : (int32_t)room;
        w->ids[w->n] = e;
        w->slices[w->n] = (slice){begin, begin + n, (int32_t)w->rows};
        w->claimed[w->n] = w->ran[w->n] = false;
        w->cool[w->n] = !w->keep[e];
        for (int32_t i = 0; i < n; i++)
            s->exp_rows[w->rows + i] = (int32_t)(w->entries[begin + i] / k);
        w->rows += n;
        w->n++;
        if (n < all) {
            *done += n;
            break;
        }
        *done = 0;
        ++*at;
    }
}

static fm_status run_ready(fm_model *m, struct fm_wave *w, int64_t n_rows)
{
    int n_jobs = 0;
    for (int i = 0; i < w->n; i++) {
        if (!w->claimed[i] || w->ran[i])
            continue;
        w->ran[i] = true;
        const slice *sl = &w->slices[i];
        w->jobs[n_jobs++] = (fm_expert_job){
            .gate = w->mats[i][FM_ROLE_GATE],
            .up = w->mats[i][FM_ROLE_UP],
            .down = w->mats[i][FM_ROLE_DOWN],
            .rows = m->s.exp_rows + sl->out0,
            .n = sl->end - sl->begin,
            .out0 = sl->out0,
        };
    }
    const fm_expert_args a = {m->s.h, n_rows, w->jobs, n_jobs, m->s.exp_gate, m->s.exp_up, m->s.exp_out};
    return m->be->v->experts(m->be, &a);
}

/* Lists for combine: per row, the wave's part rows in rising expert id. */
static void build_combine(const fm_model *m, const struct fm_wave *w, int64_t n_rows)
{
    const fm_scratch *s = &m->s;
    memset(s->comb_start, 0, (size_t)(n_rows + 1) * sizeof(int32_t));
    for (int64_t p = 0; p < w->rows; p++)
        s->comb_start[s->exp_rows[p] + 1]++;
    for (int64_t r = 0; r < n_rows; r++)
        s->comb_start[r + 1] += s->comb_start[r];
    for (int i = 0; i < w->n; i++)
        for (int32_t e = w->slices[i].begin; e < w->slices[i].end; e++) {
            const int32_t row = (int32_t)(w->entries[e] / m->k), at = s->comb_start[row]++;
            s->comb_index[at] = w->slices[i].out0 + (e - w->slices[i].begin);
            s->comb_weight[at] = s->route_w[w->entries[e]];
        }
    for (int64_t r = n_rows; r > 0; r--)
        s->comb_start[r] = s->comb_start[r - 1];
    s->comb_start[0] = 0;
}

static fm_status name_nonfinite(const fm_model *m, const struct fm_wave *w, int32_t layer, int64_t part)
{
    for (int i = 0; i < w->n; i++)
        if (part >= w->slices[i].out0 && part < w->slices[i].out0 + w->slices[i].end - w->slices[i].begin) {
            FM_TRY(fm_experts_check_finite(m->experts, layer, w->ids[i]));
            return fm_fail(FM_ERR_FORMAT, "layer %d expert %d: its output is not finite, though its weights are", layer,
                           w->ids[i]);
        }
    return FM_OK;
}

static fm_status compute_wave(fm_model *m, const fm_batch *b, struct fm_wave *w, int32_t layer)
{
    const int64_t t0 = fm_clock_ns();
    fm_expert_stats before, after;
    fm_experts_get_stats(m->experts, &before);
    for (int left = w->n; left > 0;) {
        int n_new;
        FM_TRY(fm_experts_claim(m->experts, layer, w->ids, w->n, w->claimed, w->mats, b->cancel, &n_new));
        FM_TRY(run_ready(m, w, b->n_rows));
        left -= n_new;
    }
    build_combine(m, w, b->n_rows);
    const fm_combine_args a = {m->s.x, b->n_rows, m->c.hidden_size, m->s.exp_out, m->s.comb_start, m->s.comb_index,
                               m->s.comb_weight};
    FM_TRY(m->be->v->combine(m->be, &a));
    int64_t bad; /* looking syncs: the slots may be overwritten after it */
    FM_TRY(m->be->v->find_nonfinite(m->be, m->s.exp_out, w->rows, m->c.hidden_size, &bad));
    if (bad >= 0)
        FM_TRY(name_nonfinite(m, w, layer, bad));
    fm_experts_get_stats(m->experts, &after);
    const int64_t t1 = fm_clock_ns(), waited = after.wait_ns - before.wait_ns;
    m->phases.wait_ns += waited;
    m->phases.experts_ns += t1 - t0 - waited;
    fm_trace_add(&m->trace, FM_TRACE_experts, layer, w->n, t0, t1, 0);
    return FM_OK;
}

static fm_route_args route_args(const fm_model *m, const fm_layer *y)
{
    const fm_config *c = &m->c;
    const fm_route_args a = {
        .n_experts = c->num_experts,
        .k = m->k,
        .sigmoid = c->router_score == FM_SCORE_SIGMOID,
        .renorm = (int)c->norm_topk_prob,
        .eps = (float)c->norm_topk_eps,
        .scale = (float)c->routed_scaling_factor,
        .n_group = c->n_group,
        .topk_group = c->topk_group,
        .bias = y->router_bias,
    };
    return a;
}

static fm_status route(fm_model *m, const fm_batch *b, const fm_layer *y, int32_t layer)
{
    const fm_config *c = &m->c;
    const fm_backend_vtable *v = m->be->v;
    const fm_scratch *s = &m->s;
    const int64_t t0 = fm_clock_ns(), n = b->n_rows, E = c->num_experts, k = m->k;
    const fm_matmul_item router = {y->router, NULL, s->router, E, false, true};
    FM_TRY(v->matmul(m->be, s->h, c->hidden_size, n, &router, 1));
    const fm_route_args a = route_args(m, y);
    FM_TRY(v->route(m->be, &a, s->router, n, s->route_ids, s->route_w));
    FM_TRY(v->sync(m->be));
    if (b->trace_router)
        for (int64_t r = 0; r < n; r++)
            memcpy(b->trace_router + (r * c->num_hidden_layers + layer) * k, s->route_ids + r * k,
                   (size_t)k * sizeof(int32_t));
    sort_entries(m->wave, s->route_ids, n * k, E);
    FM_PHASE_END(m, router, layer, t0);
    return FM_OK;
}

/* The shared expert's output goes to shared_y and is added last; it runs while the first reads are on their way. */
static fm_status shared_expert(fm_model *m, const fm_batch *b, const fm_layer *y, int32_t layer)
{
    const fm_backend_vtable *v = m->be->v;
    const fm_scratch *s = &m->s;
    const int64_t t0 = fm_clock_ns(), n = b->n_rows, H = m->c.hidden_size, Is = m->c.shared_expert_intermediate_size;
    const fm_matmul_item in[] = {
        {y->shared_gate_proj, NULL, s->shared_g, Is, false, false},
        {y->shared_up_proj, NULL, s->shared_u, Is, false, false},
        {y->shared_gate, NULL, s->shared_gate, 1, false, true},
    };
    FM_TRY(v->matmul(m->be, s->h, H, n, in, y->shared_gate ? 3 : 2));
    FM_TRY(v->swiglu(m->be, s->shared_g, s->shared_u, s->shared_g, n * Is));
    const fm_matmul_item out = {y->shared_down_proj, NULL, s->shared_y, H, false, false};
    FM_TRY(v->matmul(m->be, s->shared_g, Is, n, &out, 1));
    FM_PHASE_END(m, shared, layer, t0);
    return FM_OK;
}

/* How a layer's experts pass through the slots. */
typedef struct sweep {
    int window; /* slots it may fill at a time: half compute while the other half load */
    int limit;  /* experts per wave */
    bool flushes; /* it wants more than the layer's share of the slots */
} sweep;

enum { SWEEP_WINDOW = 64 };

static sweep plan_sweep(const fm_model *m, const struct fm_wave *w)
{
    const int32_t slots = fm_experts_slots(m->experts);
    const int64_t share = slots / fm_experts_layers(m->experts);
    sweep s = {slots, slots < w->max ? slots : w->max, false};
    if (w->n_order <= 2 * m->k || w->n_order <= share || slots >= fm_experts_total(m->experts))
        return s;
    s.flushes = true;
    const int32_t want = slots / 4 > SWEEP_WINDOW ? SWEEP_WINDOW : slots / 4;
    s.window = want > 2 * m->k ? want : (int)(slots < 2 * m->k ? slots : 2 * m->k);
    s.limit = s.window > 1 ? s.window / 2 : 1;
    return s;
}

/* A sweep leaves the layer's most used experts in its share of the slots and lets the others go first. */
static void choose_kept(struct fm_wave *w, const sweep *s, int64_t n_rows, int64_t share)
{
    for (int i = 0; i < w->n_order; i++)
        w->keep[w->order[i]] = true;
    if (!s->flushes)
        return;
    memset(w->hist, 0, (size_t)(n_rows + 1) * sizeof(int32_t));
    for (int i = 0; i < w->n_order; i++)
        w->hist[w->first[w->order[i] + 1] - w->first[w->order[i]]]++;
    int64_t least = n_rows, left = share; /* all with more than `least` rows stay, and `left` of those with as many */
    while (least > 0 && left >= w->hist[least])
        left -= w->hist[least--];
    for (int i = 0; i < w->n_order; i++) {
        const int32_t rows = w->first[w->order[i] + 1] - w->first[w->order[i]];
        w->keep[w->order[i]] = rows > least || (rows == least && left-- > 0);
    }
}

/* What the next waves will want, as far as the window goes. */
static fm_status hint_ahead(fm_model *m, const struct fm_wave *w, const sweep *s, int32_t layer, int at)
{
    const int64_t spare = s->window - w->n, left = w->n_order - at;
    const int64_t n = left < spare ? left : spare;
    return n > 0 ? fm_experts_hint(m->experts, layer, w->order + at, (int)n, FM_HINT_AHEAD) : FM_OK;
}

static fm_status run_wave(fm_model *m, const fm_batch *b, const sweep *s, int32_t layer, int at, bool first)
{
    struct fm_wave *w = m->wave;
    const fm_layer *y = &m->layers[layer];
    FM_TRY(fm_experts_hint(m->experts, layer, w->ids, w->n, FM_HINT_DEMAND));
    FM_TRY(hint_ahead(m, w, s, layer, at));
    if (first && y->shared_gate_proj)
        FM_TRY(shared_expert(m, b, y, layer));
    return compute_wave(m, b, w, layer);
}

fm_status fm_block_moe(fm_model *m, const fm_batch *b, int32_t layer)
{
    const fm_layer *y = &m->layers[layer];
    struct fm_wave *w = m->wave;
    FM_TRY(route(m, b, y, layer));
    fm_experts_expire(m->experts, layer, w->order, w->n_order);
    const sweep s = plan_sweep(m, w);
    choose_kept(w, &s, b->n_rows, fm_experts_slots(m->experts) / fm_experts_layers(m->experts));
    int at = 0;
    int32_t done = 0;
    for (bool first = true; at < w->n_order; first = false) {
        next_wave(w, &m->s, m->k, s.limit, &at, &done);
        const fm_status status = run_wave(m, b, &s, layer, at, first);
        fm_experts_release(m->experts, layer, w->ids, w->n, w->claimed, s.flushes ? w->cool : NULL);
        if (status != FM_OK)
            fm_experts_disown(m->experts);
        FM_TRY(status);
    }
    if (!y->shared_gate_proj)
        return FM_OK;
    return m->be->v->add_gated(m->be, m->s.shared_y, y->shared_gate ? m->s.shared_gate : NULL, m->s.x, b->n_rows,
                               m->c.hidden_size);
}

/* ---- guesses for the next layer ---------------------------------------------------------------------------- */

/* A batch whose rows want nearly every expert: read them in file order while the mixer computes. */
static fm_status guess_all(fm_model *m, int32_t layer)
{
    struct fm_wave *w = m->wave;
    const int32_t slots = fm_experts_slots(m->experts);
    const int64_t room = slots / 4 > SWEEP_WINDOW / 2 ? SWEEP_WINDOW / 2 : slots / 4;
    int n = 0;
    for (int32_t e = 0; e < m->c.num_experts && n < room && n < w->max; e++)
        if (!fm_experts_present(m->experts, layer, e))
            w->ids[n++] = e;
    return fm_experts_hint(m->experts, layer, w->ids, n, FM_HINT_GUESS);
}

static fm_status guess_routed(fm_model *m, const fm_batch *b, int32_t layer)
{
    const fm_config *c = &m->c;
    const fm_layer *y = &m->layers[layer];
    const fm_backend_vtable *v = m->be->v;
    const fm_scratch *s = &m->s;
    struct fm_wave *w = m->wave;
    const int64_t H = c->hidden_size, n = b->n_rows, take = m->lookahead < m->k ? m->lookahead : m->k;
    FM_TRY(v->rmsnorm(m->be, s->x, H, y->post_norm, (float)c->rms_norm_eps, s->h, H, n, H));
    const fm_matmul_item router = {y->router, NULL, s->router, c->num_experts, false, true};
    FM_TRY(v->matmul(m->be, s->h, H, n, &router, 1));
    const fm_route_args a = route_args(m, y);
    FM_TRY(v->route(m->be, &a, s->router, n, s->route_ids, s->route_w));
    FM_TRY(v->sync(m->be));
    int n_ids = 0;
    for (int64_t j = 0; j < take; j++) /* the surest of every row first */
        for (int64_t r = 0; r < n && n_ids < w->max; r++)
            w->ids[n_ids++] = s->route_ids[r * m->k + j];
    return fm_experts_hint(m->experts, layer, w->ids, n_ids, FM_HINT_GUESS);
}

fm_status fm_guess_next(fm_model *m, const fm_batch *b, int32_t layer)
{
    const int32_t next = layer + 1;
    if (next >= m->c.num_hidden_layers || m->layers[next].ffn != FM_FFN_MOE ||
        fm_experts_slots(m->experts) >= fm_experts_total(m->experts))
        return FM_OK;
    if (b->n_rows * m->k >= 2 * m->c.num_experts)
        return guess_all(m, next);
    return m->lookahead > 0 ? guess_routed(m, b, next) : FM_OK;
}
