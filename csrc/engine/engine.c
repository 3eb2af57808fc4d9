/* Owns: opening and closing engines in the right order, memory planning, the lock. */
#include <inttypes.h>
#include <string.h>
#include <unistd.h>

#include "base/clock.h"
#include "base/crc32c.h"
#include "base/mem.h"
#include "engine/engine_impl.h"
#include "store/expert_layout.h"

/* ---- plan ------------------------------------------------------------------------------------------- */

static fm_status find_kv_format(const char *name, fm_quant *out)
{
    if (!fm_quant_find_name(name ? name : "f32", out) || fm_quant_get(*out)->affine)
        return fm_fail(FM_ERR_ARG, "kv_format '%s' is unknown; there are: f32, f16, bf16", name);
    return FM_OK;
}

static fm_status check_opts(const fm_config *c, const fm_engine_opts *o, int64_t *k)
{
    if (o->context < 1)
        return fm_fail(FM_ERR_ARG, "context is %" PRId64 ", must be at least 1", o->context);
    size_t state_bytes;
    fm_quant kv;
    FM_TRY(find_kv_format(o->kv_format, &kv));
    FM_TRY(fm_state_bytes(c, o->context, kv, &state_bytes));
    if (o->max_rows < 1 || o->max_rows > 65536)
        return fm_fail(FM_ERR_ARG, "rows per forward: %" PRId64 ", must be 1 to 65536", o->max_rows);
    if (o->lookahead < FM_LOOKAHEAD_AUTO || o->lookahead > FM_MAX_TOP_K)
        return fm_fail(FM_ERR_ARG, "lookahead: %" PRId64 " experts, must be 0 to %d, or -1 to let it be learned",
                       o->lookahead, FM_MAX_TOP_K);
    if (o->n_threads < 0 || o->n_threads > 1024)
        return fm_fail(FM_ERR_ARG, "threads: %d, must be 1 to 1024", o->n_threads);
    *k = o->experts_per_token ? o->experts_per_token : c->num_experts_per_tok;
    const int64_t most = c->num_experts < FM_MAX_TOP_K ? c->num_experts : FM_MAX_TOP_K;
    if (c->num_experts > 0 && (*k < 1 || *k > most))
        return fm_fail(FM_ERR_ARG, "experts_per_token is %" PRId64 ", must be 1 to %" PRId64 " (trained: %" PRId64 ")", *k,
                       most, c->num_experts_per_tok);
    if (c->num_experts == 0 && o->experts_per_token != 0)
        return fm_fail(FM_ERR_ARG, "experts_per_token is %" PRId64 ", but the model has no experts",
                       o->experts_per_token);
    if (c->n_group > 1 && *k > c->num_experts / c->n_group * c->topk_group)
        return fm_fail(FM_ERR_ARG, "experts_per_token is %" PRId64 ", the chosen groups hold only %" PRId64, *k,
                       c->num_experts / c->n_group * c->topk_group);
    return FM_OK;
}

static fm_status check_model(const fm_engine_model *model)
{
    const fm_arch *arch;
    FM_TRY(fm_arch_find(model->arch, &arch));
    FM_TRY(fm_config_check(model->config));
    FM_TRY(fm_desc_check(model->desc));
    return fm_arch_check(arch, model->config, model->desc);
}

fm_status fm_engine_plan_bytes(const fm_engine_model *model, const fm_engine_opts *opts, fm_engine_plan *out)
{
    int64_t k;
    fm_quant kv;
    FM_TRY(check_model(model));
    FM_TRY(check_opts(model->config, opts, &k));
    FM_TRY(find_kv_format(opts->kv_format, &kv));
    fm_engine_plan p = {.experts_per_token = k};
    FM_TRY(fm_weights_bytes(model->desc, &p.trunk_bytes));
    FM_TRY(fm_state_bytes(model->config, opts->context, kv, &p.state_bytes));
    p.state_bytes += FM_SESSION_ROWS * (size_t)model->config->vocab_size * sizeof(float);
    const int n_threads = opts->n_threads > 0 ? opts->n_threads : fm_cpu_count();
    const fm_model_sizes z = {k, opts->max_rows, opts->context, n_threads};
    FM_TRY(fm_model_scratch_bytes(model->config, &z, &p.scratch_bytes));
    for (int64_t i = 0; i < model->desc->n_expert_layers; i++) {
        const fm_expert_desc *e = &model->desc->experts[i];
        fm_segment seg[FM_MAX_SEGMENTS];
        int64_t bytes = 0;
        for (int s = 0, n = fm_expert_segments(e, seg); s < n; s++)
            bytes += seg[s].n_bytes;
        p.n_experts_total += e->n_experts;
        p.expert_record_bytes_max = bytes > p.expert_record_bytes_max ? bytes : p.expert_record_bytes_max;
    }
    if (model->desc->n_expert_layers > 0) {
        p.slot_bytes = fm_expert_layout_max(model->desc, opts->io_direct ? FM_IO_ALIGN : 1);
        p.n_slots_min = k;
    }
    *out = p;
    return FM_OK;
}

