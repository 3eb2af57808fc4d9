/* Mixture of experts over a batch of any size: route, then walk the chosen experts in rising id in waves that fit the
 * slots and the scratch; within a wave whatever is ready computes first. Each row's parts are added in rising expert
 * id, whatever arrived when, so slots, waves and batch never change a result. Source: tests/oracle/moe.py. */
#include <string.h>

#include "base/clock.h"
#include "model/wave.h"

enum { PART_ROWS = 1024 };

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

static fm_status run_ready(fm_model *m, struct fm_wave *w, int64_t n_rows)
{
    const int n_jobs = fm_wave_jobs(m, w);
    const fm_expert_args a = {m->s.h, n_rows, w->jobs, n_jobs, m->s.exp_gate, m->s.exp_up, m->s.exp_out};
    return m->be->v->experts(m->be, &a);
}

fm_status fm_moe_nonfinite(const fm_model *m, const struct fm_wave *w, int32_t layer, int64_t part)
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
    int left = 0;
    for (int i = 0; i < w->n; i++)
        left += !w->claimed[i];
    if (left < w->n) /* those claimed before the others were waited for */
        FM_TRY(run_ready(m, w, b->n_rows));
    while (left > 0) {
        int n_new;
        FM_TRY(fm_experts_claim(m->experts, layer, w->ids, w->n, w->claimed, w->mats, b->cancel, &n_new));
        FM_TRY(run_ready(m, w, b->n_rows));
        left -= n_new;
    }
    const fm_parts parts = {m->s.comb_start, m->s.comb_index, m->s.comb_weight};
    fm_wave_parts(m, w, b->n_rows, &parts);
    const fm_combine_args a = {m->s.x, b->n_rows, m->c.hidden_size, m->s.exp_out, m->s.comb_start, m->s.comb_index,
                               m->s.comb_weight, w->rows};
    FM_TRY(m->be->v->combine(m->be, &a));
    int64_t bad; /* looking syncs: the slots may be overwritten after it. No part that is not finite has a finite sum */
    FM_TRY(m->be->v->find_nonfinite(m->be, m->s.x, b->n_rows, m->c.hidden_size, &bad));
    if (bad >= 0)
        FM_TRY(m->be->v->find_nonfinite(m->be, m->s.exp_out, w->rows, m->c.hidden_size, &bad));
    if (bad >= 0)
        FM_TRY(fm_moe_nonfinite(m, w, layer, bad));
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

fm_status fm_moe_route(fm_model *m, const fm_layer *y, const float *h, int64_t n, int32_t *ids, float *weights)
{
    const fm_backend_vtable *v = m->be->v;
    const fm_matmul_item router = {y->router, NULL, m->s.router, m->c.num_experts, false, true};
    FM_TRY(v->matmul(m->be, h, m->c.hidden_size, n, &router, 1));
    const fm_route_args a = route_args(m, y);
    return v->route(m->be, &a, m->s.router, n, ids, weights);
}

void fm_moe_take_routes(fm_model *m, const fm_batch *b, int32_t layer)
{
    const int32_t *ids = m->s.route_ids;
    const int64_t n = b->n_rows, k = m->k;
    for (int64_t r = 0; r < n && b->trace_router; r++)
        memcpy(b->trace_router + (r * m->c.num_hidden_layers + layer) * k, ids + r * k, (size_t)k * sizeof(int32_t));
    fm_wave_sort(m->wave, ids, n * k, m->c.num_experts);
    fm_moe_guess_judge(m, layer);
    fm_experts_expire(m->experts, layer, m->wave->order, m->wave->n_order);
}

fm_status fm_moe_shared(fm_model *m, const fm_batch *b, const fm_layer *y, int32_t layer)
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

fm_status fm_moe_add_shared(fm_model *m, const fm_batch *b, const fm_layer *y)
{
    if (!y->shared_gate_proj)
        return FM_OK;
    return m->be->v->add_gated(m->be, m->s.shared_y, y->shared_gate ? m->s.shared_gate : NULL, m->s.x, b->n_rows,
                               m->c.hidden_size);
}

/* How a layer's experts pass through the slots. */
typedef struct sweep {
    int window; /* slots it may fill at a time: some compute while the others load */
    int limit;  /* experts per wave */
    bool flushes; /* it wants more than the layer's share of the slots */
} sweep;

enum { MAX_WINDOW = 256, MAX_SWEEP_WAVE = 64 };

