"""Reader of MLX checkpoints: affine-quantised safetensors, experts stacked in ``switch_mlp``.

Bits and group come from the tensors' shapes; the config's ``quantization`` object is only checked.
"""

from __future__ import annotations

from typing import Any

from flashmoe.checkpoint.arch import Architecture, ModelConfig
from flashmoe.checkpoint.assemble import Assembler, QuantCheck
from flashmoe.checkpoint.description import ModelDescription
from flashmoe.checkpoint.source import TensorTable
from flashmoe.config import _show
from flashmoe.errors import ModelFileError, UnsupportedError

__all__ = ["describe", "is_mlx"]

_KEYS = ("group_size", "bits", "mode")


def _quantization(hf_config: dict[str, Any]) -> Any:
    """Return the MLX quantisation object of a config, or None."""
    for key in ("quantization", "quantization_config"):
        q = hf_config.get(key)
        if isinstance(q, dict) and "quant_method" not in q and ("bits" in q or "mode" in q):
            return q
    return None


def is_mlx(table: TensorTable, hf_config: dict[str, Any]) -> bool:
    """Tell whether a checkpoint was written by MLX (quantised or not)."""
    return (
        _quantization(hf_config) is not None
        or table.metadata.get("format") == "mlx"
        or any(".switch_mlp." in n or n.endswith(".scales") for n in table.tensors)
    )


def describe(
    table: TensorTable, arch: Architecture, mc: ModelConfig, hf_config: dict[str, Any]
) -> ModelDescription:
    """Return the description of an MLX checkpoint."""
    where = str(table.directory / "config.json")
    check = _overrides(_quantization(hf_config), where)
    a = Assembler(table, arch, mc, shifted_by_default=True, check_quant=check)
    return a.build(hf_config, "mlx")


def _overrides(q: dict[str, Any] | None, where: str) -> QuantCheck | None:
    """Return a check of each tensor against the config's overrides; refuse non-affine modes."""
    if q is None:
        return None
    overrides: dict[str, tuple[int, int]] = {}
    default_group = q.get("group_size")
    for path, v in [("quantization", q), *((k, v) for k, v in q.items() if k not in _KEYS)]:
        if isinstance(v, bool):
            if not v:
                overrides[path] = (0, 0)
            continue
        if not isinstance(v, dict):
            raise ModelFileError(f"{where}: quantization: {path!r} is {_show(v)}, not an object")
        mode = v.get("mode", "affine")
        if mode != "affine":
            raise UnsupportedError(
                f"{where}: quantization mode {_show(mode)} of {path!r}; supported: 'affine'"
            )
        if path == "quantization":
            continue
        bits, group = v.get("bits"), v.get("group_size", default_group)
        if type(bits) is not int or type(group) is not int:
            raise ModelFileError(
                f"{where}: quantization of {path!r}: bits {_show(bits)}, group_size {_show(group)}"
            )
        overrides[path] = (bits, group)

    def check(base: str, bits: int, group: int) -> None:
        want = overrides.get(base)
        if want is not None and want != (bits, group):
            got = f"{bits} bits, group {group}" if bits else "not quantised"
            said = f"{want[0]} bits, group {want[1]}" if want[0] else "not quantised"
            raise ModelFileError(f"{where}: {base!r} is {said} there, but {got} by its tensors")

    return check