/* ---- open ------------------------------------------------------------------------------------------------ */

static fm_status open_io(fm_engine *e, const fm_engine_opts *o)
{
    void *mem;
    FM_TRY(fm_alloc((size_t)(e->desc->n_files + 1) * sizeof(char *), &mem));
    const char **paths = mem;
    for (int32_t i = 0; i < e->desc->n_files; i++)
        paths[i] = e->desc->files[i].path;
    const fm_io_opts io = {o->io_method, o->io_direct, o->io_workers, o->io_fault};
    const fm_status s = fm_io_open(&io, paths, e->desc->n_files, &e->io);
    fm_free(mem);
    FM_TRY(s);
    for (int32_t i = 0; i < e->desc->n_files; i++) {
        const fm_desc_file *f = &e->desc->files[i];
        const int64_t real = fm_io_file_bytes(e->io, i);
        if (real < f->n_bytes) /* described longer than it is: every range was checked against n_bytes */
            return fm_fail_path(FM_ERR_FORMAT, 0, f->path, "%s: the file has %" PRId64 " bytes, its description says %" PRId64,
                                f->path, real, f->n_bytes);
    }
    return FM_OK;
}

static fm_status open_lists(fm_engine *e, int64_t rows)
{
    fm_arena a = {NULL, 0, 0};
    for (int pass = 0; pass < 2; pass++) {
        if (pass == 1) {
            FM_TRY(fm_alloc(a.used, &e->lists));
            a = (fm_arena){e->lists, 0, a.used};
        }
        e->spans = fm_arena_take(&a, (size_t)rows * sizeof(fm_span));
        e->states = fm_arena_take(&a, (size_t)rows * sizeof(fm_state *));
        e->last_logits = fm_arena_take(&a, (size_t)rows * sizeof(float *));
        e->ids = fm_arena_take(&a, (size_t)rows * sizeof(int32_t));
        e->span_sessions = fm_arena_take(&a, (size_t)rows * sizeof(fm_session *));
    }
    return FM_OK;
}

static const char *const numeric_names[FM_NUMERIC_COUNT] = {"exact", "fast"};

static fm_status find_numeric(const char *name, fm_numeric *out)
{
    for (int i = 0; i < FM_NUMERIC_COUNT; i++)
        if (strcmp(name ? name : "exact", numeric_names[i]) == 0) {
            *out = (fm_numeric)i;
            return FM_OK;
        }
    return fm_fail(FM_ERR_ARG, "numeric mode '%s' is unknown; there are: exact, fast", name);
}

static fm_status open_parts(fm_engine *e, const fm_engine_model *model, const fm_engine_opts *o)
{
    int64_t k;
    const fm_arch *arch;
    const fm_config *c = model->config;
    FM_TRY(check_model(model));
    FM_TRY(check_opts(c, o, &k));
    FM_TRY(fm_arch_find(model->arch, &arch));
    FM_TRY(fm_desc_copy(model->desc, &e->desc));
    FM_TRY(fm_pool_open(o->n_threads > 0 ? o->n_threads : fm_cpu_count(), &e->pool));
    FM_TRY(open_io(e, o));
    const fm_kernels *kernels;
    FM_TRY(fm_kernels_get(&kernels));
    e->cpu_variant = kernels->name;
    fm_backend_opts be = {o->backend, e->pool, FM_NUMERIC_EXACT};
    FM_TRY(find_numeric(o->numeric, &be.numeric));
    e->numeric = be.numeric;
    FM_TRY(fm_backend_open(&be, &e->be));
    FM_TRY(find_kv_format(o->kv_format, &e->kv_format));
    if (e->kv_format != FM_QUANT_F32 && (e->be->v->caps(e->be).kv_formats >> e->kv_format & 1) == 0)
        return fm_fail(FM_ERR_UNSUPPORTED, "kv_format '%s': the %s backend keeps K and V in f32 only",
                       fm_quant_get(e->kv_format)->name, e->be->v->name);
    FM_TRY(fm_weights_open(e->desc, e->io, e->be, e->pool, &e->weights));
    if (e->desc->n_expert_layers > 0) {
        if (o->n_slots != 0 && o->n_slots < k)
            return fm_fail(FM_ERR_ARG, "%d expert slots, %" PRId64 " experts per token need at least as many", o->n_slots, k);
        fm_experts_opts x = {.n_slots = o->n_slots ? o->n_slots : (int32_t)k, .verify = o->verify};
        FM_TRY(fm_cache_policy_find(o->cache_policy ? o->cache_policy : "lru", &x.policy));
        x.split_bytes = o->split_bytes;
        FM_TRY(fm_experts_open(e->desc, e->io, e->be, &x, &e->experts));
    }
    FM_TRY(open_lists(e, o->max_rows));
    FM_TRY(fm_model_open(arch, c, e->be, e->weights, e->experts, k, o->max_rows, &e->model));
    e->model->lookahead.depth = o->lookahead;
    return FM_OK;
}

