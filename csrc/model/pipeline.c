/* One recording per forward. Memory that both sides use while the device runs:
 *   s.route_ids, s.route_w   device's until tell, host's until the first hold is posted
 *   parts, table[i]          host's from a layer's tell until it posts the layer's last hold, or its i-th
 *   marks                    host's from the next tell on, until it posts the first hold after that
 *   guess_ids                host's from the guess's tell until it posts the next layer's first hold
 * A layer's experts stay pinned until a later tell shows that the device is past them. */
#include "model/pipeline.h"

#include <string.h>

#include "base/clock.h"
#include "base/env.h"
#include "model/wave.h"

enum {
    MAX_STAGES = 2, /* experts that are there at once, and the rest; one stage when all of the model are cached */
    MAX_ROWS = FM_LOGIT_ROWS,
};

/* Where host and device meet in a layer. */
typedef struct meeting {
    uint64_t guessed, routed; /* tells; 0: none */
    uint64_t hold[MAX_STAGES];
} meeting;

struct fm_pipeline {
    int64_t max_rows;
    void *device;
    size_t device_bytes;
    fm_parts parts;
    int32_t *guess_ids;          /* [max_rows, k] */
    uint32_t *marks, *row_marks; /* [max_rows * k] of the parts, [max_rows] of the logits */
    void *table[MAX_STAGES];
    meeting *at;                    /* [layers] */
    fm_mat (*like)[FM_ROLE_COUNT];  /* [layers] */
    fm_expert_later later[MAX_STAGES];  /* as last recorded: all layers share the tables */
    /* the forward under way */
    int n_stages;
    uint64_t last_hold;
    int32_t held;  /* layer whose experts are pinned, or -1 */
    int posted;    /* its stages that the device may have begun */
    bool cools;    /* release them cooled */
    bool lost;     /* the device failed: its message stands */
    int64_t n_out; /* rows of logits, and where they go */
    float *const *out;
};

/* ---- memory ------------------------------------------------------------------------------------------- */

static int64_t rows_of(int64_t max_rows) { return max_rows < MAX_ROWS ? max_rows : MAX_ROWS; }

static void take_device(struct fm_pipeline *p, int64_t k, int64_t rows, fm_arena *a)
{
    const int64_t n = rows * k;
    p->parts.start = fm_take_ints(a, rows + 1);
    p->parts.index = fm_take_ints(a, n);
    p->parts.weight = fm_take_floats(a, n, 1);
    p->guess_ids = fm_take_ints(a, n);
    p->marks = fm_arena_take(a, (size_t)n * sizeof(uint32_t));
    p->row_marks = fm_arena_take(a, (size_t)rows * sizeof(uint32_t));
    for (int s = 0; s < MAX_STAGES; s++)
        p->table[s] = fm_arena_take(a, (size_t)n * FM_LATER_PART_BYTES);
}

size_t fm_pipeline_bytes(const fm_config *c, int64_t k, int64_t max_rows)
{
    struct fm_pipeline p;
    fm_arena measure = {NULL, 0, 0};
    if (c->num_experts > 0)
        take_device(&p, k, rows_of(max_rows), &measure);
    return measure.used;
}

static fm_status open_parts(fm_model *m, struct fm_pipeline *p)
{
    p->device_bytes = fm_pipeline_bytes(&m->c, m->k, m->max_rows);
    FM_TRY(m->be->v->alloc(m->be, p->device_bytes, FM_USAGE_SCRATCH, &p->device));
    fm_arena a = {p->device, 0, p->device_bytes};
    take_device(p, m->k, p->max_rows, &a);
    const size_t L = (size_t)m->c.num_hidden_layers;
    void *mem;
    FM_TRY(fm_alloc(L * sizeof *p->at, &mem));
    p->at = mem;
    FM_TRY(fm_alloc(L * sizeof *p->like, &mem));
    p->like = mem;
    for (int32_t l = 0; l < m->c.num_hidden_layers; l++)
        if (m->layers[l].ffn == FM_FFN_MOE)
            fm_experts_like(m->experts, l, p->like[l]);
    return FM_OK;
}

fm_status fm_pipeline_open(fm_model *m)
{
    const char *wish = fm_env_get(FM_ENV_PIPELINE);
    if (wish && ((wish[0] != '0' && wish[0] != '1') || wish[1]))
        return fm_fail(FM_ERR_ARG, "FLASHMOE_PIPELINE is '%s', must be 0 or 1", wish);
    if (!m->experts || !m->be->v->caps(m->be).pipelined || (wish && wish[0] == '0'))
        return FM_OK;
    void *mem;
    FM_TRY(fm_alloc(sizeof(struct fm_pipeline), &mem));
    m->pipe = mem;
    m->pipe->max_rows = rows_of(m->max_rows);
    return open_parts(m, m->pipe); /* closed with the model */
}

