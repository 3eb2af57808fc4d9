"""One sequence: its state, its tokens so far, and going back and forth in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from flashmoe import governor
from flashmoe.errors import ArgumentError, ModelFileError, StateError, StorageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flashmoe import _core
    from flashmoe.checkpoint.description import ModelDescription
    from flashmoe.engine import Engine

__all__ = ["Session", "model_fingerprint"]

T = TypeVar("T")

_MAGIC = b"FMSESS01"


class Session:
    """State of one sequence; made by :meth:`Engine.session`.

    Every call is one the engine's other threads wait for; `cancel` alone may come from any thread
    at any time.

    Examples
    --------
    >>> from flashmoe import Engine
    >>> with Engine(memory="2GiB") as engine, engine.session() as session:
    ...     session.prefill([1, 2, 3])
    ...     session.step(4)
    ...     session.rewind(2)
    ...     session.token_ids
    [1, 2]
    """

    def __init__(self, engine: Engine, core: _core.Session) -> None:
        self._engine = engine
        self._owner = engine.owner
        self.core = core
        self._tokens: list[int] = []
        self._closed = False
        self._has_logits = False

    @property
    def pos(self) -> int:
        """Tokens fed so far."""
        return len(self._tokens)

    @property
    def context(self) -> int:
        """Tokens that fit."""
        return int(self.core.context)

    @property
    def token_ids(self) -> list[int]:
        """A copy of the tokens fed so far."""
        return list(self._tokens)

    def prefill(
        self, ids: Sequence[int], *, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Feed any number of tokens.

        Parameters
        ----------
        ids : sequence of int or ndarray of shape (n,)
        progress : callable, optional
            Called with (done, total) after each chunk.

        Raises
        ------
        ArgumentError
            Ids out of range, or more than the context holds; nothing was fed.
        Cancelled
            `cancel` was called; whole chunks before that stay fed, `pos` tells.
        """
        array = self._engine.check_ids(ids)
        if self.pos + len(array) > self.context:
            raise ArgumentError(
                f"{len(array)} tokens after {self.pos} exceed the context of {self.context}; "
                "open the engine with a larger context="
            )
        done = 0
        while done < len(array):
            done += self._feed(array[done:])
            if progress is not None:
                progress(done, len(array))

    def step(self, id: int) -> None:
        """Feed one token."""
        array = self._engine.check_ids([id])
        if self.pos == self.context:
            raise ArgumentError(
                f"the context of {self.context} tokens is full; "
                "open the engine with a larger context="
            )
        self._feed(array, step=True)
        governor.tick(self._engine)

    def logits(self) -> NDArray[np.float32]:
        """Return the scores of the next token, ndarray of shape (vocab,), float32.

        After `rewind` or `load` the last token is computed again to have them.
        """
        with self._owner.exclusive():
            self._make_logits()
            return np.asarray(self.core.logits())

    def read_logits(self, fn: Callable[[NDArray[np.float32]], T]) -> T:
        """Return ``fn(row)``, the row being what `logits` returns, but read-only and not copied.

        The row is the session's own memory: the next call may change it.

        Raises
        ------
        BufferError
            `fn` kept the row, or an array over it.

        Examples
        --------
        >>> import numpy as np
        >>> from flashmoe import Engine
        >>> with Engine(memory="2GiB") as engine, engine.session() as session:
        ...     session.prefill([1, 2, 3])
        ...     int(session.read_logits(np.argmax)) == int(session.logits().argmax())
        True
        """
        with self._owner.exclusive():
            self._make_logits()
            return cast("T", self.core.read_logits(fn))

    def rewind(self, n: int) -> None:
        """Go back to the state after the first `n` tokens.

        Attention layers just forget; recurrent layers go back to the nearest kept state (see
        `checkpoint`) and the tokens from there on are computed again.
        """
        if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or not 0 <= n <= self.pos:
            raise ArgumentError(f"rewind({n!r}): the session holds 0..{self.pos} tokens")
        if n == self.pos:
            return
        with self._owner.exclusive():
            self._check()
            target = self._tokens[: int(n)]
            self._back_to(int(n), replay_to=int(n))
            assert self._tokens == target

    def checkpoint(self) -> None:
        """Remember the present state, so that `rewind` to here costs nothing.  One is kept."""
        with self._owner.exclusive():
            self._check()
            self.core.checkpoint()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write state and tokens to a file; an existing one is replaced in one go."""
        with self._owner.exclusive():
            self._check()
            state = self.core.save()
        tokens = np.asarray(self._tokens, dtype="<i4").tobytes()
        header = json.dumps(
            {
                "model": self._engine.fingerprint,
                "n_tokens": self.pos,
                "state_bytes": len(state),
                "crc32c": _crc(tokens, state),
            }
        ).encode()
        path = Path(path)
        try:
            with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
                try:
                    f.write(_MAGIC + struct.pack("<I", len(header)) + header + tokens + state)
                    f.flush()
                    os.fsync(f.fileno())
                    os.replace(f.name, path)
                except BaseException:
                    os.unlink(f.name)
                    raise
        except OSError as e:
            raise StorageError(e.errno, e.strerror, str(path)) from e

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take over the state of a file written by `save` with the same model.

        Raises
        ------
        ModelFileError
            The file is damaged or of another model; the session stays as it is.
        """
        try:
            data = Path(path).read_bytes()
        except OSError as e:
            raise StorageError(e.errno, e.strerror, str(path)) from e
        header, body = _parse(data, path)
        if header["model"] != self._engine.fingerprint:
            raise ModelFileError(f"{path}: saved with another model or experts_per_token")
        n = header["n_tokens"]
        if n > self.context:
            raise ArgumentError(f"{path}: {n} tokens, the context holds {self.context}")
        tokens = np.frombuffer(body[: 4 * n], dtype="<i4")
        checked = self._engine.check_ids(tokens) if n else tokens
        with self._owner.exclusive():
            self._check()
            self.core.load(body[4 * n :])
            self._tokens = checked.tolist()
            self._has_logits = False

    def cancel(self) -> None:
        """Make the running call, or else the next one, raise `Cancelled`; from any thread."""
        with contextlib.suppress(StateError):  # closed meanwhile: nothing runs any more
            self.core.cancel()

    def close(self) -> None:
        """Give the state's memory back; closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._owner.remove(self)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.pos} of {self.context} tokens"
        return f"<flashmoe.Session: {state}>"

    def _make_logits(self) -> None:
        self._check()
        if not self._tokens:
            raise StateError("a session without tokens has no logits; prefill first")
        if not self._has_logits:
            self._back_to(self.pos - 1)

    def _check(self) -> None:
        if self._closed:
            raise StateError("the session is closed")

    def _feed(self, ids: NDArray[np.int32], *, step: bool = False) -> int:
        """Run one chunk and return how many tokens it took."""
        with self._owner.exclusive():
            self._check()
            if step:
                self.core.step(int(ids[0]))
                n = 1
            else:
                n = int(self.core.prefill(ids))
            self._tokens.extend(ids[:n].tolist())
            self._has_logits = True
            return n

    def _back_to(self, n: int, replay_to: int | None = None) -> None:
        tokens = self._tokens
        end = self.pos if replay_to is None else replay_to
        got = int(self.core.rewind(n))
        self._tokens = tokens[:got]
        self._has_logits = False
        replay = np.asarray(tokens[got:end], dtype=np.int32)
        done = 0
        while done < len(replay):
            done += self._feed(replay[done:])


def model_fingerprint(desc: ModelDescription, experts_per_token: int) -> str:
    """Return a digest of all that makes a saved state fit: numbers, formats, sizes, checksums."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        digest.update(repr(value).encode() + b"\0")

    add((desc.arch, sorted(desc.config.items()), experts_per_token))
    add([n for _, n in desc.files])
    for t in desc.tensors:
        add((t.name, t.layer, t.format, t.shape, t.codes, t.scales, t.biases))
    for e in desc.experts:
        add((e.layer, e.gate, e.up, e.down))
        for a in (e.file, e.offset, e.crc32c):
            digest.update(b"-" if a is None else np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()


def _crc(tokens: bytes, state: bytes) -> int:
    from flashmoe._core import crc32c

    return int(crc32c(state, crc32c(tokens)))


def _parse(data: bytes, path: str | os.PathLike[str]) -> tuple[dict[str, Any], bytes]:
    if data[:8] != _MAGIC or len(data) < 12:
        raise ModelFileError(f"{path}: not a saved session")
    (size,) = struct.unpack_from("<I", data, 8)
    if 12 + size > len(data):
        raise ModelFileError(f"{path}: header of {size} bytes, the file has {len(data)}")
    try:
        header = json.loads(data[12 : 12 + size])
        n, state_bytes, crc = (int(header[k]) for k in ("n_tokens", "state_bytes", "crc32c"))
        header["model"]
    except (ValueError, KeyError, TypeError) as e:
        raise ModelFileError(f"{path}: damaged header: {e}") from e
    body = data[12 + size :]
    if n < 0 or state_bytes < 0 or 4 * n + state_bytes != len(body):
        raise ModelFileError(
            f"{path}: {n} tokens and {state_bytes} bytes of state, the file has {len(body)} bytes"
        )
    if _crc(body[: 4 * n], body[4 * n :]) != crc:
        raise ModelFileError(f"{path}: checksum mismatch, the file is damaged")
    return header, body
