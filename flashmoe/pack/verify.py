"""Re-reading every checksum of a packed checkpoint."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashmoe._core import crc32c
from flashmoe.checkpoint.description import Piece
from flashmoe.checkpoint.formats import role_bytes
from flashmoe.checkpoint.packed import DOCUMENT, open_packed, read_document
from flashmoe.errors import ModelFileError
from flashmoe.pack.progress import Progress, reporter
from flashmoe.pack.source import CHUNK_BYTES, PieceStream, SourceFiles

__all__ = ["VerifyReport", "verify"]


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What was read and found right."""

    path: Path
    n_records: int
    n_tensors: int
    n_bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.path}: {self.n_records} expert records and {self.n_tensors} tensors, "
            f"{self.n_bytes / 1e9:.3f} GB, all checksums right ({self.seconds:.1f} s)"
        )


def verify(path: str | Path, *, progress: Progress | bool | None = None) -> VerifyReport:
    """Check every expert record and resident tensor of a packed checkpoint.

    Parameters
    ----------
    path : str or Path
    progress : bool or callable, optional
        As in :func:`flashmoe.pack.pack`.

    Raises
    ------
    ModelFileError
        A checksum is wrong (the message names file and record), or the form itself is.
    """
    started = time.monotonic()
    directory = Path(path).absolute()
    if not (directory / DOCUMENT).is_file():
        raise ModelFileError(f"{directory}: not a packed checkpoint (no {DOCUMENT})")
    d = open_packed(directory)
    doc = read_document(directory)
    want: list[tuple[str, str, Piece, int]] = []  # file, what, bytes, checksum
    crcs = {(t["name"], t["layer"]): t["crc32c"] for t in doc["tensors"]}
    for t in d.tensors:
        areas = (*t.codes, *t.scales, *t.biases)
        for piece, crc in zip(areas, crcs[t.name, t.layer], strict=True):
            want.append((d.files[piece.file][0], f"tensor {t.source!r}", piece, crc))
    for e in d.experts:
        assert e.crc32c is not None
        n = sum(b for r in (e.gate, e.up, e.down) for b in role_bytes(r))
        file = int(e.file[0, 0])
        for i, crc in enumerate(e.crc32c.tolist()):
            piece = Piece(file, int(e.offset[i, 0]), n)
            want.append((d.files[file][0], f"the record of expert {i}", piece, crc))
    for raw in d.extra:
        crc = doc["extra"][raw.name]
        want.append((d.files[raw.piece.file][0], f"tensor {raw.name!r}", raw.piece, crc))
    total, done = sum(p.n_bytes for _, _, p, _ in want), 0
    with SourceFiles(d.files) as source, reporter(progress, f"verifying {directory.name}") as tell:
        tell(0, total)
        for name, what, piece, crc in want:
            got = _crc(source, piece)
            if got != crc:
                raise ModelFileError(
                    f"{name}: {what} has checksum {got:#010x}, {DOCUMENT} says {crc:#010x} "
                    f"(bytes {piece.offset} to {piece.offset + piece.n_bytes})"
                )
            done += piece.n_bytes
            tell(done, total)
    n_records = sum(len(e.file) for e in d.experts)
    return VerifyReport(
        directory, n_records, len(d.tensors) + len(d.extra), total, time.monotonic() - started
    )


def _crc(source: SourceFiles, piece: Piece) -> int:
    stream, crc, left = PieceStream(source, (piece,)), 0, piece.n_bytes
    while left:
        data: np.ndarray = stream.read(min(left, CHUNK_BYTES))
        crc = crc32c(data, crc)
        left -= data.size
    return crc
