"""OLMoE: q/k norm over the whole projection, router weights not renormalised."""

from __future__ import annotations

from flashmoe.checkpoint.arch import Architecture, ModelConfig, all_full, read_common, read_experts
from flashmoe.checkpoint.description import MOE
from flashmoe.config import ConfigReader


def read_config(r: ConfigReader) -> ModelConfig:
    """Return the core's numbers."""
    mc = read_common(r, partial=1)
    c = mc.core
    all_full(r, c)
    c["qk_norm"] = 2
    c["clip_qkv"] = r.number("clip_qkv", 0.0)
    read_experts(r, c, n="num_experts", width="intermediate_size")
    c["norm_topk_prob"] = int(r.flag("norm_topk_prob", False))
    c["ffns"] = [MOE] * c["num_hidden_layers"]
    return mc


ARCH = Architecture(name="olmoe", model_types=("olmoe",), read_config=read_config)