void fm_pipeline_close(fm_model *m)
{
    struct fm_pipeline *p = m->pipe;
    if (!p)
        return;
    if (p->device)
        m->be->v->free(m->be, p->device, p->device_bytes, FM_USAGE_SCRATCH);
    fm_free(p->at);
    fm_free(p->like);
    fm_free(p);
    m->pipe = NULL;
}

/* Experts that n entries can choose. */
static int64_t most_experts(const fm_model *m, int64_t n) { return n < m->c.num_experts ? n : m->c.num_experts; }

bool fm_pipeline_fits(const fm_model *m, const fm_batch *b)
{
    const int64_t n = b->n_rows * m->k, experts = most_experts(m, n);
    return m->pipe && b->n_rows <= m->pipe->max_rows && !b->trace_hidden && n <= m->s.part_rows &&
           experts <= fm_experts_slots(m->experts) && experts <= m->wave->max;
}

/* ---- recording ---------------------------------------------------------------------------------------- */

static fm_status record_experts(fm_model *m, const fm_batch *b, int32_t layer)
{
    struct fm_pipeline *p = m->pipe;
    const fm_backend_vtable *v = m->be->v;
    const fm_scratch *s = &m->s;
    const int64_t n = b->n_rows * m->k;
    for (int i = 0; i < p->n_stages; i++) {
        p->later[i] = (fm_expert_later){
            .x = s->h,
            .n_x = b->n_rows,
            .gate = p->like[layer][FM_ROLE_GATE],
            .up = p->like[layer][FM_ROLE_UP],
            .down = p->like[layer][FM_ROLE_DOWN],
            .gate_y = s->exp_gate,
            .up_y = s->exp_up,
            .out = s->exp_out,
            .n_jobs = most_experts(m, n),
            .n_parts = n,
            .table = p->table[i],
        };
        FM_TRY(v->hold(m->be, &p->last_hold));
        p->at[layer].hold[i] = p->last_hold;
        FM_TRY(v->experts_later(m->be, &p->later[i]));
    }
    const fm_combine_args a = {s->x, b->n_rows, m->c.hidden_size, s->exp_out, p->parts.start, p->parts.index,
                               p->parts.weight, n};
    FM_TRY(v->combine(m->be, &a));
    return v->mark_nonfinite(m->be, s->exp_out, n, m->c.hidden_size, p->marks);
}

static fm_status record_moe(fm_model *m, const fm_batch *b, int32_t layer)
{
    const fm_layer *y = &m->layers[layer];
    const int64_t t0 = fm_clock_ns();
    FM_TRY(fm_moe_route(m, y, m->s.h, b->n_rows, m->s.route_ids, m->s.route_w));
    FM_TRY(m->be->v->tell(m->be, &m->pipe->at[layer].routed));
    FM_PHASE_END(m, router, layer, t0);
    if (y->shared_gate_proj)
        FM_TRY(fm_moe_shared(m, b, y, layer)); /* while the host reads */
    const int64_t t1 = fm_clock_ns();
    FM_TRY(record_experts(m, b, layer));
    FM_TRY(fm_moe_add_shared(m, b, y));
    FM_PHASE_END(m, experts, layer, t1);
    return FM_OK;
}

static fm_status record_layer(fm_model *m, const fm_batch *b, int32_t layer)
{
    FM_TRY(fm_run_mixer(m, b, layer));
    FM_TRY(m->layers[layer].ffn == FM_FFN_MOE ? record_moe(m, b, layer) : fm_block_mlp(m, b, layer));
    if (fm_moe_guess_kind(m, b, layer + 1) != FM_GUESS_ROUTED || !fm_moe_guess_asks(m, FM_GUESS_LATE))
        return FM_OK;
    FM_TRY(fm_moe_guess_route(m, b->n_rows, layer + 1, m->pipe->guess_ids));
    return m->be->v->tell(m->be, &m->pipe->at[layer + 1].guessed);
}

