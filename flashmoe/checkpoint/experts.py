"""Where the routed experts of a layer lie, in any of the four layouts that exist.

Stacked per role (MLX ``switch_mlp``), fused gate and up (``experts.gate_up_proj``), one by one, and
one by one with gate and up fused.  Works out offsets only; matrices come from the assembler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from flashmoe.checkpoint.description import ExpertDesc
from flashmoe.errors import ModelFileError, UnsupportedError

if TYPE_CHECKING:
    from flashmoe.checkpoint.assemble import Assembler, Matrix

__all__ = ["describe_experts"]


def describe_experts(a: Assembler, layer: int) -> ExpertDesc:
    """Return the experts of one layer, whichever of the four layouts they are in."""
    c, tensors = a.mc.core, a.table.tensors
    p = f"{a.prefix}layers.{layer}.{a.arch.moe}."
    e, i, h = c["num_experts"], c["moe_intermediate_size"], c["hidden_size"]
    gate, up, down = a.arch.expert_names
    if f"{p}switch_mlp.gate_proj.weight" in tensors:
        stacks = [
            a.matrix(f"{p}switch_mlp.{x}.weight", (e, *shape))
            for x, shape in (("gate_proj", (i, h)), ("up_proj", (i, h)), ("down_proj", (h, i)))
        ]
        columns = [_stack_columns(m, e, 0, 1) for m in stacks]
        return _expert_desc(layer, stacks, columns, (i, h))
    if f"{p}experts.gate_up_proj" in tensors:
        both = a.matrix(f"{p}experts.gate_up_proj", (e, 2 * i, h))
        last = a.matrix(f"{p}experts.down_proj", (e, h, i))
        columns = [_stack_columns(both, e, 0, 2), _stack_columns(both, e, 1, 2),
                   _stack_columns(last, e, 0, 1)]  # fmt: skip
        return _expert_desc(layer, [both, both, last], columns, (i, h))
    x = p + "experts.{}."
    if f"{p}experts.0.gate_up_proj.weight" in tensors:
        both2 = _each(a, x + "gate_up_proj.weight", (2 * i, h))
        last2 = _each(a, x + "down_proj.weight", (h, i))
        firsts = [both2[0], both2[0], last2[0]]
        columns = [_each_columns(both2, 0, 2), _each_columns(both2, 1, 2),
                   _each_columns(last2, 0, 1)]  # fmt: skip
        names = (x + "gate_up_proj.weight",) * 2 + (x + "down_proj.weight",)
        return _expert_desc(layer, firsts, columns, (i, h), names)
    if f"{p}experts.0.{gate}.weight" in tensors:
        names = (f"{x}{gate}.weight", f"{x}{up}.weight", f"{x}{down}.weight")
        lists = [
            _each(a, n, s) for n, s in zip(names, ((i, h), (i, h), (h, i)), strict=True)
        ]
        columns = [_each_columns(ms, 0, 1) for ms in lists]
        return _expert_desc(layer, [ms[0] for ms in lists], columns, (i, h), names)
    raise ModelFileError(
        f"{a.table.directory}: the experts of layer {layer} are missing: none of "
        f"{p}switch_mlp.gate_proj.weight, {p}experts.gate_up_proj, "
        f"{p}experts.0.{gate}.weight, {p}experts.0.gate_up_proj.weight"
    )


def _each(a: Assembler, pattern: str, shape: tuple[int, int]) -> list[Matrix]:
    """Return one matrix per expert; all must have the same format."""
    head, tail = pattern.split("{}")
    n = a.mc.core["num_experts"]
    out = [a.matrix(f"{head}{e}{tail}", shape) for e in range(n)]
    first = out[0]
    for e, m in enumerate(out):
        if (m.format, m.group, m.scale_format) != (
            first.format, first.group, first.scale_format
        ):  # fmt: skip
            raise UnsupportedError(
                f"{a.table.file_of(m.areas[0])}: tensor {m.source!r} of expert {e} is "
                f"{m.format}, expert 0 is {first.format}; a layer's experts share one format"
            )
    return out


def _segment_names(m: Matrix, name: str) -> list[str]:
    base = name.removesuffix(".weight")
    return [name, base + ".scales", base + ".biases"][: len(m.areas)]


def _stack_columns(m: Matrix, e: int, part: int, parts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (file, offset) of part `part` of `parts` of every expert, for each area of a stack."""
    out = []
    for t in m.areas:
        size = t.n_bytes // e
        offset = t.offset + np.arange(e, dtype=np.int64) * size + part * (size // parts)
        out.append((np.full(e, t.file, np.int32), offset))
    return out


def _each_columns(ms: list[Matrix], part: int, parts: int) -> list[tuple[np.ndarray, np.ndarray]]:
    out = []
    for a in range(len(ms[0].areas)):
        ts = [m.areas[a] for m in ms]
        file = np.fromiter((t.file for t in ts), np.int32, len(ts))
        offset = np.fromiter((t.offset for t in ts), np.int64, len(ts))
        out.append((file, offset + part * (ts[0].n_bytes // parts)))
    return out


def _expert_desc(
    layer: int,
    ms: list[Matrix],
    columns: list[list[tuple[np.ndarray, np.ndarray]]],
    size: tuple[int, int],
    names: tuple[str, ...] | None = None,
) -> ExpertDesc:
    i, h = size
    flat = [c for role in columns for c in role]
    sources: list[str] = []
    for n, m in enumerate(ms):
        sources += _segment_names(m, names[n] if names else m.source)
    return ExpertDesc(
        layer=layer,
        gate=ms[0].role(i, h),
        up=ms[1].role(i, h),
        down=ms[2].role(h, i),
        file=np.stack([f for f, _ in flat], axis=1),
        offset=np.stack([o for _, o in flat], axis=1),
        sources=tuple(sources),
    )
