/* Owns: sessions and the one forward. A forward is all or nothing: positions move only when it succeeded. */
#include <inttypes.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "engine/engine_impl.h"

fm_status fm_session_create(fm_engine *e, int64_t context, fm_session **out)
{
    *out = NULL;
    if (context < 0)
        return fm_fail(FM_ERR_ARG, "context is %" PRId64 ", must be at least 1", context);
    FM_TRY(fm_engine_enter(e));
    void *mem = NULL, *logits = NULL;
    fm_state *state = NULL;
    const int64_t ctx = context > 0 ? context : e->context;
    const size_t vocab = (size_t)e->model->c.vocab_size;
    fm_status s = fm_alloc(sizeof(fm_session), &mem);
    if (s == FM_OK)
        s = fm_alloc(FM_SESSION_ROWS * vocab * sizeof(float), &logits);
    if (s == FM_OK)
        s = fm_state_open(&e->model->c, e->be, ctx, e->kv_format, &state);
    if (s != FM_OK) {
        fm_free(logits);
        fm_free(mem);
        fm_engine_leave(e);
        return s;
    }
    fm_session *n = mem;
    n->engine = e;
    n->state = state;
    n->logits[0] = logits;
    n->logits[1] = n->logits[0] + vocab;
    n->context = ctx;
    atomic_init(&n->cancel, false);
    n->next = e->sessions;
    if (n->next)
        n->next->prev = n;
    e->sessions = n;
    atomic_fetch_add(&e->refs, 1);
    fm_engine_leave(e);
    *out = n;
    return FM_OK;
}

void fm_session_free(fm_session *s)
{
    if (!s)
        return;
    fm_engine *e = s->engine;
    if (fm_engine_enter(e) == FM_OK) { /* else closed: its state is gone already */
        if (s->prev)
            s->prev->next = s->next;
        else
            e->sessions = s->next;
        if (s->next)
            s->next->prev = s->prev;
        fm_state_close(s->state);
        fm_engine_leave(e);
    }
    fm_free(s->logits[0]);
    fm_free(s);
    fm_engine_unref(e);
}

/* ---- forward ------------------------------------------------------------------------------------------ */

static fm_status check_span(const fm_engine *e, fm_session *s, const fm_span *sp, int n_spans)
{
    if (s->engine != e)
        return fm_fail(FM_ERR_ARG, "row %" PRId64 ": its session belongs to another engine", sp->row0);
    for (int i = 0; i < n_spans - 1; i++)
        if (e->span_sessions[i] == s)
            return fm_fail(FM_ERR_ARG, "row %" PRId64 ": the rows of a session must be consecutive", sp->row0);
    if (sp->n > fm_state_capacity(s->state) - sp->pos0)
        return fm_fail(FM_ERR_ARG, "context is full: %" PRId64 " positions are used and %" PRId64
                                   " more asked for, the session has %" PRId64,
                       sp->pos0, sp->n, fm_state_capacity(s->state));
    if (atomic_load_explicit(&s->cancel, memory_order_relaxed))
        return fm_fail(FM_ERR_CANCELLED, "cancelled");
    return FM_OK;
}

static fm_status gather_spans(fm_engine *e, const fm_row *rows, int64_t n_rows, int *n_spans)
{
    const int64_t V = e->model->c.vocab_size;
    int n = 0;
    for (int64_t r = 0; r < n_rows; r++) {
        if (rows[r].id < 0 || rows[r].id >= V)
            return fm_fail(FM_ERR_ARG, "row %" PRId64 ": token id %d, the vocabulary has %" PRId64, r, rows[r].id, V);
        e->ids[r] = rows[r].id;
        if (r > 0 && rows[r].session == rows[r - 1].session) {
            e->spans[n - 1].n++;
            continue;
        }
        fm_session *s = rows[r].session;
        e->span_sessions[n] = s;
        e->states[n] = s->state;
        e->last_logits[n] = s->logits[!s->now];
        e->spans[n] = (fm_span){r, 1, s->engine == e ? fm_state_pos(s->state) : 0};
        n++;
    }
    for (int i = 0; i < n; i++)
        FM_TRY(check_span(e, e->span_sessions[i], &e->spans[i], i + 1));
    *n_spans = n;
    return FM_OK;
}

static void count(fm_engine *e, int n_spans, int64_t n_rows, int64_t ns)
{
    e->stats.n_forwards++;
    if (n_rows > n_spans) {
        e->stats.prefill_tokens += n_rows;
        e->stats.prefill_ns += ns;
    } else {
        e->stats.decode_tokens += n_rows;
        e->stats.decode_ns += ns;
    }
}