static void close_parts(fm_engine *e)
{
    fm_model_close(e->model);
    fm_experts_close(e->experts);
    fm_weights_close(e->weights);
    fm_backend_close(e->be);
    fm_io_close(e->io);
    fm_pool_close(e->pool);
    fm_free(e->desc);
    fm_free(e->lists);
    e->model = NULL;
    e->experts = NULL;
}

fm_status fm_engine_open(const fm_engine_model *model, const fm_engine_opts *opts, fm_engine **out)
{
    *out = NULL;
    void *mem;
    FM_TRY(fm_alloc(sizeof(fm_engine), &mem));
    fm_engine *e = mem;
    e->pid = getpid();
    e->context = opts->context;
    e->verify = opts->verify;
    const fm_status s = open_parts(e, model, opts);
    if (s != FM_OK) {
        close_parts(e);
        fm_free(e);
        return s;
    }
    pthread_mutex_init(&e->lock, NULL);
    atomic_init(&e->refs, 1);
    *out = e;
    return FM_OK;
}

/* ---- lock, close -------------------------------------------------------------------------------------------- */

fm_status fm_engine_enter(fm_engine *e)
{
    if (e->pid != getpid())
        return fm_fail(FM_ERR_STATE, "the engine was opened in process %d and cannot be used in a forked child; open it there",
                       (int)e->pid);
    pthread_mutex_lock(&e->lock);
    if (e->closed) {
        pthread_mutex_unlock(&e->lock);
        return fm_fail(FM_ERR_STATE, "the engine is closed");
    }
    return FM_OK;
}

void fm_engine_leave(fm_engine *e) { pthread_mutex_unlock(&e->lock); }

void fm_engine_unref(fm_engine *e)
{
    if (atomic_fetch_sub(&e->refs, 1) > 1)
        return;
    if (e->pid == getpid())
        pthread_mutex_destroy(&e->lock);
    fm_free(e);
}

void fm_engine_close(fm_engine *e)
{
    if (!e)
        return;
    if (e->pid != getpid()) { /* the threads to join are in the parent: leave everything to the exit */
        fm_engine_unref(e);
        return;
    }
    pthread_mutex_lock(&e->lock);
    for (fm_session *s = e->sessions; s; s = s->next) {
        fm_state_close(s->state);
        s->state = NULL;
    }
    e->closed = true;
    close_parts(e);
    pthread_mutex_unlock(&e->lock);
    fm_engine_unref(e);
}

/* ---- what it is and what it did ------------------------------------------------------------------------------- */

fm_status fm_engine_get_info(fm_engine *e, fm_engine_info *out)
{
    FM_TRY(fm_engine_enter(e));
    const fm_io_caps io = fm_io_get_caps(e->io);
    const fm_config *c = &e->model->c;
    *out = (fm_engine_info){
        .arch = e->model->arch->name,
        .backend = e->be->v->name,
        .cpu_variant = e->cpu_variant,
        .numeric = numeric_names[e->numeric],
        .kv_format = fm_quant_get(e->kv_format)->name,
        .io_method = io.method,
        .io_direct = io.direct,
        .verify = e->verify,
        .n_threads = fm_pool_threads(e->pool),
        .n_slots = e->experts ? fm_experts_slots(e->experts) : 0,
        .experts_per_token = e->model->k,
        .trained_experts_per_token = c->num_experts_per_tok,
        .context = e->context,
        .max_rows = e->model->max_rows,
        .vocab_size = c->vocab_size,
        .n_layers = c->num_hidden_layers,
        .hidden_size = c->hidden_size,
    };
    fm_engine_leave(e);
    return FM_OK;
}

