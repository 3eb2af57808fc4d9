/* Guesses which experts the next layer wants, so that the device reads while this layer computes. The next layer's own
 * router is asked about the residual stream: first before this layer's experts are added to it (early: less often right,
 * much sooner), then after (late). Guesses only use time in which nobody waits for a read, and never change a result;
 * a wrong one costs a part's time at the device, a checksum and a cold slot. Every guess is judged when the real router
 * has chosen, read or not; with AUTO a rank is read while its share of right ones is high enough, and a router is asked
 * while that finds something to read, else now and then, to notice when it would. */
#include "model/wave.h"

enum { MEMORY = 64 /* values an average remembers */ };
/* A rank comes true often enough. The surest are read first, and what is unsure only starts when the device would be
 * idle; measured on 35B geometry, bench/LOG.md. */
#define PAYS 0.6f
/* Asking costs the processor about a tenth of what a read does that is found by it. */
#define FINDS 0.1f
enum { SAMPLE = 17 /* askings between two looks while none pays; prime, so that all layers get their turn */ };

/* The ranks worth reading are the first ones: later ranks come true less often. */
static int64_t ranks_worth(const fm_model *m, fm_guess_time time)
{
    const fm_lookahead *a = &m->lookahead;
    if (a->depth >= 0)
        return a->depth < m->k ? a->depth : m->k;
    int64_t n = 0;
    while (n < m->k && a->right[time][n] >= PAYS)
        n++;
    return n;
}

bool fm_moe_guess_asks(fm_model *m, fm_guess_time time)
{
    fm_lookahead *a = &m->lookahead;
    const bool looks = a->n_askings[time]++ % SAMPLE == 0;
    return looks || a->n_judged[time] < MEMORY || a->depth >= 0 || (a->found[time] >= FINDS && ranks_worth(m, time) > 0);
}

static void learn(float *average, int32_t *n, float value)
{
    *n += *n < MEMORY;
    *average += (value - *average) / (float)*n;
}

void fm_moe_guess_judge(fm_model *m, int32_t layer)
{
    fm_lookahead *a = &m->lookahead;
    const struct fm_wave *w = m->wave;
    int n_found[FM_GUESS_TIMES] = {0};
    for (int32_t i = 0; i < a->n_open && a->open_layer == layer; i++) {
        const int32_t id = a->open[i].id;
        const bool right = w->first[id + 1] > w->first[id];
        const int time = a->open[i].time, rank = a->open[i].rank;
        learn(&a->right[time][rank], &a->n_seen[time][rank], right ? 1.0f : 0.0f);
        n_found[time] += right;
        a->n_predicted++;
        a->n_right += right;
    }
    for (int t = 0; t < FM_GUESS_TIMES; t++)
        if (a->asked[t] && a->open_layer == layer)
            learn(&a->found[t], &a->n_judged[t], (float)n_found[t]);
    a->asked[FM_GUESS_EARLY] = a->asked[FM_GUESS_LATE] = false;
    a->n_open = 0;
}

/* Remember what is not in a slot, of as many rows as there is room for. */
static void remember(fm_model *m, int64_t n, int32_t layer, const int32_t *ids, fm_guess_time time)
{
    fm_lookahead *a = &m->lookahead;
    if (a->open_layer != layer) /* a forward that failed left the others */
        a->n_open = 0;
    a->open_layer = layer;
    a->asked[time] = true;
    for (int64_t r = 0; r < n && (r + 1) * m->k <= FM_MAX_TOP_K; r++)
        for (int64_t j = 0; j < m->k && a->n_open < FM_COUNT(a->open); j++) {
            const int32_t id = ids[r * m->k + j];
            if (fm_experts_present(m->experts, layer, id))
                continue;
            a->open[a->n_open].id = id;
            a->open[a->n_open].time = (int16_t)time;
            a->open[a->n_open++].rank = (int16_t)j;
        }
}

