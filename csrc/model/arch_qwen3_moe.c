/* Qwen3-MoE: full rotary attention with per-head norms, softmax router, no shared expert. */
#include "model/arch.h"

static const fm_arch_tensor tensors[] = {
    {FM_TENSOR_COUNT, FM_AT_TOP, FM_DIM_ONE, FM_DIM_ONE, false},
};

static fm_status check(const fm_config *c)
{
    FM_TRY(fm_arch_require("qwen3_moe", "attn_output_gate", (double)c->attn_output_gate, 0));
    FM_TRY(fm_arch_require("qwen3_moe", "qk_norm", (double)c->qk_norm, FM_QK_NORM_HEAD));
    FM_TRY(fm_arch_require("qwen3_moe", "router_score", (double)c->router_score, FM_SCORE_SOFTMAX));
    FM_TRY(fm_arch_require("qwen3_moe", "shared_expert_intermediate_size", (double)c->shared_expert_intermediate_size, 0));
    return FM_OK;
}

const fm_arch fm_arch_qwen3_moe = {"qwen3_moe", tensors, check};
