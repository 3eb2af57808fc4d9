/* Resolving weights, planning scratch, and the order of blocks. */
#include "model/model.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "base/clock.h"
#include "base/mem.h"
#include "model/block.h"
#include "model/pipeline.h"

/* ---- scratch --------------------------------------------------------------------------------------- */

typedef struct host_lists {
    fm_kv *kv;
    const float **in;
    float **out;
    fm_layer *layers;
    double *inv_freq;
} host_lists;

static void take_host(host_lists *h, const fm_config *c, int64_t rows, fm_arena *a)
{
    h->layers = fm_arena_take(a, (size_t)c->num_hidden_layers * sizeof(fm_layer));
    h->inv_freq = fm_arena_take(a, (size_t)(c->rotary_dim / 2 + 1) * sizeof(double));
    h->kv = fm_arena_take(a, (size_t)rows * sizeof(fm_kv));
    h->in = fm_arena_take(a, (size_t)rows * sizeof(float *));
    h->out = fm_arena_take(a, (size_t)rows * sizeof(float *));
}

static bool has(const int32_t *kinds, int64_t n, int kind)
{
    for (int64_t i = 0; i < n; i++)
        if (kinds[i] == kind)
            return true;
    return false;
}

/* Parts of different blocks start at the same place: only one block runs at a time. */
static void take_scratch(fm_scratch *s, const fm_config *c, int64_t k, int64_t rows, fm_arena *a)
{
    s->x = fm_take_floats(a, rows, c->hidden_size);
    s->h = fm_take_floats(a, rows, c->hidden_size);
    const size_t common = a->used;
    size_t most = common;
#define PART(condition, call)                                                                      \
    do {                                                                                           \
        a->used = common;                                                                          \
        if (condition)                                                                             \
            call;                                                                                  \
        most = a->used > most ? a->used : most;                                                    \
    } while (0)
    PART(has(c->mixers, c->num_hidden_layers, FM_MIXER_FULL), fm_scratch_attn(s, c, rows, a));
    PART(has(c->mixers, c->num_hidden_layers, FM_MIXER_LINEAR), fm_scratch_delta(s, c, rows, a));
    PART(has(c->ffns, c->num_hidden_layers, FM_FFN_MOE), fm_scratch_moe(s, c, k, rows, a));
    PART(has(c->ffns, c->num_hidden_layers, FM_FFN_DENSE), fm_scratch_mlp(s, c, rows, a));
    s->logit_rows = rows < FM_LOGIT_ROWS ? rows : FM_LOGIT_ROWS;
    PART(true, s->logits = fm_take_floats(a, s->logit_rows, c->vocab_size));
#undef PART
    a->used = most;
}

static size_t device_bytes(const fm_config *c, int64_t k, int64_t rows, int64_t *part_rows)
{
    fm_scratch s = {0};
    fm_arena measure = {NULL, 0, 0};
    take_scratch(&s, c, k, rows, &measure);
    *part_rows = s.part_rows;
    return measure.used;
}

/* Attention's scratch: a block of queries per thread, or the parts of the positions of few rows. */
static int64_t attend_floats(const fm_config *c, int64_t rows, int64_t context, int64_t n_threads)
{
    const int64_t few = rows < FM_ATTN_FEW_ROWS ? rows : FM_ATTN_FEW_ROWS, blocks = n_threads * FM_ATTN_PASS;
    const int64_t parts = n_threads > 1 ? (context + FM_ATTN_PART - 1) / FM_ATTN_PART : 0;
    const int64_t queries = parts * few * c->num_attention_heads;
    return has(c->mixers, c->num_hidden_layers, FM_MIXER_FULL)
               ? fm_attn_part_floats(c->head_dim) * (blocks > queries ? blocks : queries)
               : 0;
}

/* What the CPU backend keeps for itself: prepared inputs of the widest product, and the larger of a sum not yet added
 * and attention's scratch. */
static fm_status cpu_own_bytes(const fm_config *c, const fm_model_sizes *z, int64_t part_rows, size_t *bytes)
{
    const int64_t rows = z->max_rows;
    const int64_t inputs[] = {c->hidden_size, c->intermediate_size, c->shared_expert_intermediate_size,
                              fm_config_value_dim(c), fm_arch_dim(c, FM_DIM_ATTN)};
    size_t prepared = 0;
    for (int mode = 0; mode < FM_NUMERIC_COUNT; mode++) {
        const fm_kernels *kern;
        FM_TRY(fm_kernels_get_numeric((fm_numeric)mode, &kern));
        for (int i = 0; i < FM_COUNT(inputs); i++) {
            const size_t n = kern->act_bytes(rows, inputs[i] > 0 ? inputs[i] : 1);
            prepared = n > prepared ? n : prepared;
        }
        const size_t parts = kern->act_bytes(part_rows, c->moe_intermediate_size > 0 ? c->moe_intermediate_size : 1);
        prepared = parts > prepared ? parts : prepared;
    }
    const int64_t sum = rows * c->hidden_size, attend = attend_floats(c, rows, z->context, z->n_threads);
    *bytes = prepared + (size_t)(sum > attend ? sum : attend) * sizeof(float);
    return FM_OK;
}

