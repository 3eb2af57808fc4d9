/* Finding architectures; checking a description against the tables of the blocks that its config names. */
#include "model/arch.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"

#define X(name) extern const fm_arch fm_arch_##name;
FM_ARCH_LIST(X)
#undef X

static const fm_arch *const archs[] = {
#define X(name) &fm_arch_##name,
    FM_ARCH_LIST(X)
#undef X
};

const char *fm_arch_name(int i) { return i >= 0 && i < FM_COUNT(archs) ? archs[i]->name : NULL; }

fm_status fm_arch_find(const char *name, const fm_arch **out)
{
    for (int i = 0; i < FM_COUNT(archs); i++)
        if (strcmp(name, archs[i]->name) == 0) {
            *out = archs[i];
            return FM_OK;
        }
    char have[256] = "";
    for (int i = 0; i < FM_COUNT(archs); i++) {
        strncat(have, " ", sizeof have - strlen(have) - 1);
        strncat(have, archs[i]->name, sizeof have - strlen(have) - 1);
    }
    return fm_fail(FM_ERR_UNSUPPORTED, "architecture '%s' is not known; there are:%s", name, have);
}

/* The tables of the common blocks; tensors that only some families have are optional here and required or
 * forbidden by the rules in needed(). */
static const fm_arch_tensor common[] = {
    {FM_TENSOR_EMBED, FM_AT_TOP, FM_DIM_VOCAB, FM_DIM_HIDDEN, false},
    {FM_TENSOR_NORM, FM_AT_TOP, FM_DIM_ONE, FM_DIM_HIDDEN, false},
    {FM_TENSOR_LM_HEAD, FM_AT_TOP, FM_DIM_VOCAB, FM_DIM_HIDDEN, false},
    {FM_TENSOR_INPUT_NORM, FM_AT_EVERY, FM_DIM_ONE, FM_DIM_HIDDEN, false},
    {FM_TENSOR_POST_NORM, FM_AT_EVERY, FM_DIM_ONE, FM_DIM_HIDDEN, false},
    {FM_TENSOR_Q_PROJ, FM_AT_FULL, FM_DIM_Q, FM_DIM_HIDDEN, false},
    {FM_TENSOR_K_PROJ, FM_AT_FULL, FM_DIM_KV, FM_DIM_HIDDEN, false},
    {FM_TENSOR_V_PROJ, FM_AT_FULL, FM_DIM_KV, FM_DIM_HIDDEN, false},
    {FM_TENSOR_O_PROJ, FM_AT_FULL, FM_DIM_HIDDEN, FM_DIM_ATTN, false},
    {FM_TENSOR_Q_NORM, FM_AT_FULL, FM_DIM_ONE, FM_DIM_Q_NORM, false},
    {FM_TENSOR_K_NORM, FM_AT_FULL, FM_DIM_ONE, FM_DIM_K_NORM, false},
    {FM_TENSOR_LIN_QKV, FM_AT_LINEAR, FM_DIM_CONV, FM_DIM_HIDDEN, false},
    {FM_TENSOR_LIN_Z, FM_AT_LINEAR, FM_DIM_VALUE, FM_DIM_HIDDEN, false},
    {FM_TENSOR_LIN_B, FM_AT_LINEAR, FM_DIM_V_HEADS, FM_DIM_HIDDEN, false},
    {FM_TENSOR_LIN_A, FM_AT_LINEAR, FM_DIM_V_HEADS, FM_DIM_HIDDEN, false},
    {FM_TENSOR_LIN_CONV, FM_AT_LINEAR, FM_DIM_ONE, FM_DIM_CONV_TAPS, false},
    {FM_TENSOR_LIN_A_LOG, FM_AT_LINEAR, FM_DIM_ONE, FM_DIM_V_HEADS, false},
    {FM_TENSOR_LIN_DT_BIAS, FM_AT_LINEAR, FM_DIM_ONE, FM_DIM_V_HEADS, false},
    {FM_TENSOR_LIN_NORM, FM_AT_LINEAR, FM_DIM_ONE, FM_DIM_V_HEAD_DIM, false},
    {FM_TENSOR_LIN_OUT, FM_AT_LINEAR, FM_DIM_HIDDEN, FM_DIM_VALUE, false},
    {FM_TENSOR_ROUTER, FM_AT_MOE, FM_DIM_EXPERTS, FM_DIM_HIDDEN, false},
    {FM_TENSOR_SHARED_GATE_PROJ, FM_AT_MOE, FM_DIM_SHARED, FM_DIM_HIDDEN, false},
    {FM_TENSOR_SHARED_UP_PROJ, FM_AT_MOE, FM_DIM_SHARED, FM_DIM_HIDDEN, false},
    {FM_TENSOR_SHARED_DOWN_PROJ, FM_AT_MOE, FM_DIM_HIDDEN, FM_DIM_SHARED, false},
    {FM_TENSOR_SHARED_GATE, FM_AT_MOE, FM_DIM_ONE, FM_DIM_HIDDEN, false},
    {FM_TENSOR_MLP_GATE_PROJ, FM_AT_DENSE, FM_DIM_DENSE, FM_DIM_HIDDEN, false},
    {FM_TENSOR_MLP_UP_PROJ, FM_AT_DENSE, FM_DIM_DENSE, FM_DIM_HIDDEN, false},
    {FM_TENSOR_MLP_DOWN_PROJ, FM_AT_DENSE, FM_DIM_HIDDEN, FM_DIM_DENSE, false},
    {FM_TENSOR_COUNT, FM_AT_TOP, FM_DIM_ONE, FM_DIM_ONE, false},
};

