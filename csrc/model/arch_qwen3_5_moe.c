/* Qwen3.5 / 3.6 MoE: Gated DeltaNet + gated attention, softmax router, gated shared expert. */
#include "model/arch.h"

static const fm_arch_tensor tensors[] = {
    {FM_TENSOR_COUNT, FM_AT_TOP, FM_DIM_ONE, FM_DIM_ONE, false},
};

static fm_status check(const fm_config *c)
{
    FM_TRY(fm_arch_require("qwen3_5_moe", "attn_output_gate", (double)c->attn_output_gate, 1));
    FM_TRY(fm_arch_require("qwen3_5_moe", "qk_norm", (double)c->qk_norm, FM_QK_NORM_HEAD));
    FM_TRY(fm_arch_require("qwen3_5_moe", "norm_topk_prob", (double)c->norm_topk_prob, 1));
    FM_TRY(fm_arch_require("qwen3_5_moe", "router_score", (double)c->router_score, FM_SCORE_SOFTMAX));
    FM_TRY(fm_arch_require("qwen3_5_moe", "shared_expert_gate", (double)c->shared_expert_gate, 1));
    return FM_OK;
}

const fm_arch fm_arch_qwen3_5_moe = {"qwen3_5_moe", tensors, check};