static fm_status record(fm_model *m, const fm_batch *b)
{
    struct fm_pipeline *p = m->pipe;
    FM_TRY(fm_run_embed(m, b));
    for (int32_t l = 0; l < m->c.num_hidden_layers; l++)
        FM_TRY(record_layer(m, b, l));
    m->be->layer = -1;
    FM_TRY(fm_head_input(m, b, &p->n_out, &p->out));
    FM_TRY(fm_head_matmul(m, 0, p->n_out, m->s.logits));
    return m->be->v->mark_nonfinite(m->be, m->s.logits, p->n_out, m->c.vocab_size, p->row_marks);
}

/* ---- the host's side ------------------------------------------------------------------------------------ */

static fm_status await(fm_model *m, uint64_t value)
{
    const fm_status s = m->be->v->await(m->be, value);
    m->pipe->lost = m->pipe->lost || s != FM_OK;
    return s;
}

static void post(fm_model *m, uint64_t hold)
{
    m->be->v->post(m->be, hold);
    m->pipe->posted++;
}

static void unpin(fm_model *m)
{
    struct fm_wave *w = m->wave;
    struct fm_pipeline *p = m->pipe;
    if (p->held >= 0)
        fm_experts_release(m->experts, p->held, w->ids, w->n, w->claimed, p->cools ? w->cool : NULL);
    p->held = -1;
    p->posted = 0;
}

/* The device is past the held layer: look at what its experts gave, and let them go. */
static fm_status retire(fm_model *m)
{
    const struct fm_pipeline *p = m->pipe;
    for (int64_t i = 0; p->held >= 0 && i < m->wave->rows; i++)
        if (p->marks[i])
            FM_TRY(fm_moe_nonfinite(m, m->wave, p->held, i));
    unpin(m);
    return FM_OK;
}

/* Ids are read before the device is known to have got this far unharmed. */
static fm_status check_ids(const fm_model *m, int64_t n, const int32_t *ids, int32_t layer)
{
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= m->c.num_experts)
            return fm_fail(FM_ERR_BACKEND, "layer %d: the device chose expert %d of %d", layer, ids[i],
                           (int)m->c.num_experts);
    return FM_OK;
}

/* Jobs of what is claimed by now; the device may begin with them. */
static fm_status start_stage(fm_model *m, int32_t layer, int stage)
{
    struct fm_pipeline *p = m->pipe;
    const int n = fm_wave_jobs(m, m->wave);
    FM_TRY(m->be->v->set_jobs(m->be, &p->later[stage], m->wave->jobs, n));
    post(m, p->at[layer].hold[stage]);
    return FM_OK;
}

static fm_status claim(fm_model *m, const fm_batch *b, int32_t layer, int *n_left)
{
    struct fm_wave *w = m->wave;
    int n_new;
    FM_TRY(fm_experts_claim(m->experts, layer, w->ids, w->n, w->claimed, w->mats, b->cancel, &n_new));
    *n_left -= n_new;
    return FM_OK;
}

/* The router's choice is there: experts that are cached start at once, the rest when all are read. */
static fm_status serve(fm_model *m, const fm_batch *b, int32_t layer)
{
    struct fm_wave *w = m->wave;
    struct fm_pipeline *p = m->pipe;
    int at = 0;
    int32_t done = 0;
    FM_TRY(check_ids(m, b->n_rows * m->k, m->s.route_ids, layer));
    fm_moe_take_routes(m, b, layer);
    p->cools = fm_moe_plan(m, b);
    fm_wave_next(w, &m->s, m->k, w->max, &at, &done); /* takes all: see fits */
    p->held = layer;
    p->posted = 0;
    FM_TRY(fm_experts_hint(m->experts, layer, w->ids, w->n, FM_HINT_DEMAND));
    int n_left = w->n;
    if (p->n_stages > 1) {
        FM_TRY(claim(m, b, layer, &n_left));
        FM_TRY(start_stage(m, layer, 0));
    }
    while (n_left > 0)
        FM_TRY(claim(m, b, layer, &n_left));
    fm_wave_parts(m, w, b->n_rows, &p->parts);
    return start_stage(m, layer, p->n_stages - 1);
}

