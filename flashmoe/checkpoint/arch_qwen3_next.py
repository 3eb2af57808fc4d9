"""Qwen3-Next and Qwen3-Coder-Next: Qwen3.5's blocks with interleaved linear projections."""

from __future__ import annotations

from flashmoe.checkpoint.arch import (
    Architecture,
    ModelConfig,
    read_common,
    read_experts,
    read_linear,
    read_sparse_layers,
)
from flashmoe.config import ConfigReader


def read_config(r: ConfigReader) -> ModelConfig:
    """Return the core's numbers."""
    mc = read_common(r, partial=0.25)
    c = mc.core
    read_linear(r, c)
    read_sparse_layers(r, c)
    read_experts(r, c, n="num_experts", width="moe_intermediate_size")
    c["shared_expert_intermediate_size"] = r.integer("shared_expert_intermediate_size", low=1)
    c["shared_expert_gate"] = 1
    c["norm_topk_prob"] = int(r.flag("norm_topk_prob", True))
    return mc


ARCH = Architecture(
    name="qwen3_next",
    model_types=("qwen3_next",),
    read_config=read_config,
    zero_centred=True,
    interleaved=True,
)
