/* Dense Qwen3.5: the same mixers, a plain SwiGLU in every layer. */
#include "model/arch.h"

static const fm_arch_tensor tensors[] = {
    {FM_TENSOR_COUNT, FM_AT_TOP, FM_DIM_ONE, FM_DIM_ONE, false},
};

static fm_status check(const fm_config *c)
{
    FM_TRY(fm_arch_require("qwen3_5", "attn_output_gate", (double)c->attn_output_gate, 1));
    FM_TRY(fm_arch_require("qwen3_5", "qk_norm", (double)c->qk_norm, FM_QK_NORM_HEAD));
    return FM_OK;
}

const fm_arch fm_arch_qwen3_5 = {"qwen3_5", tensors, check};
