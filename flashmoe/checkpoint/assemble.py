"""From a tensor table and an architecture to a :class:`ModelDescription`.

Finds every tensor the architecture needs, checks its shape and format, and refuses names that
nobody asked for.  Works for plain (HF) and affine-quantised (MLX) containers alike: a matrix with
``.scales`` beside it is quantised.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from flashmoe.checkpoint.arch import Architecture, ModelConfig, TensorSpec
from flashmoe.checkpoint.description import (
    MOE,
    ExpertRole,
    ModelDescription,
    Piece,
    RawTensor,
    TensorDesc,
)
from flashmoe.checkpoint.experts import describe_experts
from flashmoe.checkpoint.formats import AFFINE_BITS, GROUPS
from flashmoe.checkpoint.safetensors_file import Tensor
from flashmoe.checkpoint.source import TensorTable
from flashmoe.config import nearest
from flashmoe.errors import ModelFileError, UnsupportedError

__all__ = ["PLAIN", "Assembler", "Matrix"]

PLAIN = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.", "")
HEADS = ("lm_head", "language_model.lm_head", "model.language_model.lm_head", "model.lm_head")
_MTP = re.compile(r"(model\.|language_model\.|model\.language_model\.)?mtp\.")
_VISION = re.compile(r"(model\.)?(language_model\.)?(visual|vision_tower|vision_model)\.")
_BUFFER = re.compile(r".*\.rotary_emb\.inv_freq")
_FOREIGN = {
    "weight_scale_inv": "FP8 (block-scaled)",
    "weight_scale": "FP8 or compressed-tensors",
    "weight_packed": "compressed-tensors",
    "input_scale": "FP8 (static activations)",
    "qweight": "GPTQ or AWQ",
    "qzeros": "GPTQ or AWQ",
    "g_idx": "GPTQ",
    "absmax": "bitsandbytes",
    "quant_map": "bitsandbytes",
    "gate_up_proj_blocks": "MXFP4",
    "down_proj_blocks": "MXFP4",
}


@dataclass(slots=True)
class Matrix:
    """A stored matrix or stack of matrices: format and one or three areas (codes first)."""

    format: str
    group: int
    scale_format: str
    areas: tuple[Tensor, ...]
    source: str

    def role(self, n_rows: int, n_cols: int) -> ExpertRole:
        """Return format and shape as an expert's role."""
        return ExpertRole(self.format, n_rows, n_cols, self.group, self.scale_format)


QuantCheck = Callable[[str, int, int], None]
"""Called with (base name, bits, group), bits 0 for a plain matrix; raises if the config objects."""


