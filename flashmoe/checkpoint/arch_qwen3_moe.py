"""Qwen3-MoE (30B-A3B, 235B-A22B): full attention with per-head q/k norm, no shared expert."""

from __future__ import annotations

from flashmoe.checkpoint.arch import (
    Architecture,
    ModelConfig,
    all_full,
    no_sliding_window,
    read_common,
    read_experts,
    read_sparse_layers,
)
from flashmoe.config import ConfigReader


def read_config(r: ConfigReader) -> ModelConfig:
    """Return the core's numbers."""
    mc = read_common(r, partial=1)
    c = mc.core
    all_full(r, c)
    c["qk_norm"] = 1
    read_sparse_layers(r, c)
    read_experts(r, c, n="num_experts", width="moe_intermediate_size")
    # The class default; every release has the field and says true.
    c["norm_topk_prob"] = int(r.flag("norm_topk_prob", False))
    no_sliding_window(r)
    return mc


ARCH = Architecture(name="qwen3_moe", model_types=("qwen3_moe",), read_config=read_config)
