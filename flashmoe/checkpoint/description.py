"""What a reader knows about a checkpoint: the one thing handed to the C core.

A :class:`ModelDescription` says where every byte lies and what it means; it holds no weights.  The
C twin is ``csrc/store/desc.h``, which validates every number again and trusts none.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["ExpertDesc", "ExpertRole", "ModelDescription", "Piece", "RawTensor", "TensorDesc"]

FULL, LINEAR = 0, 1
"""Values of ``config["mixers"]``: gated attention, Gated DeltaNet."""
DENSE, MOE = 0, 1
"""Values of ``config["ffns"]``: plain SwiGLU, mixture of experts."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of bytes: index into ``ModelDescription.files``, offset and length [bytes]."""

    file: int
    offset: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class TensorDesc:
    """A resident tensor: the concatenation of pieces of files.

    ``name`` is the checkpoint's canonical name without prefix, layer and ``.weight``
    (``"self_attn.q_proj"``; ``"self_attn.q_proj.bias"``; the list is ``csrc/store/tensor_list.h``).
    ``codes``, ``scales`` and ``biases`` are each a tuple of pieces whose bytes, put end to end, are
    that area (layout: ``csrc/quant/quant.h``); several pieces re-order rows, e.g. Qwen3-Next.
    """

    name: str
    layer: int  # -1 for tensors outside the layers
    source: str  # the checkpoint's full name, for messages
    format: str  # "f32", "f16", "bf16", "affine4", ...
    shape: tuple[int, ...]  # logical: (n_rows, n_cols) or (n,)
    codes: tuple[Piece, ...]
    scales: tuple[Piece, ...] = ()
    biases: tuple[Piece, ...] = ()
    group: int = 0  # weights per scale; 0 for plain formats
    scale_format: str = "bf16"  # of scales and biases; ignored for plain formats
    add_one: bool = False  # a zero-centred norm as released: apply 1 + w


@dataclass(frozen=True, slots=True)
class ExpertRole:
    """Format and shape of one of an expert's three matrices."""

    format: str
    n_rows: int
    n_cols: int
    group: int = 0
    scale_format: str = "bf16"


@dataclass(frozen=True, slots=True)
class ExpertDesc:
    """Where the routed experts of one layer lie.

    An expert is a list of segments in the order gate, up, down; each role gives its codes and, if
    affine, its scales and biases: 3 segments for plain formats, 9 for affine ones.  Segment sizes
    follow from the roles.  ``file`` and ``offset`` are arrays of shape (n_experts, n_segments);
    neighbouring segments that are adjacent in a file are read in one go.
    """

    layer: int
    gate: ExpertRole
    up: ExpertRole
    down: ExpertRole
    file: np.ndarray  # (n_experts, n_segments) int32
    offset: np.ndarray  # (n_experts, n_segments) int64 [bytes]
    sources: tuple[str, ...]  # per segment, "{}" stands for the expert id if it is in the name
    crc32c: np.ndarray | None = None  # (n_experts,) uint32, segments in order; packed only


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor kept for later (``mtp.*``): copied by ``pack``, not read by the core."""

    name: str
    dtype: str  # safetensors dtype name
    shape: tuple[int, ...]
    piece: Piece


@dataclass(slots=True)
class ModelDescription:
    """Everything the C core needs, and what Python keeps beside it.

    ``config`` holds exactly the keys of ``fm_config`` (``csrc/model/config.h``), numbers only.
    """

    arch: str  # a name of csrc/model/arch_list.h
    config: dict[str, Any]
    files: list[tuple[str, int]]  # absolute path, size [bytes]
    tensors: list[TensorDesc]
    experts: list[ExpertDesc]  # one per MoE layer, in layer order
    origin: str  # "hf", "mlx" or "packed"
    path: Path
    hf_config: dict[str, Any] = field(default_factory=dict)  # config.json as it came
    extra: list[RawTensor] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)  # names left out on purpose (vision)
    eos_token_ids: tuple[int, ...] = ()
    recipe: dict[str, Any] = field(default_factory=dict)  # packed form: how it was made

    def to_core(self) -> dict[str, Any]:
        """Return the plain dict that ``_core.Engine`` takes (tuples, ints and arrays only)."""

        def pieces(ps: tuple[Piece, ...]) -> list[tuple[int, int, int]]:
            return [(p.file, p.offset, p.n_bytes) for p in ps]

        def role(r: ExpertRole) -> tuple[str, int, str, int, int]:
            return (r.format, r.group, r.scale_format, r.n_rows, r.n_cols)

        return {
            "arch": self.arch,
            "config": dict(self.config),
            "files": [(str(p), int(n)) for p, n in self.files],
            "tensors": [
                (
                    t.name,
                    t.layer,
                    t.source,
                    t.format,
                    t.group,
                    t.scale_format,
                    tuple(int(n) for n in t.shape),
                    bool(t.add_one),
                    pieces(t.codes),
                    pieces(t.scales),
                    pieces(t.biases),
                )
                for t in self.tensors
            ],
            "experts": [
                {
                    "layer": e.layer,
                    "roles": (role(e.gate), role(e.up), role(e.down)),
                    "file": np.ascontiguousarray(e.file, dtype=np.int32),
                    "offset": np.ascontiguousarray(e.offset, dtype=np.int64),
                    "crc32c": None
                    if e.crc32c is None
                    else np.ascontiguousarray(e.crc32c, dtype=np.uint32),
                    "sources": tuple(e.sources),
                }
                for e in self.experts
            ],
        }
