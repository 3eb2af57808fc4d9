/* GLM-4.5: sigmoid router with a choice bias, q/k/v biases, ungated shared expert, dense first layers. */
#include "model/arch.h"

static const fm_arch_tensor tensors[] = {
    {FM_TENSOR_Q_BIAS, FM_AT_FULL, FM_DIM_ONE, FM_DIM_ATTN, true},
    {FM_TENSOR_K_BIAS, FM_AT_FULL, FM_DIM_ONE, FM_DIM_KV, true},
    {FM_TENSOR_V_BIAS, FM_AT_FULL, FM_DIM_ONE, FM_DIM_KV, true},
    {FM_TENSOR_ROUTER_BIAS, FM_AT_MOE, FM_DIM_ONE, FM_DIM_EXPERTS, false},
    {FM_TENSOR_COUNT, FM_AT_TOP, FM_DIM_ONE, FM_DIM_ONE, false},
};

static fm_status check(const fm_config *c)
{
    FM_TRY(fm_arch_require("glm4_moe", "attn_output_gate", (double)c->attn_output_gate, 0));
    FM_TRY(fm_arch_require("glm4_moe", "router_score", (double)c->router_score, FM_SCORE_SIGMOID));
    FM_TRY(fm_arch_require("glm4_moe", "shared_expert_gate", (double)c->shared_expert_gate, 0));
    return FM_OK;
}

const fm_arch fm_arch_glm4_moe = {"glm4_moe", tensors, check};
