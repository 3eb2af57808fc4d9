"""Dense Qwen3.5: the MoE family's mixers with a plain SwiGLU; small ones tie the embeddings."""

from __future__ import annotations

from flashmoe.checkpoint.arch import Architecture, ModelConfig, read_common, read_linear
from flashmoe.checkpoint.description import DENSE
from flashmoe.config import ConfigReader


def read_config(r: ConfigReader) -> ModelConfig:
    """Return the core's numbers from the text level of the config."""
    mc = read_common(r, partial=0.25)
    c = mc.core
    read_linear(r, c)
    c["intermediate_size"] = r.integer("intermediate_size", low=1)
    r.expect("mlp_only_layers", [])
    c["ffns"] = [DENSE] * c["num_hidden_layers"]
    return mc


ARCH = Architecture(
    name="qwen3_5",
    model_types=("qwen3_5", "qwen3_5_text"),
    read_config=read_config,
    zero_centred=True,
)