fm_status fm_moe_guess_hint(fm_model *m, int64_t n, int32_t layer, const int32_t *ids, fm_guess_time time)
{
    struct fm_wave *w = m->wave;
    const int64_t take = ranks_worth(m, time);
    int n_ids = 0;
    remember(m, n, layer, ids, time);
    for (int64_t j = 0; j < take; j++) /* the surest of every row first */
        for (int64_t r = 0; r < n && n_ids < w->max; r++)
            w->guess[n_ids++] = ids[r * m->k + j];
    return fm_experts_hint(m->experts, layer, w->guess, n_ids, FM_HINT_GUESS);
}

fm_status fm_moe_guess_route(fm_model *m, int64_t n, int32_t layer, int32_t *ids)
{
    const fm_layer *y = &m->layers[layer];
    const int64_t H = m->c.hidden_size;
    FM_TRY(m->be->v->rmsnorm(m->be, m->s.x, H, y->post_norm, (float)m->c.rms_norm_eps, m->s.h, H, n, H));
    return fm_moe_route(m, y, m->s.h, n, ids, m->s.route_w);
}

fm_status fm_moe_guess_early(fm_model *m, const fm_batch *b, int32_t layer)
{
    const fm_layer *y = &m->layers[layer];
    const fm_scratch *s = &m->s;
    const int64_t H = m->c.hidden_size, room = s->part_rows / m->k, n = b->n_rows < room ? b->n_rows : room;
    FM_TRY(m->be->v->rmsnorm(m->be, s->x, H, y->post_norm, (float)m->c.rms_norm_eps, s->exp_out, H, n, H));
    FM_TRY(fm_moe_route(m, y, s->exp_out, n, s->comb_index, s->comb_weight));
    FM_TRY(m->be->v->sync(m->be));
    return fm_moe_guess_hint(m, n, layer, s->comb_index, FM_GUESS_EARLY);
}

fm_status fm_moe_guess_all(fm_model *m, int32_t layer, int64_t n_taken)
{
    struct fm_wave *w = m->wave;
    const int64_t room = fm_moe_window(m) - n_taken - fm_experts_guesses(m->experts);
    int n = 0;
    for (int32_t e = 0; e < m->c.num_experts && n < room && n < w->max; e++)
        if (!fm_experts_present(m->experts, layer, e))
            w->guess[n++] = e;
    return fm_experts_hint(m->experts, layer, w->guess, n, FM_HINT_GUESS);
}

fm_guess fm_moe_guess_kind(const fm_model *m, const fm_batch *b, int32_t layer)
{
    if (layer >= m->c.num_hidden_layers || m->layers[layer].ffn != FM_FFN_MOE ||
        fm_experts_slots(m->experts) >= fm_experts_total(m->experts))
        return FM_GUESS_NONE;
    if (b->n_rows * m->k >= 2 * m->c.num_experts)
        return FM_GUESS_ALL; /* its rows want nearly every expert */
    return m->lookahead.depth != 0 ? FM_GUESS_ROUTED : FM_GUESS_NONE;
}

fm_status fm_guess_next(fm_model *m, const fm_batch *b, int32_t layer)
{
    const fm_guess kind = fm_moe_guess_kind(m, b, layer + 1);
    if (kind == FM_GUESS_ALL)
        return fm_moe_guess_all(m, layer + 1, 0);
    if (kind == FM_GUESS_NONE || !fm_moe_guess_asks(m, FM_GUESS_LATE))
        return FM_OK;
    FM_TRY(fm_moe_guess_route(m, b->n_rows, layer + 1, m->s.route_ids));
    FM_TRY(m->be->v->sync(m->be));
    if (b->n_rows * m->k <= m->wave->max) /* what it does not choose now, it will hardly choose in the end */
        fm_experts_expire(m->experts, layer + 1, m->s.route_ids, (int)(b->n_rows * m->k));
    return fm_moe_guess_hint(m, b->n_rows, layer + 1, m->s.route_ids, FM_GUESS_LATE);
}