@dataclass(slots=True)
class Assembler:
    """Builds one description; see :meth:`build`."""

    table: TensorTable
    arch: Architecture
    mc: ModelConfig
    shifted_by_default: bool = False  # MLX: norms hold 1 + w unless conv1d says otherwise
    check_quant: QuantCheck | None = None
    prefix: str = ""
    used: set[str] = field(default_factory=set)

    def build(self, hf_config: dict[str, Any], origin: str) -> ModelDescription:
        """Return the checked description (without end-of-sequence ids)."""
        self._refuse_foreign()
        self.prefix = self._find_prefix()
        c = self.mc.core
        specs = self.arch.tensors(self.mc)
        head = self._head()
        skipped = self._decide_tying(head)
        add_one = self.arch.zero_centred and not self._norms_are_shifted(specs)
        tensors = [self._resident(s, add_one) for s in specs]
        if not c["tie_word_embeddings"]:
            assert head is not None
            spec = TensorSpec("lm_head", -1, head + ".weight", (c["vocab_size"], c["hidden_size"]))
            tensors.append(self._resident(spec, False, prefix=""))
        experts = [describe_experts(self, i) for i, f in enumerate(c["ffns"]) if f == MOE]
        extra, more = self._leftovers(specs)
        return ModelDescription(
            arch=self.arch.name,
            config=c,
            files=list(self.table.files),
            tensors=tensors,
            experts=experts,
            origin=origin,
            path=self.table.directory,
            hf_config=hf_config,
            extra=extra,
            skipped=sorted(skipped + more),
        )

    # ------------------------------------------------------------------ names

    def _refuse_foreign(self) -> None:
        for name in self.table.tensors:
            kind = _FOREIGN.get(name.rpartition(".")[2])
            if kind is not None:
                raise UnsupportedError(
                    f"{self._file(name)}: tensor {name!r} belongs to a {kind} checkpoint; "
                    "supported: F32, F16, BF16 and MLX affine quantisation"
                )

    def _file(self, name: str) -> str:
        return self.table.file_of(self.table.tensors[name])

    def _find_prefix(self) -> str:
        hits = [p for p in PREFIXES if p + "embed_tokens.weight" in self.table.tensors]
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise ModelFileError(
                f"{self.table.directory}: both {hits[0]}embed_tokens.weight and "
                f"{hits[1]}embed_tokens.weight exist"
            )
        raise ModelFileError(
            f"{self.table.directory}: tensor 'embed_tokens.weight' is missing under every known "
            f"prefix ({', '.join(repr(p) for p in PREFIXES)})"
        )

    def _head(self) -> str | None:
        hits = [h for h in HEADS if h + ".weight" in self.table.tensors]
        if len(hits) > 1:
            raise ModelFileError(f"{self.table.directory}: both {hits[0]} and {hits[1]} exist")
        return hits[0] if hits else None

    def _decide_tying(self, head: str | None) -> list[str]:
        """Set tie_word_embeddings; return names left out because the head is tied."""
        tied = self.mc.tied
        if tied is None:
            tied = head is None
        if not tied and head is None:
            raise ModelFileError(
                f"{self.table.directory}: tensor 'lm_head.weight' is missing and "
                "tie_word_embeddings is false"
            )
        self.mc.core["tie_word_embeddings"] = int(tied)
        if not tied or head is None:
            return []
        names = [n for n in (f"{head}.{s}" for s in ("weight", "scales", "biases"))
                 if n in self.table.tensors]  # fmt: skip
        self.used.update(names)
        return names

    def _norms_are_shifted(self, specs: list[TensorSpec]) -> bool:
        """Tell whether zero-centred norms are stored as 1 + w: conv1d is then (C, k, 1)."""
        seen: dict[bool, str] = {}
        for s in specs:
            if not s.conv or s.shape[1] == 1:
                continue
            t = self._get(self.prefix + s.source)
            c, k = s.shape
            if t.shape not in ((c, 1, k), (c, k, 1)):
                want = f"({c}, 1, {k}) or ({c}, {k}, 1)"
                raise self._shape_error(self.prefix + s.source, t, want)
            seen.setdefault(t.shape[2] == 1, self.prefix + s.source)
        if len(seen) == 2:
            raise ModelFileError(
                f"{self.table.directory}: {seen[True]} is in the converted form, {seen[False]} in "
                "the released one, so whether norms hold w or 1 + w is undecidable"
            )
        return next(iter(seen), self.shifted_by_default)

    def _leftovers(self, specs: list[TensorSpec]) -> tuple[list[RawTensor], list[str]]:
        extra, skipped, unknown = [], [], []
        first = self.mc.core["num_hidden_layers"]
        drafting = tuple(f"{self.prefix}layers.{first + i}." for i in range(self.mc.extra_layers))
        for name in sorted(self.table.tensors.keys() - self.used):
            if _MTP.match(name) or (drafting and name.startswith(drafting)):
                t = self.table.tensors[name]
                piece = Piece(t.file, t.offset, t.n_bytes)
                extra.append(RawTensor(name, t.dtype, t.shape, piece))
            elif _VISION.match(name) or _BUFFER.fullmatch(name):
                skipped.append(name)
            else:
                unknown.append(name)
        if unknown:
            known = (self.prefix + s.source for s in specs)
            raise ModelFileError(
                f"{self._file(unknown[0])}: unknown tensor {unknown[0]!r} for {self.arch.name}"
                f"{f' and {len(unknown) - 1} more' if len(unknown) > 1 else ''}"
                f"{nearest(unknown[0], known)}"
            )
        return extra, skipped

    # ------------------------------------------------------------------ tensors

    def _get(self, name: str) -> Tensor:
        t = self.table.tensors.get(name)
        if t is None:
            raise ModelFileError(
                f"{self.table.directory}: tensor {name!r} is missing"
                f"{nearest(name, self.table.tensors) if len(self.table.tensors) < 5000 else ''}"
            )
        self.used.add(name)
        return t

    def _shape_error(self, name: str, t: Tensor, want: Any) -> ModelFileError:
        return ModelFileError(
            f"{self.table.file_of(t)}: tensor {name!r} has shape {t.shape}, wanted {want}"
        )

    def _plain(self, name: str, t: Tensor) -> str:
        fmt = PLAIN.get(t.dtype)
        if fmt is None:
            what = "FP8 weights" if t.dtype.startswith("F8") else f"dtype {t.dtype}"
            raise UnsupportedError(
                f"{self.table.file_of(t)}: tensor {name!r} has {what}; supported: F32, F16, BF16"
                f"{' (and U32 with .scales beside it)' if t.dtype == 'U32' else ''}"
            )
        return fmt

    def matrix(self, name: str, shape: tuple[int, ...]) -> Matrix:
        """Return the matrix (or stack of matrices) of logical `shape` stored under `name`.

        `name` ends in ``.weight``, or is a bare name such as ``…experts.gate_up_proj``.
        """
        base = name.removesuffix(".weight")
        w = self._get(name)
        if base + ".scales" in self.table.tensors:
            return self._affine(name, base, w, shape)
        if base + ".biases" in self.table.tensors:
            raise ModelFileError(
                f"{self._file(base + '.biases')}: tensor {base + '.scales'!r} is missing"
            )
        fmt = self._plain(name, w)
        if w.shape != shape:
            raise self._shape_error(name, w, shape)
        if self.check_quant is not None:
            self.check_quant(base, 0, 0)
        return Matrix(fmt, 0, "bf16", (w,), name)

    def _affine(self, name: str, base: str, w: Tensor, shape: tuple[int, ...]) -> Matrix:
        scales = self._get(base + ".scales")
        if base + ".biases" not in self.table.tensors:
            raise UnsupportedError(
                f"{self.table.file_of(w)}: {base!r} has scales but no biases, so it is not affine "
                "(mxfp4, nvfp4 and mxfp8 are not supported)"
            )
        biases = self._get(base + ".biases")
        *lead, n_cols = shape
        for n, t, dtypes in ((name, w, ("U32",)), (base + ".scales", scales, tuple(PLAIN)),
                             (base + ".biases", biases, (scales.dtype,))):  # fmt: skip
            if t.dtype not in dtypes:
                raise ModelFileError(
                    f"{self.table.file_of(t)}: tensor {n!r} has dtype {t.dtype}, "
                    f"wanted {' or '.join(dtypes)}"
                )
            if len(t.shape) != len(shape) or list(t.shape[:-1]) != lead or t.shape[-1] < 1:
                raise self._shape_error(n, t, f"({', '.join(map(str, lead))}, …)")
        if biases.shape != scales.shape:
            raise self._shape_error(base + ".biases", biases, scales.shape)
        group, rest = divmod(n_cols, scales.shape[-1])
        bits, rest2 = divmod(32 * w.shape[-1], n_cols)
        if rest or group not in GROUPS or rest2 or bits not in AFFINE_BITS:
            raise ModelFileError(
                f"{self.table.file_of(w)}: {base!r} with {n_cols} columns has {w.shape[-1]} words "
                f"and {scales.shape[-1]} scales per row, which is no supported affine format "
                f"(bits {AFFINE_BITS}, groups {GROUPS})"
            )
        if self.check_quant is not None:
            self.check_quant(base, bits, group)
        return Matrix(f"affine{bits}", group, PLAIN[scales.dtype], (w, scales, biases), name)

    def _resident(self, s: TensorSpec, add_one: bool, prefix: str | None = None) -> TensorDesc:
        name = (self.prefix if prefix is None else prefix) + s.source
        if not s.matrix:
            t = self._get(name)
            fmt = self._plain(name, t)
            if not s.conv and t.shape != s.shape:
                raise self._shape_error(name, t, s.shape)
            if s.conv and t.shape not in ((s.shape[0], 1, s.shape[1]), (*s.shape, 1)):
                raise self._shape_error(name, t, f"({s.shape[0]}, 1, {s.shape[1]})")
            codes = (Piece(t.file, t.offset, t.n_bytes),)
            one = add_one and s.zero_centred
            return TensorDesc(s.name, s.layer, name, fmt, s.shape, codes, add_one=one)
        n_rows = s.source_rows or s.shape[0]
        m = self.matrix(name, (n_rows, s.shape[1]))
        ranges = s.rows or ((0, n_rows),)
        areas = [
            tuple(
                Piece(t.file, t.offset + start * (t.n_bytes // n_rows), n * (t.n_bytes // n_rows))
                for start, n in ranges
            )
            for t in m.areas
        ]
        desc = TensorDesc(s.name, s.layer, name, m.format, s.shape, areas[0])
        if m.group:
            desc = replace(
                desc, scales=areas[1], biases=areas[2], group=m.group, scale_format=m.scale_format
            )
        return desc
