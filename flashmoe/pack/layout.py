"""The files of the packed form, planned to the last byte before anything is written.

A :class:`PlannedFile` knows its header, its size, its checksummed units, and how to fill itself
from the source in bounded memory.  Knows nothing of resuming or of directories.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flashmoe._core import crc32c
from flashmoe.checkpoint.description import ExpertDesc, ExpertRole, RawTensor, TensorDesc
from flashmoe.checkpoint.formats import area_bytes, bits_of, role_bytes
from flashmoe.checkpoint.packed import (
    ALIGN,
    FORMAT,
    MTP,
    ROLES,
    TRUNK,
    area_tensor,
    expert_file,
    tensor_key,
)
from flashmoe.errors import UnsupportedError
from flashmoe.pack.quantise import SCALE_FORMAT, quantise, to_float32
from flashmoe.pack.recipe import MATRICES, Recipe
from flashmoe.pack.source import CHUNK_BYTES, PieceStream, SourceFiles

__all__ = ["ExtraFile", "LayerFile", "PlannedFile", "TrunkFile", "Unit"]

N_THREADS = min(4, os.cpu_count() or 1)
"""Experts quantised at a time; NumPy lets go of the interpreter lock."""

Tick = Callable[[int], None]
"""Called with the number of source bytes just done."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A checksummed byte range of a planned file."""

    name: str
    offset: int  # [bytes]
    n_bytes: int


@dataclass(slots=True)
class PlannedFile:
    """A safetensors file to be: `header` is everything before the data."""

    name: str
    header: bytes = b""
    size: int = 0  # [bytes]
    source_bytes: int = 0
    units: list[Unit] = field(default_factory=list)

    def write(self, fd: int, source: SourceFiles, tick: Tick) -> list[int]:
        """Write the data through `fd`; return the CRC-32C of every unit."""
        raise NotImplementedError


def make_header(tensors: list[tuple[str, str, tuple[int, ...], int]]) -> tuple[bytes, list[int]]:
    """Return a safetensors header padded to :data:`ALIGN`, and where each tensor begins.

    Parameters
    ----------
    tensors : list of (name, dtype, shape, n_bytes)
        In file order.
    """
    at, table = 0, {"__metadata__": {"format": FORMAT}}
    begins = []
    for name, dtype, shape, n in tensors:
        entry: Any = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + n]}
        table[name] = entry
        begins.append(at)
        at += n
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + b for b in begins]


def pwrite_all(fd: int, data: Any, offset: int) -> None:
    """Write a whole buffer at `offset`."""
    view = memoryview(data).cast("B")
    while len(view):
        n = os.pwrite(fd, view[: 1 << 30], offset)
        view, offset = view[n:], offset + n


def _target(fmt: str, group: int, scale: str, n_cols: int, recipe: Recipe, name: str,
            origin: str) -> tuple[str, int, str, bool]:  # fmt: skip
    """Return (format, group, scale format, left plain for want of divisibility)."""
    bits = recipe.bits_for(name)
    if bits is None:
        return fmt, group, scale, False
    if bits_of(fmt):
        if (bits, recipe.group) == (bits_of(fmt), group):
            return fmt, group, scale, False
        raise UnsupportedError(
            f"{name} is {fmt} with group {group} in the source ({origin}); quantising it again is "
            "not supported: pack it as stored (bits=None), or from the unquantised release"
        )
    if n_cols % recipe.group:
        return fmt, group, scale, True
    return f"affine{bits}", recipe.group, SCALE_FORMAT, False


# ---------------------------------------------------------------------- trunk


