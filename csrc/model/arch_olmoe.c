/* OLMoE: q and k normed over the whole projection, router not renormalised by default. */
#include "model/arch.h"

static const fm_arch_tensor tensors[] = {
    {FM_TENSOR_COUNT, FM_AT_TOP, FM_DIM_ONE, FM_DIM_ONE, false},
};

static fm_status check(const fm_config *c)
{
    FM_TRY(fm_arch_require("olmoe", "attn_output_gate", (double)c->attn_output_gate, 0));
    FM_TRY(fm_arch_require("olmoe", "qk_norm", (double)c->qk_norm, FM_QK_NORM_FLAT));
    FM_TRY(fm_arch_require("olmoe", "router_score", (double)c->router_score, FM_SCORE_SOFTMAX));
    FM_TRY(fm_arch_require("olmoe", "shared_expert_intermediate_size", (double)c->shared_expert_intermediate_size, 0));
    return FM_OK;
}

const fm_arch fm_arch_olmoe = {"olmoe", tensors, check};