fm_status fm_model_scratch_bytes(const fm_config *c, const fm_model_sizes *z, size_t *bytes)
{
    const int64_t k = z->k, max_rows = z->max_rows;
    if (max_rows < 1 || max_rows > (1 << 16))
        return fm_fail(FM_ERR_ARG, "rows per forward: %" PRId64 ", must be 1 to 65536", max_rows);
    host_lists h;
    fm_arena host = {NULL, 0, 0};
    take_host(&h, c, max_rows, &host);
    int64_t part_rows;
    size_t own;
    const size_t device = device_bytes(c, k, max_rows, &part_rows);
    FM_TRY(cpu_own_bytes(c, z, part_rows, &own));
    *bytes = device + host.used + own + fm_pipeline_bytes(c, k, max_rows);
    return FM_OK;
}

/* ---- opening ------------------------------------------------------------------------------------------ */

static void resolve_layer(fm_model *m, int32_t l)
{
    const fm_weights *w = m->weights;
    fm_layer *y = &m->layers[l];
    y->mixer = (fm_mixer)m->c.mixers[l];
    y->ffn = (fm_ffn)m->c.ffns[l];
    const struct { const fm_mat **to; int id; } mats[] = {
        {&y->q, FM_TENSOR_Q_PROJ}, {&y->k, FM_TENSOR_K_PROJ}, {&y->v, FM_TENSOR_V_PROJ}, {&y->o, FM_TENSOR_O_PROJ},
        {&y->qkv, FM_TENSOR_LIN_QKV}, {&y->z, FM_TENSOR_LIN_Z}, {&y->b, FM_TENSOR_LIN_B}, {&y->a, FM_TENSOR_LIN_A},
        {&y->out, FM_TENSOR_LIN_OUT}, {&y->router, FM_TENSOR_ROUTER},
        {&y->shared_gate_proj, FM_TENSOR_SHARED_GATE_PROJ}, {&y->shared_up_proj, FM_TENSOR_SHARED_UP_PROJ},
        {&y->shared_down_proj, FM_TENSOR_SHARED_DOWN_PROJ}, {&y->shared_gate, FM_TENSOR_SHARED_GATE},
        {&y->gate_proj, FM_TENSOR_MLP_GATE_PROJ}, {&y->up_proj, FM_TENSOR_MLP_UP_PROJ},
        {&y->down_proj, FM_TENSOR_MLP_DOWN_PROJ},
    };
    const struct { const float **to; int id; } vecs[] = {
        {&y->input_norm, FM_TENSOR_INPUT_NORM}, {&y->post_norm, FM_TENSOR_POST_NORM},
        {&y->q_bias, FM_TENSOR_Q_BIAS}, {&y->k_bias, FM_TENSOR_K_BIAS}, {&y->v_bias, FM_TENSOR_V_BIAS},
        {&y->o_bias, FM_TENSOR_O_BIAS}, {&y->q_norm, FM_TENSOR_Q_NORM}, {&y->k_norm, FM_TENSOR_K_NORM},
        {&y->conv, FM_TENSOR_LIN_CONV}, {&y->A_log, FM_TENSOR_LIN_A_LOG}, {&y->dt_bias, FM_TENSOR_LIN_DT_BIAS},
        {&y->lin_norm, FM_TENSOR_LIN_NORM}, {&y->router_bias, FM_TENSOR_ROUTER_BIAS},
    };
    for (int i = 0; i < FM_COUNT(mats); i++)
        *mats[i].to = fm_weights_mat(w, mats[i].id, l);
    for (int i = 0; i < FM_COUNT(vecs); i++)
        *vecs[i].to = fm_weights_vec(w, vecs[i].id, l);
}

static fm_status open_memory(fm_model *m)
{
    const fm_config *c = &m->c;
    host_lists h;
    fm_arena measure = {NULL, 0, 0};
    take_host(&h, c, m->max_rows, &measure);
    FM_TRY(fm_alloc(measure.used, &m->host));
    fm_arena fill = {m->host, 0, measure.used};
    take_host(&h, c, m->max_rows, &fill);
    m->layers = h.layers;
    m->inv_freq = h.inv_freq;
    m->kv = h.kv;
    m->in = h.in;
    m->out = h.out;
    int64_t part_rows;
    m->scratch_bytes = device_bytes(c, m->k, m->max_rows, &part_rows);
    FM_TRY(m->be->v->alloc(m->be, m->scratch_bytes, FM_USAGE_SCRATCH, &m->scratch));
    fm_arena device = {m->scratch, 0, m->scratch_bytes};
    take_scratch(&m->s, c, m->k, m->max_rows, &device);
    return m->experts ? fm_wave_open(c, m->k, m->max_rows, &m->wave) : FM_OK;
}