class TrunkFile(PlannedFile):
    """All resident tensors."""

    def __init__(self, tensors: list[TensorDesc], recipe: Recipe, origin: str) -> None:
        super().__init__(TRUNK)
        self.source = tensors
        self.kept: list[str] = []
        self.target: list[tuple[str, int, str]] = []
        rows = []
        for t in tensors:
            fmt, group, scale = t.format, t.group, t.scale_format
            if t.name in MATRICES:
                fmt, group, scale, plain = _target(
                    fmt, group, scale, t.shape[-1], recipe, t.name, origin
                )
                if plain:
                    self.kept.append(tensor_key(t.name, t.layer))
            self.target.append((fmt, group, scale))
            n_rows, n_cols = t.shape if len(t.shape) == 2 else (1, t.shape[0])
            for a, n in enumerate(area_bytes(fmt, group, scale, n_rows, n_cols)):
                dtype, shape = area_tensor(fmt, group, scale, t.shape, a)
                rows.append((tensor_key(t.name, t.layer, a), dtype, shape, n))
            self.source_bytes += sum(p.n_bytes for p in (*t.codes, *t.scales, *t.biases))
        self.header, begins = make_header(rows)
        self.units = [Unit(r[0], b, r[3]) for r, b in zip(rows, begins, strict=True)]
        self.size = len(self.header) + sum(r[3] for r in rows)

    def entries(self, crcs: list[int]) -> list[dict[str, Any]]:
        """Return the ``tensors`` list of ``flashmoe.json``."""
        out, it = [], iter(crcs)
        for t, (fmt, group, scale) in zip(self.source, self.target, strict=True):
            n_areas = 3 if bits_of(fmt) else 1
            out.append({
                "name": t.name, "layer": t.layer, "source": t.source, "format": fmt,
                "group": group, "scale_format": scale, "shape": list(t.shape),
                "add_one": t.add_one, "crc32c": [next(it) for _ in range(n_areas)],
            })  # fmt: skip
        return out

    def write(self, fd: int, source: SourceFiles, tick: Tick) -> list[int]:
        crcs: list[int] = []
        at = 0
        for t, (fmt, group, _) in zip(self.source, self.target, strict=True):
            units = self.units[at : at + (3 if bits_of(fmt) else 1)]
            at += len(units)
            if fmt == t.format:
                areas = (t.codes, t.scales, t.biases)[: len(units)]
                for unit, pieces in zip(units, areas, strict=True):
                    crcs.append(_copy(fd, PieceStream(source, pieces), unit, tick))
            else:
                crcs += _quantise_rows(fd, t, bits_of(fmt), group, units, source, tick)
        return crcs


def _copy(fd: int, stream: PieceStream, unit: Unit, tick: Tick) -> int:
    crc, at = 0, 0
    while at < unit.n_bytes:
        data = stream.read(min(CHUNK_BYTES, unit.n_bytes - at))
        crc = crc32c(data, crc)
        pwrite_all(fd, data, unit.offset + at)
        at += data.size
        tick(data.size)
    return crc


