"""Reading bytes of the source checkpoint, with errors that name file and numbers."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import numpy as np

from flashmoe.checkpoint.description import Piece
from flashmoe.errors import ModelFileError, StorageError

__all__ = ["CHUNK_BYTES", "PieceStream", "SourceFiles", "storage_errors"]

CHUNK_BYTES = 8 << 20  # read at once; bounds memory


@contextlib.contextmanager
def storage_errors(path: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names `path`."""
    try:
        yield
    except StorageError:
        raise
    except OSError as e:
        raise StorageError(e.errno, e.strerror or str(e), e.filename or path) from e


class SourceFiles:
    """The files of a description, opened on first use; a context manager. Any thread may read."""

    def __init__(self, files: list[tuple[str, int]]) -> None:
        self._paths = [p for p, _ in files]
        self._fds: dict[int, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *exc: object) -> None:
        for fd in self._fds.values():
            os.close(fd)
        self._fds.clear()

    def read_into(self, file: int, offset: int, out: np.ndarray) -> None:
        """Fill `out` (contiguous, uint8) from byte `offset` of a file."""
        path = self._paths[file]
        with storage_errors(path):
            with self._lock:
                fd = self._fds.get(file)
                if fd is None:
                    fd = self._fds[file] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            at = 0
            while at < out.size:
                data = os.pread(fd, min(out.size - at, CHUNK_BYTES), offset + at)
                if not data:
                    raise ModelFileError(
                        f"{path}: ends at {offset + at}, bytes up to {offset + out.size} are needed"
                    )
                out[at : at + len(data)] = np.frombuffer(data, np.uint8)
                at += len(data)


class PieceStream:
    """The bytes of a tuple of pieces, end to end, read in order."""

    def __init__(self, source: SourceFiles, pieces: tuple[Piece, ...]) -> None:
        self._source, self._pieces = source, list(pieces)
        self._at = 0  # within the first piece

    def read(self, n_bytes: int) -> np.ndarray:
        """Return the next `n_bytes` bytes as ndarray of shape (n_bytes,), uint8."""
        out = np.empty(n_bytes, np.uint8)
        done = 0
        while done < n_bytes:
            p = self._pieces[0]
            n = min(n_bytes - done, p.n_bytes - self._at)
            self._source.read_into(p.file, p.offset + self._at, out[done : done + n])
            done += n
            self._at += n
            if self._at == p.n_bytes:
                self._pieces.pop(0)
                self._at = 0
        return out
