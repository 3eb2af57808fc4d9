"""Qwen3.5 and Qwen3.6 MoE: Gated DeltaNet and gated attention, softmax router, shared expert."""

from __future__ import annotations

from flashmoe.checkpoint.arch import (
    Architecture,
    ModelConfig,
    read_common,
    read_experts,
    read_linear,
)
from flashmoe.checkpoint.description import MOE
from flashmoe.config import ConfigReader


def read_config(r: ConfigReader) -> ModelConfig:
    """Return the core's numbers from the text level of the config."""
    mc = read_common(r, partial=0.25)
    c = mc.core
    read_linear(r, c)
    read_experts(r, c, n="num_experts", width="moe_intermediate_size")
    c["shared_expert_intermediate_size"] = r.integer("shared_expert_intermediate_size", low=1)
    c["shared_expert_gate"] = 1
    c["norm_topk_prob"] = 1  # not a field of this family: always renormalised
    r.expect("norm_topk_prob", True)
    r.expect("mlp_only_layers", [])
    r.expect("decoder_sparse_step", 1)
    r.ignore("intermediate_size")
    c["ffns"] = [MOE] * c["num_hidden_layers"]
    return mc


ARCH = Architecture(
    name="qwen3_5_moe",
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    read_config=read_config,
    zero_centred=True,
)