static fm_status forward_locked(fm_engine *e, const fm_row *rows, int64_t n_rows, const fm_forward_out *out)
{
    const int64_t t0 = fm_clock_ns();
    int n_spans = 0;
    if (n_rows < 1 || n_rows > e->model->max_rows)
        return fm_fail(FM_ERR_ARG, "forward: %" PRId64 " rows, must be 1 to %" PRId64, n_rows, e->model->max_rows);
    FM_TRY(gather_spans(e, rows, n_rows, &n_spans));
    const fm_batch b = {
        .ids = e->ids,
        .n_rows = n_rows,
        .spans = e->spans,
        .states = e->states,
        .n_spans = n_spans,
        .last_logits = e->last_logits,
        .all_logits = out ? out->logits : NULL,
        .trace_router = out ? out->router : NULL,
        .trace_hidden = out ? out->hidden : NULL,
        .cancel = n_spans == 1 ? &e->span_sessions[0]->cancel : NULL,
    };
    FM_TRY(fm_model_forward(e->model, &b));
    for (int i = 0; i < n_spans; i++) {
        fm_session *s = e->span_sessions[i];
        s->now = !s->now;
        s->has_logits = true;
        s->pos = fm_state_pos(e->states[i]);
    }
    count(e, n_spans, n_rows, fm_clock_ns() - t0);
    return FM_OK;
}

fm_status fm_engine_forward(fm_engine *e, const fm_row *rows, int64_t n_rows, const fm_forward_out *out)
{
    FM_TRY(fm_engine_enter(e));
    const fm_status s = forward_locked(e, rows, n_rows, out);
    if (s == FM_ERR_CANCELLED) /* told: the session may go on */
        for (int64_t r = 0; r < n_rows; r++)
            atomic_store_explicit(&rows[r].session->cancel, false, memory_order_relaxed);
    fm_engine_leave(e);
    return s;
}

fm_status fm_session_prefill(fm_session *s, const int32_t *ids, int64_t n, int64_t *n_done)
{
    fm_row rows[256];
    void *more = NULL;
    fm_row *r = rows;
    FM_TRY(fm_engine_enter(s->engine));
    const int64_t most = s->engine->model->max_rows, now = n < most ? n : most;
    fm_engine_leave(s->engine);
    if (now > FM_COUNT(rows)) {
        FM_TRY(fm_alloc((size_t)now * sizeof(fm_row), &more));
        r = more;
    }
    for (int64_t i = 0; i < now; i++)
        r[i] = (fm_row){s, ids[i]};
    const fm_status status = fm_engine_forward(s->engine, r, now, NULL);
    fm_free(more);
    if (status == FM_OK)
        *n_done = now;
    return status;
}

fm_status fm_session_step(fm_session *s, int32_t id)
{
    const fm_row row = {s, id};
    return fm_engine_forward(s->engine, &row, 1, NULL);
}

/* ---- the rest --------------------------------------------------------------------------------------------- */

const float *fm_session_logits(const fm_session *s) { return s->has_logits ? s->logits[s->now] : NULL; }

int64_t fm_session_pos(const fm_session *s) { return s->pos; }

int64_t fm_session_context(const fm_session *s) { return s->context; }

fm_status fm_session_rewind(fm_session *s, int64_t want, int64_t *got)
{
    FM_TRY(fm_engine_enter(s->engine));
    fm_status status = FM_OK;
    if (want < 0 || want > s->pos)
        status = fm_fail(FM_ERR_ARG, "rewind to %" PRId64 ", the session is at %" PRId64, want, s->pos);
    else if (want < s->pos) {
        s->pos = fm_state_rewind(s->state, want);
        s->has_logits = false;
    }
    if (status == FM_OK)
        *got = s->pos;
    fm_engine_leave(s->engine);
    return status;
}

fm_status fm_session_checkpoint(fm_session *s)
{
    FM_TRY(fm_engine_enter(s->engine));
    fm_state_checkpoint(s->state);
    fm_engine_leave(s->engine);
    return FM_OK;
}

fm_status fm_session_save_bytes(fm_session *s, size_t *bytes)
{
    FM_TRY(fm_engine_enter(s->engine));
    *bytes = fm_state_save_bytes(s->state);
    fm_engine_leave(s->engine);
    return FM_OK;
}

fm_status fm_session_save(fm_session *s, void *out, size_t bytes)
{
    FM_TRY(fm_engine_enter(s->engine));
    fm_status status = FM_OK;
    if (bytes != fm_state_save_bytes(s->state))
        status = fm_fail(FM_ERR_ARG, "save: a buffer of %zu bytes, %zu are needed", bytes, fm_state_save_bytes(s->state));
    else
        fm_state_save(s->state, out);
    fm_engine_leave(s->engine);
    return status;
}

fm_status fm_session_load(fm_session *s, const void *data, size_t bytes)
{
    FM_TRY(fm_engine_enter(s->engine));
    const fm_status status = fm_state_load(s->state, data, bytes);
    if (status == FM_OK) {
        s->pos = fm_state_pos(s->state);
        s->has_logits = false;
    }
    fm_engine_leave(s->engine);
    return status;
}

void fm_session_cancel(fm_session *s) { atomic_store_explicit(&s->cancel, true, memory_order_relaxed); }
