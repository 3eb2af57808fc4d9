"""Reader of Hugging Face checkpoints: plain F32, F16 or BF16 safetensors."""

from __future__ import annotations

from typing import Any

from flashmoe.checkpoint.arch import Architecture, ModelConfig
from flashmoe.checkpoint.assemble import Assembler
from flashmoe.checkpoint.description import ModelDescription
from flashmoe.checkpoint.source import TensorTable

__all__ = ["describe"]


def describe(
    table: TensorTable, arch: Architecture, mc: ModelConfig, hf_config: dict[str, Any]
) -> ModelDescription:
    """Return the description of a Hugging Face checkpoint.

    Norms hold w (1 + w is applied) unless ``conv1d`` is in the converted (C, k, 1) form.
    """
    return Assembler(table, arch, mc).build(hf_config, "hf")