fm_status fm_model_open(const fm_arch *arch, const fm_config *c, fm_backend *be, const fm_weights *w, fm_experts *e,
                        int64_t k, int64_t max_rows, fm_model **out)
{
    *out = NULL;
    void *mem;
    FM_TRY(fm_alloc(sizeof(fm_model), &mem));
    fm_model *m = mem;
    m->c = *c;
    m->arch = arch;
    m->be = be;
    m->weights = w;
    m->experts = e;
    m->k = k;
    m->max_rows = max_rows;
    fm_status s = open_memory(m);
    if (s != FM_OK) {
        fm_model_close(m);
        return s;
    }
    for (int64_t i = 0; i < c->rotary_dim / 2; i++)
        m->inv_freq[i] = pow(c->rope_theta, -2.0 * (double)i / (double)c->rotary_dim);
    for (int32_t l = 0; l < c->num_hidden_layers; l++)
        resolve_layer(m, l);
    m->embed = fm_weights_mat(w, FM_TENSOR_EMBED, -1);
    m->head = c->tie_word_embeddings ? m->embed : fm_weights_mat(w, FM_TENSOR_LM_HEAD, -1);
    m->norm = fm_weights_vec(w, FM_TENSOR_NORM, -1);
    s = fm_pipeline_open(m);
    if (s != FM_OK) {
        fm_model_close(m);
        return s;
    }
    *out = m;
    return FM_OK;
}

void fm_model_close(fm_model *m)
{
    if (!m)
        return;
    fm_pipeline_close(m);
    fm_wave_close(m->wave);
    fm_trace_close(&m->trace);
    if (m->scratch)
        m->be->v->free(m->be, m->scratch, m->scratch_bytes, FM_USAGE_SCRATCH);
    fm_free(m->host);
    fm_free(m);
}

/* ---- forward --------------------------------------------------------------------------------------------- */

fm_status fm_run_embed(fm_model *m, const fm_batch *b)
{
    const int64_t t0 = fm_clock_ns(), L = m->c.num_hidden_layers;
    m->be->layer = -1;
    FM_TRY(m->be->v->begin(m->be));
    FM_TRY(m->be->v->embed(m->be, m->embed, b->ids, b->n_rows, m->s.x, m->c.hidden_size));
    if (b->trace_router)
        memset(b->trace_router, 0xff, (size_t)(b->n_rows * L * m->k) * sizeof(int32_t));
    FM_PHASE_END(m, embed, -1, t0);
    return FM_OK;
}

fm_status fm_run_mixer(fm_model *m, const fm_batch *b, int32_t l)
{
    const fm_layer *y = &m->layers[l];
    m->be->layer = l;
    FM_TRY(fm_norm_rows(m, y->input_norm, b->n_rows));
    FM_TRY(y->mixer == FM_MIXER_FULL ? fm_block_attn(m, b, l) : fm_block_delta(m, b, l));
    return fm_norm_rows(m, y->post_norm, b->n_rows);
}

static fm_status run_layer(fm_model *m, const fm_batch *b, int32_t l)
{
    FM_TRY(fm_run_mixer(m, b, l));
    FM_TRY(m->layers[l].ffn == FM_FFN_MOE ? fm_block_moe(m, b, l) : fm_block_mlp(m, b, l));
    FM_TRY(fm_guess_next(m, b, l));
    if (b->trace_hidden) {
        FM_TRY(m->be->v->sync(m->be));
        const int64_t H = m->c.hidden_size, L = m->c.num_hidden_layers;
        for (int64_t r = 0; r < b->n_rows; r++)
            memcpy(b->trace_hidden + (r * L + l) * H, m->s.x + r * H, (size_t)H * sizeof(float));
    }
    return FM_OK;
}

fm_status fm_check_cancel(const fm_batch *b)
{
    if (b->cancel && atomic_load_explicit(b->cancel, memory_order_relaxed))
        return fm_fail(FM_ERR_CANCELLED, "cancelled");
    return FM_OK;
}

static fm_status forward(fm_model *m, const fm_batch *b)
{
    FM_TRY(fm_run_embed(m, b));
    for (int32_t l = 0; l < m->c.num_hidden_layers; l++) {
        FM_TRY(fm_check_cancel(b));
        FM_TRY(run_layer(m, b, l));
    }
    m->be->layer = -1;
    FM_TRY(fm_head(m, b));
    return m->be->v->sync(m->be);
}

fm_status fm_model_forward(fm_model *m, const fm_batch *b)
{
    for (int i = 0; i < b->n_spans; i++)
        fm_state_begin(b->states[i]);
    const int64_t t0 = fm_clock_ns();
    FM_TRY(fm_pipeline_fits(m, b) ? fm_pipeline_forward(m, b) : forward(m, b));
    fm_trace_add(&m->trace, FM_TRACE_forward, -1, (int32_t)b->n_rows, t0, fm_clock_ns(), 0);
    for (int i = 0; i < b->n_spans; i++)
        fm_state_commit(b->states[i], b->spans[i].n);
    return FM_OK;
}