def _quantise_rows(fd: int, t: TensorDesc, bits: int, group: int, units: list[Unit],
                   source: SourceFiles, tick: Tick) -> list[int]:  # fmt: skip
    stream = PieceStream(source, t.codes)
    n_rows, n_cols = t.shape
    row_bytes = area_bytes(t.format, 0, "", 1, n_cols)[0]
    step = max(1, CHUNK_BYTES // row_bytes)
    crcs, ats = [0, 0, 0], [u.offset for u in units]
    for r in range(0, n_rows, step):
        raw = stream.read(min(step, n_rows - r) * row_bytes)
        x = to_float32(raw, t.format).reshape(-1, n_cols)
        for a, area in enumerate(quantise(x, bits, group, t.source)):
            data = np.ascontiguousarray(area).view(np.uint8).reshape(-1)
            crcs[a] = crc32c(data, crcs[a])
            pwrite_all(fd, data, ats[a])
            ats[a] += data.size
        tick(raw.size)
    return crcs


# ---------------------------------------------------------------------- experts


class LayerFile(PlannedFile):
    """The routed experts of one layer: records of `stride` bytes."""

    def __init__(self, experts: ExpertDesc, recipe: Recipe, origin: str) -> None:
        super().__init__(expert_file(experts.layer))
        self.source = experts
        self.kept: list[str] = []
        self.roles: list[ExpertRole] = []
        for name, r in zip(ROLES, (experts.gate, experts.up, experts.down), strict=True):
            fmt, group, scale, plain = _target(
                r.format, r.group, r.scale_format, r.n_cols, recipe, f"experts.{name}", origin
            )
            self.roles.append(ExpertRole(fmt, r.n_rows, r.n_cols, group, scale))
            if plain:
                self.kept.append(f"layers.{experts.layer}.experts.{name}")
        n = experts.file.shape[0]
        self.record_bytes = sum(b for r in self.roles for b in role_bytes(r))
        self.stride = -(-self.record_bytes // ALIGN) * ALIGN
        self.header, (begin,) = make_header(
            [("experts", "U8", (n, self.stride), n * self.stride)]
        )
        self.size = begin + n * self.stride
        self.units = [
            Unit(f"expert {e}", begin + e * self.stride, self.record_bytes) for e in range(n)
        ]
        old = (experts.gate, experts.up, experts.down)
        self.source_bytes = n * sum(b for r in old for b in role_bytes(r))

    def entry(self, crcs: list[int]) -> dict[str, Any]:
        """Return this layer's object of the ``experts`` list of ``flashmoe.json``."""
        roles = {
            name: {"format": r.format, "group": r.group, "scale_format": r.scale_format}
            for name, r in zip(ROLES, self.roles, strict=True)
        }
        return {
            "layer": self.source.layer, "file": self.name, "stride": self.stride,
            "record_bytes": self.record_bytes, **roles, "sources": self._sources(),
            "crc32c": crcs,
        }  # fmt: skip

    def _sources(self) -> list[str]:
        """Return a source name per segment; a quantised matrix has three of one source."""
        out, at = [], 0
        old = (self.source.gate, self.source.up, self.source.down)
        for r, new in zip(old, self.roles, strict=True):
            n = len(role_bytes(r))
            names = list(self.source.sources[at : at + n])
            at += n
            out += names if len(role_bytes(new)) == n else names * 3
        return out

    def write(self, fd: int, source: SourceFiles, tick: Tick) -> list[int]:
        per_expert = self.source_bytes // len(self.units)
        crcs = []
        with ThreadPoolExecutor(N_THREADS) as pool:
            ahead: deque[Future[np.ndarray]] = deque()
            try:
                for e, unit in enumerate(self.units):
                    while len(ahead) < N_THREADS and e + len(ahead) < len(self.units):
                        ahead.append(pool.submit(self._record, e + len(ahead), source))
                    record = ahead.popleft().result()
                    crcs.append(crc32c(record[: self.record_bytes]))
                    pwrite_all(fd, record, unit.offset)
                    tick(per_expert)
            finally:
                for f in ahead:
                    f.cancel()
        return crcs

    def _record(self, e: int, source: SourceFiles) -> np.ndarray:
        """Return the record of an expert, padded to the stride; runs on any thread."""
        record = np.zeros(self.stride, np.uint8)
        x, at, segment = self.source, 0, 0
        for old, new in zip((x.gate, x.up, x.down), self.roles, strict=True):
            sizes = role_bytes(old)
            where = [
                (int(x.file[e, segment + a]), int(x.offset[e, segment + a]))
                for a in range(len(sizes))
            ]
            segment += len(sizes)
            if new.format == old.format:
                for (file, offset), n in zip(where, sizes, strict=True):
                    source.read_into(file, offset, record[at : at + n])
                    at += n
                continue
            raw = np.empty(sizes[0], np.uint8)
            source.read_into(*where[0], raw)
            w = to_float32(raw, old.format).reshape(old.n_rows, old.n_cols)
            what = x.sources[segment - 1].replace("{}", str(e)) + f" (expert {e})"
            for area in quantise(w, bits_of(new.format), new.group, what):
                data = area.view(np.uint8).reshape(-1)
                record[at : at + data.size] = data
                at += data.size
        return record


# ---------------------------------------------------------------------- kept tensors


class ExtraFile(PlannedFile):
    """Tensors kept as they are for later (``mtp.*``)."""

    def __init__(self, extra: list[RawTensor]) -> None:
        super().__init__(MTP)
        self.extra = extra
        rows = [(t.name, t.dtype, t.shape, t.piece.n_bytes) for t in extra]
        self.header, begins = make_header(rows)
        self.units = [Unit(t.name, b, t.piece.n_bytes) for t, b in zip(extra, begins, strict=True)]
        self.source_bytes = sum(t.piece.n_bytes for t in extra)
        self.size = len(self.header) + self.source_bytes

    def entries(self, crcs: list[int]) -> dict[str, int]:
        """Return the ``extra`` object of ``flashmoe.json``."""
        return {t.name: c for t, c in zip(self.extra, crcs, strict=True)}

    def write(self, fd: int, source: SourceFiles, tick: Tick) -> list[int]:
        return [
            _copy(fd, PieceStream(source, (t.piece,)), unit, tick)
            for t, unit in zip(self.extra, self.units, strict=True)
        ]
