"""Sizes of the weight formats; the layout is ``csrc/quant/quant.h`` and ``docs/format.md``."""

from __future__ import annotations

from flashmoe.checkpoint.description import ExpertRole

__all__ = ["AFFINE_BITS", "GROUPS", "PLAIN_BYTES", "area_bytes", "bits_of", "check_format",
           "role_bytes"]  # fmt: skip

PLAIN_BYTES = {"f32": 4, "f16": 2, "bf16": 2}
AFFINE_BITS = (2, 3, 4, 5, 6, 8)
GROUPS = (16, 32, 64, 128)
_AFFINE = {f"affine{b}": b for b in AFFINE_BITS}


def bits_of(fmt: str) -> int:
    """Return the bits per weight of an affine format, 0 for a plain one."""
    return _AFFINE.get(fmt, 0)


def check_format(fmt: str, group: int, scale_format: str, n_cols: int) -> str:
    """Return "" if the combination is legal for rows of `n_cols` weights, else what is wrong."""
    if fmt in PLAIN_BYTES:
        return "" if group == 0 else f"plain format {fmt} with group {group}"
    if fmt not in _AFFINE:
        return f"unknown format {fmt!r}"
    if group not in GROUPS:
        return f"group {group} is not one of {GROUPS}"
    if scale_format not in PLAIN_BYTES:
        return f"unknown scale format {scale_format!r}"
    if n_cols % group:
        return f"{n_cols} columns are not a multiple of group {group}"
    return ""


def area_bytes(
    fmt: str, group: int, scale_format: str, n_rows: int, n_cols: int
) -> tuple[int, ...]:
    """Return the bytes of (codes,) or (codes, scales, biases) of a matrix."""
    bits = bits_of(fmt)
    if not bits:
        return (n_rows * n_cols * PLAIN_BYTES[fmt],)
    scales = n_rows * (n_cols // group) * PLAIN_BYTES[scale_format]
    return (n_rows * n_cols * bits // 8, scales, scales)


def role_bytes(r: ExpertRole) -> tuple[int, ...]:
    """Return the bytes of the areas of one of an expert's matrices."""
    return area_bytes(r.format, r.group, r.scale_format, r.n_rows, r.n_cols)
