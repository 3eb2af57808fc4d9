"""Mixtral: full attention, experts named w1 (gate), w3 (up), w2 (down)."""

from __future__ import annotations

from flashmoe.checkpoint.arch import Architecture, ModelConfig, all_full, read_common, read_experts
from flashmoe.checkpoint.description import MOE
from flashmoe.config import ConfigReader


def read_config(r: ConfigReader) -> ModelConfig:
    """Return the core's numbers."""
    mc = read_common(r, partial=1)
    c = mc.core
    all_full(r, c)
    read_experts(r, c, n="num_local_experts", width="intermediate_size")
    c["norm_topk_prob"] = 1  # always renormalised
    c["ffns"] = [MOE] * c["num_hidden_layers"]
    r.expect("sliding_window", why="sliding-window attention is not implemented")
    return mc


ARCH = Architecture(
    name="mixtral",
    model_types=("mixtral",),
    read_config=read_config,
    moe="block_sparse_moe",
    expert_names=("w1", "w3", "w2"),
)