static fm_status serve_layer(fm_model *m, const fm_batch *b, int32_t layer)
{
    const meeting *at = &m->pipe->at[layer];
    const int64_t t0 = fm_clock_ns();
    fm_expert_stats before, after;
    if (at->guessed) {
        FM_TRY(await(m, at->guessed));
        FM_TRY(retire(m));
        FM_TRY(check_ids(m, b->n_rows * m->k, m->pipe->guess_ids, layer));
        FM_TRY(fm_moe_guess_hint(m, b->n_rows, layer, m->pipe->guess_ids, FM_GUESS_LATE));
    } else if (fm_moe_guess_kind(m, b, layer) == FM_GUESS_ALL && layer > 0)
        FM_TRY(fm_moe_guess_all(m, layer, 0));
    FM_TRY(fm_check_cancel(b));
    FM_TRY(await(m, at->routed));
    FM_TRY(retire(m));
    FM_PHASE_END(m, router, layer, t0);
    const int64_t t1 = fm_clock_ns();
    fm_experts_get_stats(m->experts, &before);
    FM_TRY(serve(m, b, layer));
    fm_experts_get_stats(m->experts, &after);
    const int64_t t2 = fm_clock_ns(), waited = after.wait_ns - before.wait_ns;
    m->phases.wait_ns += waited;
    m->phases.experts_ns += t2 - t1 - waited;
    fm_trace_add(&m->trace, FM_TRACE_experts, layer, m->wave->n, t1, t2, 0);
    return FM_OK;
}

static fm_status finish(fm_model *m, const fm_batch *b)
{
    struct fm_pipeline *p = m->pipe;
    const int64_t t0 = fm_clock_ns();
    const fm_status s = m->be->v->sync(m->be);
    p->lost = s != FM_OK;
    FM_TRY(s);
    FM_TRY(retire(m));
    for (int64_t i = 0; i < p->n_out; i++)
        if (p->row_marks[i])
            return fm_head_nonfinite();
    fm_head_output(m, p->n_out, p->out);
    fm_head_last(m, b);
    FM_PHASE_END(m, head, -1, t0);
    return FM_OK;
}

/* ---- failures ------------------------------------------------------------------------------------------- */

static void forget_jobs(fm_model *m, int stage)
{
    (void)m->be->v->set_jobs(m->be, &m->pipe->later[stage], NULL, 0); /* no jobs cannot fail */
}

/* Let the device run to the end without experts, touching no list that it may be reading. FM_OK unless it fails too. */
static fm_status run_out(fm_model *m, int64_t n_rows)
{
    struct fm_pipeline *p = m->pipe;
    const size_t start_bytes = (size_t)(n_rows + 1) * sizeof(int32_t);
    int32_t next = p->held + 1;
    while (next < m->c.num_hidden_layers && m->layers[next].ffn != FM_FFN_MOE)
        next++;
    if (p->posted > 0 && p->posted < p->n_stages) { /* it may run the first stage, and holds before the second */
        forget_jobs(m, 1);
        memset(p->parts.start, 0, start_bytes);
        post(m, p->at[p->held].hold[1]);
    }
    if (p->posted > 0 && next < m->c.num_hidden_layers)
        FM_TRY(await(m, p->at[next].routed));
    if (p->posted == 0 || next < m->c.num_hidden_layers) { /* it holds before the next layer's experts, or will */
        for (int i = 0; i < p->n_stages; i++)
            forget_jobs(m, i);
        memset(p->parts.start, 0, start_bytes);
    }
    m->be->v->post(m->be, p->last_hold);
    return m->be->v->sync(m->be);
}

static fm_status give_up(fm_model *m, const fm_batch *b, fm_status why)
{
    struct fm_pipeline *p = m->pipe;
    if (p->lost)
        m->be->v->post(m->be, p->last_hold); /* should it ever go on, it comes to its end */
    else {
        const fm_status s = run_out(m, b->n_rows);
        why = s != FM_OK ? s : why; /* a device that failed as well is the worse news */
    }
    unpin(m);
    fm_experts_disown(m->experts);
    return why;
}

fm_status fm_pipeline_forward(fm_model *m, const fm_batch *b)
{
    struct fm_pipeline *p = m->pipe;
    memset(p->at, 0, (size_t)m->c.num_hidden_layers * sizeof *p->at);
    memset(p->parts.start, 0, (size_t)(b->n_rows + 1) * sizeof(int32_t));
    p->n_stages = fm_experts_slots(m->experts) < fm_experts_total(m->experts) ? MAX_STAGES : 1;
    p->held = -1;
    p->posted = 0;
    p->lost = false;
    fm_status s = record(m, b);
    m->be->v->flush(m->be); /* also what was recorded before an error: it ends in give_up */
    for (int32_t l = 0; l < m->c.num_hidden_layers && s == FM_OK; l++)
        if (m->layers[l].ffn == FM_FFN_MOE)
            s = serve_layer(m, b, l);
    if (s == FM_OK)
        s = finish(m, b);
    return s == FM_OK ? s : give_up(m, b, s);
}