int32_t fm_moe_window(const fm_model *m)
{
    const int32_t slots = fm_experts_slots(m->experts), least = (int32_t)(2 * m->k);
    const int32_t want = slots / 4 > MAX_WINDOW ? MAX_WINDOW : slots / 4;
    return want > least ? want : slots < least ? slots : least;
}

/* Slots that a layer's experts may keep. What passes through the window is not among them, so that it finds the slots
 * of the sweep before and evicts nothing. */
static int64_t share_of(const fm_model *m)
{
    return (fm_experts_slots(m->experts) - fm_moe_window(m)) / fm_experts_layers(m->experts);
}

static sweep plan_sweep(const fm_model *m, const struct fm_wave *w)
{
    const int32_t slots = fm_experts_slots(m->experts);
    sweep s = {slots, slots < w->max ? slots : w->max, false};
    if (w->n_order <= 2 * m->k || w->n_order <= share_of(m) || slots >= fm_experts_total(m->experts))
        return s;
    s.flushes = true;
    s.window = fm_moe_window(m);
    s.limit = s.window / 2 > MAX_SWEEP_WAVE ? MAX_SWEEP_WAVE : s.window > 1 ? s.window / 2 : 1;
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

/* What the next waves will want, and after them the next layer, as far as the window goes. */
static fm_status hint_ahead(fm_model *m, const fm_batch *b, const sweep *s, int32_t layer, int at)
{
    const struct fm_wave *w = m->wave;
    const int64_t spare = s->window - w->n, left = w->n_order - at;
    const int64_t n = left < spare ? left : spare;
    if (n > 0)
        FM_TRY(fm_experts_hint(m->experts, layer, w->order + at, (int)n, FM_HINT_AHEAD));
    return n == left && fm_moe_guess_kind(m, b, layer + 1) == FM_GUESS_ALL
               ? fm_moe_guess_all(m, layer + 1, w->n + n)
               : FM_OK;
}

static fm_status run_wave(fm_model *m, const fm_batch *b, const sweep *s, int32_t layer, int at, bool first)
{
    struct fm_wave *w = m->wave;
    const fm_layer *y = &m->layers[layer];
    FM_TRY(fm_experts_hint(m->experts, layer, w->ids, w->n, FM_HINT_DEMAND));
    FM_TRY(hint_ahead(m, b, s, layer, at));
    if (first && fm_moe_guess_kind(m, b, layer + 1) == FM_GUESS_ROUTED && fm_moe_guess_asks(m, FM_GUESS_EARLY)) {
        int n_new; /* what is there is pinned first: no guess may take its slot */
        FM_TRY(fm_experts_poll(m->experts, layer, w->ids, w->n, w->claimed, w->mats, &n_new));
        FM_TRY(fm_moe_guess_early(m, b, layer + 1));
    }
    if (first && y->shared_gate_proj)
        FM_TRY(fm_moe_shared(m, b, y, layer)); /* while the first reads are on their way */
    return compute_wave(m, b, w, layer);
}

static sweep plan(fm_model *m, const fm_batch *b)
{
    const sweep s = plan_sweep(m, m->wave);
    choose_kept(m->wave, &s, b->n_rows, share_of(m));
    return s;
}

bool fm_moe_plan(fm_model *m, const fm_batch *b) { return plan(m, b).flushes; }

fm_status fm_block_moe(fm_model *m, const fm_batch *b, int32_t layer)
{
    const fm_layer *y = &m->layers[layer];
    struct fm_wave *w = m->wave;
    const int64_t t0 = fm_clock_ns();
    FM_TRY(fm_moe_route(m, y, m->s.h, b->n_rows, m->s.route_ids, m->s.route_w));
    FM_TRY(m->be->v->sync(m->be));
    fm_moe_take_routes(m, b, layer);
    FM_PHASE_END(m, router, layer, t0);
    const sweep s = plan(m, b);
    int at = 0;
    int32_t done = 0;
    for (bool first = true; at < w->n_order; first = false) {
        fm_wave_next(w, &m->s, m->k, s.limit, &at, &done);
        const fm_status status = run_wave(m, b, &s, layer, at, first);
        fm_experts_release(m->experts, layer, w->ids, w->n, w->claimed, s.flushes ? w->cool : NULL);
        if (status != FM_OK)
            fm_experts_disown(m->experts);
        FM_TRY(status);
    }
    return fm_moe_add_shared(m, b, y);
}
