/* Range checks of the model's numbers. */
#include "model/config.h"

#include <inttypes.h>
#include <math.h>

static fm_status check_field(const char *name, double v, double low, double high)
{
    if (!isfinite(v) || v < low || v > high)
        return fm_fail(FM_ERR_FORMAT, "config: %s is %g, must be in [%g, %g]", name, v, low, high);
    return FM_OK;
}

static fm_status check_linear(const fm_config *c)
{
    if (c->linear_num_key_heads < 1 || c->linear_num_value_heads < 1 || c->linear_key_head_dim < 1 ||
        c->linear_value_head_dim < 1 || c->linear_conv_kernel_dim < 1)
        return fm_fail(FM_ERR_FORMAT, "config: linear-attention layers need linear_* sizes of at least 1");
    if (c->linear_num_value_heads % c->linear_num_key_heads != 0)
        return fm_fail(FM_ERR_FORMAT,
                       "config: linear_num_value_heads %" PRId64 " is no multiple of linear_num_key_heads %" PRId64,
                       c->linear_num_value_heads, c->linear_num_key_heads);
    return FM_OK;
}

static fm_status check_moe(const fm_config *c)
{
    if (c->num_experts < 1 || c->num_experts_per_tok < 1 || c->moe_intermediate_size < 1)
        return fm_fail(FM_ERR_FORMAT,
                       "config: MoE layers need num_experts, num_experts_per_tok and moe_intermediate_size >= 1");
    if (c->num_experts_per_tok > c->num_experts)
        return fm_fail(FM_ERR_FORMAT, "config: num_experts_per_tok %" PRId64 " of num_experts %" PRId64,
                       c->num_experts_per_tok, c->num_experts);
    if (c->n_group > 1) {
        if (c->num_experts % c->n_group != 0 || c->topk_group < 1 || c->topk_group > c->n_group || c->n_group > 256)
            return fm_fail(FM_ERR_FORMAT, "config: n_group %" PRId64 " with topk_group %" PRId64 ", num_experts %" PRId64,
                           c->n_group, c->topk_group, c->num_experts);
        if (c->num_experts / c->n_group * c->topk_group < c->num_experts_per_tok)
            return fm_fail(FM_ERR_FORMAT, "config: the %" PRId64 " chosen groups hold fewer than %" PRId64 " experts",
                           c->topk_group, c->num_experts_per_tok);
    }
    return FM_OK;
}

fm_status fm_config_check(const fm_config *c)
{
#define X(type, name, low, high) FM_TRY(check_field(#name, (double)c->name, (double)(low), (double)(high)));
    FM_CONFIG_LIST(X)
#undef X
    if (c->num_attention_heads % c->num_key_value_heads != 0)
        return fm_fail(FM_ERR_FORMAT,
                       "config: num_attention_heads %" PRId64 " is no multiple of num_key_value_heads %" PRId64,
                       c->num_attention_heads, c->num_key_value_heads);
    if (c->rotary_dim % 2 != 0 || c->rotary_dim > c->head_dim)
        return fm_fail(FM_ERR_FORMAT, "config: rotary_dim %" PRId64 " must be even and at most head_dim %" PRId64,
                       c->rotary_dim, c->head_dim);
    for (int64_t l = 0; l < c->num_hidden_layers; l++) {
        if (c->mixers[l] == FM_MIXER_LINEAR)
            FM_TRY(check_linear(c));
        else if (c->mixers[l] != FM_MIXER_FULL)
            return fm_fail(FM_ERR_FORMAT, "config: layer %" PRId64 " has mixer %d", l, c->mixers[l]);
        if (c->ffns[l] == FM_FFN_MOE)
            FM_TRY(check_moe(c));
        else if (c->ffns[l] != FM_FFN_DENSE)
            return fm_fail(FM_ERR_FORMAT, "config: layer %" PRId64 " has ffn %d", l, c->ffns[l]);
        else if (c->intermediate_size < 1)
            return fm_fail(FM_ERR_FORMAT, "config: dense layer %" PRId64 " needs intermediate_size", l);
    }
    return FM_OK;
}