int64_t fm_arch_dim(const fm_config *c, fm_dim dim)
{
    const int64_t q = c->num_attention_heads * c->head_dim, kv = c->num_key_value_heads * c->head_dim;
    const bool flat = c->qk_norm == FM_QK_NORM_FLAT;
    switch (dim) {
    case FM_DIM_ONE: return 1;
    case FM_DIM_VOCAB: return c->vocab_size;
    case FM_DIM_HIDDEN: return c->hidden_size;
    case FM_DIM_Q: return c->attn_output_gate ? 2 * q : q;
    case FM_DIM_ATTN: return q;
    case FM_DIM_KV: return kv;
    case FM_DIM_Q_NORM: return flat ? q : c->head_dim;
    case FM_DIM_K_NORM: return flat ? kv : c->head_dim;
    case FM_DIM_CONV: return fm_config_conv_dim(c);
    case FM_DIM_CONV_TAPS: return fm_config_conv_dim(c) * c->linear_conv_kernel_dim;
    case FM_DIM_VALUE: return fm_config_value_dim(c);
    case FM_DIM_V_HEADS: return c->linear_num_value_heads;
    case FM_DIM_V_HEAD_DIM: return c->linear_value_head_dim;
    case FM_DIM_EXPERTS: return c->num_experts;
    case FM_DIM_SHARED: return c->shared_expert_intermediate_size;
    case FM_DIM_DENSE: return c->intermediate_size;
    }
    return 0;
}

static bool at(const fm_config *c, fm_place place, int32_t layer)
{
    if (place == FM_AT_TOP || layer < 0)
        return place == FM_AT_TOP && layer < 0;
    return place == FM_AT_EVERY || (place == FM_AT_FULL && c->mixers[layer] == FM_MIXER_FULL) ||
           (place == FM_AT_LINEAR && c->mixers[layer] == FM_MIXER_LINEAR) ||
           (place == FM_AT_MOE && c->ffns[layer] == FM_FFN_MOE) ||
           (place == FM_AT_DENSE && c->ffns[layer] == FM_FFN_DENSE);
}

/* Config rules that take a common tensor out. */
static bool applies(const fm_config *c, fm_tensor_id id)
{
    switch (id) {
    case FM_TENSOR_LM_HEAD: return !c->tie_word_embeddings;
    case FM_TENSOR_Q_NORM:
    case FM_TENSOR_K_NORM: return c->qk_norm != FM_QK_NORM_NONE;
    case FM_TENSOR_SHARED_GATE_PROJ:
    case FM_TENSOR_SHARED_UP_PROJ:
    case FM_TENSOR_SHARED_DOWN_PROJ: return c->shared_expert_intermediate_size > 0;
    case FM_TENSOR_SHARED_GATE: return c->shared_expert_intermediate_size > 0 && c->shared_expert_gate;
    default: return true;
    }
}

typedef struct check_ctx {
    const fm_arch *arch;
    const fm_config *c;
    const fm_model_desc *d;
    const fm_tensor_desc **found; /* [(n_layers + 1) * FM_TENSOR_COUNT], row layer + 1 */
    int64_t n_used;
} check_ctx;

