"""Configurations of published models, as their ``config.json`` has them, without any weights.

Only what the readers need is kept.  ``tests/test_perf_geometry.py`` compares the parameter counts
that follow from them with the published ones.
"""

from __future__ import annotations

import re
from typing import Any

from flashmoe.config import nearest
from flashmoe.errors import ArgumentError

__all__ = ["ALIASES", "CONFIGS", "known_model"]


def _qwen3_5(hidden: int, layers: int, heads: int, value_heads: int, experts: int, k: int,
             width: int) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": "qwen3_5_moe_text", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": value_heads,
        "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
        "num_experts": experts, "num_experts_per_tok": k, "moe_intermediate_size": width,
        "shared_expert_intermediate_size": width, "vocab_size": 248320, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "max_position_embeddings": 262144, "hidden_act": "silu",
        "full_attention_interval": 4, "attn_output_gate": True, "attention_bias": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000000.0,
                            "partial_rotary_factor": 0.25},
    }  # fmt: skip


def _qwen3(hidden: int, layers: int, heads: int, width: int) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": width,
        "vocab_size": 151936, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "max_position_embeddings": 40960, "hidden_act": "silu", "rope_theta": 1000000.0,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "attention_bias": False,
    }  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3.5-35b-a3b": _qwen3_5(2048, 40, 16, 32, 256, 8, 512),
    "qwen3.5-122b-a10b": _qwen3_5(3072, 48, 32, 64, 256, 8, 1024),
    "qwen3.5-397b-a17b": _qwen3_5(4096, 60, 32, 64, 512, 10, 1024),
    "qwen3-30b-a3b": _qwen3(2048, 48, 32, 768),
    "qwen3-235b-a22b": _qwen3(4096, 94, 64, 1536),
    "qwen3-next-80b-a3b": {
        "model_type": "qwen3_next", "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
        "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": 512,
        "num_experts_per_tok": 10, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "vocab_size": 151936, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "max_position_embeddings": 262144, "hidden_act": "silu",
        "full_attention_interval": 4, "attention_bias": False, "norm_topk_prob": True,
        "decoder_sparse_step": 1, "mlp_only_layers": [], "rope_theta": 10000000.0,
        "partial_rotary_factor": 0.25, "intermediate_size": 5120,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral", "hidden_size": 4096, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "intermediate_size": 14336, "num_local_experts": 8, "num_experts_per_tok": 2,
        "vocab_size": 32000, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "max_position_embeddings": 32768, "hidden_act": "silu", "rope_theta": 1000000.0,
        "sliding_window": None,
    },
    "olmoe-1b-7b": {
        "model_type": "olmoe", "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 1024,
        "num_experts": 64, "num_experts_per_tok": 8, "vocab_size": 50304, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "max_position_embeddings": 4096, "hidden_act": "silu",
        "rope_theta": 10000.0, "norm_topk_prob": False, "attention_bias": False, "clip_qkv": None,
    },
}  # fmt: skip
"""Name to ``config.json``."""

ALIASES = {
    "35b": "qwen3.5-35b-a3b",
    "122b": "qwen3.5-122b-a10b",
    "397b": "qwen3.5-397b-a17b",
    "30b": "qwen3-30b-a3b",
    "235b": "qwen3-235b-a22b",
    "80b": "qwen3-next-80b-a3b",
    "mixtral": "mixtral-8x7b",
    "olmoe": "olmoe-1b-7b",
}
"""Short names."""


def known_model(name: str) -> tuple[str, dict[str, Any]]:
    """Return the full name and a copy of the config of a known model.

    ``"35b-12layers"`` is the same model with so many layers.

    >>> known_model("397b")[1]["num_experts"], known_model("35b-12layers")[0]
    (512, 'qwen3.5-35b-a3b-12layers')
    """
    base, n_layers = name.lower(), None
    cut = re.fullmatch(r"(.+?)-(\d+)-?layers?", base)
    if cut:
        base, n_layers = cut[1], int(cut[2])
    base = ALIASES.get(base, base)
    if base not in CONFIGS:
        known = sorted({*CONFIGS, *ALIASES})
        raise ArgumentError(f"unknown model {name!r}{nearest(base, known)}; known: "
                            + ", ".join(known))  # fmt: skip
    config = dict(CONFIGS[base])
    if n_layers is None:
        return base, config
    if not 1 <= n_layers <= 1024:
        raise ArgumentError(f"{name}: {n_layers} layers; 1 to 1024 are possible")
    config["num_hidden_layers"] = n_layers
    return f"{base}-{n_layers}layers", config