fm_status fm_engine_get_stats(fm_engine *e, fm_engine_stats *out)
{
    FM_TRY(fm_engine_enter(e));
    fm_engine_stats s = e->stats;
    s.predicted = e->model->lookahead.n_predicted;
    s.predicted_right = e->model->lookahead.n_right;
    if (e->experts) {
        fm_expert_stats x;
        fm_experts_get_stats(e->experts, &x);
        s.hits = x.hits;
        s.misses = x.misses;
        s.n_reads = x.n_reads;
        s.bytes_read = x.bytes_read;
        s.read_ns = x.read_ns;
        s.crc_ns = x.crc_ns;
        s.n_failed_reads = x.n_failed;
        s.guessed = x.guessed;
        s.guess_used = x.guess_used;
        s.guess_wasted_bytes = x.guess_wasted_bytes;
    }
#define X(name) s.name##_ns = e->model->phases.name##_ns;
    FM_PHASE_LIST(X)
#undef X
    *out = s;
    fm_engine_leave(e);
    return FM_OK;
}

fm_status fm_engine_reset_stats(fm_engine *e)
{
    FM_TRY(fm_engine_enter(e));
    e->stats = (fm_engine_stats){0};
    e->model->phases = (fm_phases){0};
    e->model->lookahead.n_predicted = e->model->lookahead.n_right = 0;
    if (e->experts)
        fm_experts_reset_stats(e->experts);
    fm_engine_leave(e);
    return FM_OK;
}

fm_status fm_engine_set_slots(fm_engine *e, int32_t n_slots, int32_t *now)
{
    FM_TRY(fm_engine_enter(e));
    fm_status s = FM_OK;
    if (!e->experts)
        s = fm_fail(FM_ERR_ARG, "the model has no experts");
    else if (n_slots < e->model->k)
        s = fm_fail(FM_ERR_ARG, "%d expert slots, %" PRId64 " experts per token need at least as many", n_slots,
                    e->model->k);
    else
        s = fm_experts_resize(e->experts, n_slots);
    if (s == FM_OK)
        *now = fm_experts_slots(e->experts);
    fm_engine_leave(e);
    return s;
}

static fm_status check_expert(const fm_engine *e, int32_t layer, int32_t id)
{
    for (int64_t i = 0; i < e->desc->n_expert_layers; i++)
        if (e->desc->experts[i].layer == layer && id >= 0 && id < e->desc->experts[i].n_experts)
            return FM_OK;
    return fm_fail(FM_ERR_ARG, "layer %d has no routed expert %d", layer, id);
}

fm_status fm_engine_reread(fm_engine *e, const int32_t *layers, const int32_t *ids, int64_t n, int64_t *ns)
{
    FM_TRY(fm_engine_enter(e));
    fm_status s = FM_OK;
    for (int64_t i = 0; i < n && s == FM_OK; i++)
        s = check_expert(e, layers[i], ids[i]);
    const int64_t t0 = fm_clock_ns();
    if (s == FM_OK && n > 0)
        s = fm_experts_reread(e->experts, layers, ids, n);
    if (s == FM_OK)
        *ns = fm_clock_ns() - t0;
    fm_engine_leave(e);
    return s;
}

uint32_t fm_checksum(uint32_t crc, const void *data, size_t bytes) { return fm_crc32c(crc, data, bytes); }

/* ---- trace ---------------------------------------------------------------------------------------------------- */

fm_status fm_engine_trace_start(fm_engine *e, int64_t capacity)
{
    FM_TRY(fm_engine_enter(e));
    fm_trace_close(&e->model->trace);
    const fm_status s = fm_trace_open(&e->model->trace, capacity);
    if (e->experts)
        fm_experts_set_trace(e->experts, s == FM_OK ? &e->model->trace : NULL);
    fm_engine_leave(e);
    return s;
}

fm_status fm_engine_trace_take(fm_engine *e, fm_trace_event *out, int64_t capacity, int64_t *n, int64_t *n_lost)
{
    FM_TRY(fm_engine_enter(e));
    fm_trace *t = &e->model->trace;
    *n = t->n < capacity ? t->n : capacity;
    *n_lost = t->n_lost + t->n - *n;
    if (*n > 0)
        memcpy(out, t->events, (size_t)*n * sizeof *out);
    if (e->experts)
        fm_experts_set_trace(e->experts, NULL);
    fm_trace_close(t);
    fm_engine_leave(e);
    return FM_OK;
}
