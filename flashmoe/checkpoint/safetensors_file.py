"""Headers of safetensors files, read strictly; weights are never touched.

Owns the container's rules: 8-byte little-endian header length, a JSON object, tensors that tile the
data area without holes or overlaps.  Knows nothing of models.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashmoe.config import _show, nearest, parse_json
from flashmoe.errors import ModelFileError, StorageError

__all__ = ["DTYPE_BYTES", "Header", "Tensor", "read_header"]

MAX_HEADER_BYTES = 100_000_000
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8, "C64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a safetensors file; `file` is an index of the caller's choice."""

    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int  # from the start of the file [bytes]
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """The header of one file."""

    path: Path
    size: int  # of the whole file [bytes]
    data_start: int  # [bytes]
    metadata: dict[str, str]
    tensors: dict[str, Tensor]


def read_header(path: Path, file: int = 0) -> Header:
    """Read and check the header of a safetensors file.

    Parameters
    ----------
    path : Path
    file : int
        Stored in every :class:`Tensor`.

    Raises
    ------
    StorageError
        The file cannot be opened or read.
    ModelFileError
        It breaks a rule of the format; the message names file, tensor and numbers.
    """
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(8)
            if len(head) < 8:
                raise ModelFileError(f"{path}: {size} bytes are too short for a safetensors file")
            (n,) = struct.unpack("<Q", head)
            if n > MAX_HEADER_BYTES:
                raise ModelFileError(
                    f"{path}: header of {n} bytes, the limit is {MAX_HEADER_BYTES}"
                    " (is it a safetensors file?)"
                )
            if 8 + n > size:
                raise ModelFileError(f"{path}: header ends at {8 + n}, the file has {size} bytes")
            raw = f.read(n)
    except OSError as e:
        raise StorageError(e.errno, e.strerror, str(path)) from e
    if len(raw) != n:
        raise ModelFileError(f"{path}: read {len(raw)} of {n} header bytes")
    if not raw.startswith(b"{"):
        raise ModelFileError(f"{path}: the header does not begin with '{{'")
    obj = parse_json(raw, f"{path}: header")
    meta = obj.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(v, str) for v in meta.values()):
        raise ModelFileError(f"{path}: __metadata__ is not an object of strings")
    start = 8 + n
    tensors = {name: _tensor(path, name, t, file, start, size) for name, t in obj.items()}
    _check_tiling(path, tensors, start, size)
    return Header(path, size, start, meta, tensors)


def _natural(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 1 << 62


def _tensor(path: Path, name: str, t: Any, file: int, start: int, size: int) -> Tensor:
    if not isinstance(t, dict) or t.keys() != {"dtype", "shape", "data_offsets"}:
        raise ModelFileError(
            f"{path}: tensor {name!r}: dtype, shape and data_offsets are wanted, got {_show(t)}"
        )
    dtype, shape, off = t["dtype"], t["shape"], t["data_offsets"]
    width = DTYPE_BYTES.get(dtype) if isinstance(dtype, str) else None
    if width is None:
        hint = nearest(dtype, DTYPE_BYTES) if isinstance(dtype, str) else ""
        raise ModelFileError(f"{path}: tensor {name!r}: unknown dtype {_show(dtype)}{hint}")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_natural, shape)):
        raise ModelFileError(f"{path}: tensor {name!r}: bad shape {_show(shape)}")
    if not isinstance(off, list) or len(off) != 2 or not all(map(_natural, off)):
        raise ModelFileError(f"{path}: tensor {name!r}: bad data_offsets {_show(off)}")
    begin, end = off
    n_bytes = width
    for d in shape:
        n_bytes *= d
    if end - begin != n_bytes:
        raise ModelFileError(
            f"{path}: tensor {name!r}: data_offsets span {end - begin} bytes, "
            f"shape {shape} of {dtype} needs {_show(n_bytes)}"
        )
    if start + end > size:
        raise ModelFileError(
            f"{path}: tensor {name!r} ends at {start + end}, the file has {size} bytes"
        )
    return Tensor(dtype, tuple(shape), file, start + begin, n_bytes)


def _check_tiling(path: Path, tensors: dict[str, Tensor], start: int, size: int) -> None:
    at, before = start, "the header"
    for name, t in sorted(tensors.items(), key=lambda kv: (kv[1].offset, kv[1].n_bytes)):
        if t.offset != at:
            what = "overlap" if t.offset < at else "leave a hole"
            raise ModelFileError(
                f"{path}: {before} and tensor {name!r} {what}: "
                f"one ends at {at}, the other begins at {t.offset}"
            )
        at, before = t.offset + t.n_bytes, f"tensor {name!r}"
    if at != size:
        raise ModelFileError(f"{path}: the tensors end at {at}, the file has {size} bytes")
