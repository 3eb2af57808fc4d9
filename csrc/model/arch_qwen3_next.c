/* Qwen3-Next: as Qwen3.5 MoE; its interleaved projections are put in order by the reader. */
#include "model/arch.h"

static const fm_arch_tensor tensors[] = {
    {FM_TENSOR_COUNT, FM_AT_TOP, FM_DIM_ONE, FM_DIM_ONE, false},
};

static fm_status check(const fm_config *c)
{
    FM_TRY(fm_arch_require("qwen3_next", "attn_output_gate", (double)c->attn_output_gate, 1));
    FM_TRY(fm_arch_require("qwen3_next", "qk_norm", (double)c->qk_norm, FM_QK_NORM_HEAD));
    FM_TRY(fm_arch_require("qwen3_next", "router_score", (double)c->router_score, FM_SCORE_SOFTMAX));
    return FM_OK;
}

const fm_arch fm_arch_qwen3_next = {"qwen3_next", tensors, check};