static fm_status check_table(check_ctx *x, const fm_arch_tensor *table, int32_t layer)
{
    for (; table->id != FM_TENSOR_COUNT; table++) {
        if (!at(x->c, table->place, layer) || !applies(x->c, table->id))
            continue;
        const fm_tensor_desc *t = x->found[(layer + 1) * FM_TENSOR_COUNT + (int)table->id];
        if (!t && table->optional)
            continue;
        if (!t)
            return fm_fail(FM_ERR_FORMAT, "%s: layer %d: tensor '%s' is missing", x->arch->name, layer,
                           fm_tensor_name((int)table->id));
        const int64_t rows = fm_arch_dim(x->c, table->rows), cols = fm_arch_dim(x->c, table->cols);
        if (t->format.n_rows != rows || t->format.n_cols != cols)
            return fm_fail(FM_ERR_FORMAT,
                           "%s: shape [%" PRId64 ", %" PRId64 "], the config needs [%" PRId64 ", %" PRId64 "]", t->source,
                           t->format.n_rows, t->format.n_cols, rows, cols);
        x->n_used++;
    }
    return FM_OK;
}

static fm_status check_expert_layers(const check_ctx *x)
{
    const fm_config *c = x->c;
    int64_t next = 0;
    for (int32_t l = 0; l < c->num_hidden_layers; l++) {
        if (c->ffns[l] != FM_FFN_MOE)
            continue;
        if (next >= x->d->n_expert_layers || x->d->experts[next].layer != l)
            return fm_fail(FM_ERR_FORMAT, "%s: layer %d: its experts are missing", x->arch->name, l);
        const fm_expert_desc *e = &x->d->experts[next++];
        const fm_format *g = &e->role[FM_ROLE_GATE];
        if (e->n_experts != c->num_experts)
            return fm_fail(FM_ERR_FORMAT, "layer %d: %" PRId64 " experts, num_experts is %" PRId64, l, e->n_experts,
                           c->num_experts);
        if (g->n_rows != c->moe_intermediate_size || g->n_cols != c->hidden_size)
            return fm_fail(FM_ERR_FORMAT,
                           "layer %d: experts' gate is [%" PRId64 ", %" PRId64 "], the config needs [%" PRId64
                           ", %" PRId64 "]",
                           l, g->n_rows, g->n_cols, c->moe_intermediate_size, c->hidden_size);
    }
    if (next != x->d->n_expert_layers)
        return fm_fail(FM_ERR_FORMAT, "layer %d has experts, but the config says it is dense or absent",
                       x->d->experts[next].layer);
    return FM_OK;
}

static fm_status check_tables(check_ctx *x)
{
    const int64_t L = x->c->num_hidden_layers;
    for (int64_t i = 0; i < x->d->n_tensors; i++) {
        const fm_tensor_desc *t = &x->d->tensors[i];
        if (t->layer >= L)
            return fm_fail(FM_ERR_FORMAT, "%s: layer %d of %" PRId64, t->source, t->layer, L);
        x->found[(t->layer + 1) * FM_TENSOR_COUNT + t->id] = t;
    }
    for (int32_t l = -1; l < L; l++) {
        FM_TRY(check_table(x, common, l));
        FM_TRY(check_table(x, x->arch->tensors, l));
    }
    if (x->n_used != x->d->n_tensors)
        return fm_fail(FM_ERR_FORMAT, "%s: %" PRId64 " tensors are given, %" PRId64 " are used", x->arch->name,
                       x->d->n_tensors, x->n_used);
    return check_expert_layers(x);
}

fm_status fm_arch_check(const fm_arch *arch, const fm_config *c, const fm_model_desc *d)
{
    FM_TRY(fm_config_check(c));
    FM_TRY(arch->check(c));
    void *mem;
    FM_TRY(fm_alloc((size_t)(c->num_hidden_layers + 1) * FM_TENSOR_COUNT * sizeof(void *), &mem));
    check_ctx x = {arch, c, d, mem, 0};
    const fm_status s = check_tables(&x);
    fm_free(mem);
    return s;
}

fm_status fm_arch_require(const char *arch, const char *field, double have, double want)
{
    if (have == want)
        return FM_OK;
    return fm_fail(FM_ERR_FORMAT, "%s: %s is %g, this architecture has %g", arch, field, have, want);
}
