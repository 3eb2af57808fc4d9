"""Text to token ids and back, by the checkpoint's own ``tokenizer.json``.

The work is done by the `tokenizers` library.  Ours is the incremental direction: text that grows
token by token and never shows half a character.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from flashmoe.config import load_json
from flashmoe.errors import ArgumentError, ModelFileError, TokenizerError

__all__ = ["Detokenizer", "Tokenizer"]


class Tokenizer:
    """The tokenizer of one checkpoint directory.

    Parameters
    ----------
    path : path-like
        The directory; ``tokenizer.json`` in it is read, ``tokenizer_config.json`` and
        ``special_tokens_map.json`` if they are there.

    Raises
    ------
    TokenizerError
        There is no ``tokenizer.json``.
    ModelFileError
        A file is damaged.

    Examples
    --------
    >>> from flashmoe.models import default_model
    >>> tokenizer = Tokenizer(default_model())
    >>> tokenizer.decode(tokenizer.encode("naïve café"))
    'naïve café'
    """

    def __init__(self, path: str | Path) -> None:
        from tokenizers import Tokenizer as Backend

        self.path = Path(path)
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise TokenizerError(
                f"{self.path}: no tokenizer.json, so text cannot be read or written; "
                "give token ids, or put the checkpoint's tokenizer.json there"
            )
        try:
            self._backend = Backend.from_file(str(file))
        except Exception as e:  # the library raises bare Exception
            raise ModelFileError(f"{file}: {e}") from e
        self._backend.no_truncation()
        self._backend.no_padding()
        self.config = _optional_json(self.path / "tokenizer_config.json")
        self._special_map = _optional_json(self.path / "special_tokens_map.json")
        added = self._backend.get_added_tokens_decoder()
        self._added = {int(i): str(t.content) for i, t in added.items()}
        self._special_ids = frozenset(int(i) for i, t in added.items() if t.special)

    @cached_property
    def n_vocab(self) -> int:
        """One more than the largest id in use; ids from there on are padding."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids marked special, which text leaves out."""
        return self._special_ids

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """The id of the tokenizer's own eos_token, if any; the model's config may name more."""
        eos = self.special_token("eos_token")
        id = self._backend.token_to_id(eos) if eos else None
        return frozenset() if id is None else frozenset([id])

    def special_token(self, name: str) -> str | None:
        """Return the text of ``"bos_token"``, ``"eos_token"``, ... or None."""
        value = self.config.get(name) or self._special_map.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the token ids of `text`.

        `add_special_tokens` is what the checkpoint adds by itself (often nothing); text from a
        chat template has them already.
        """
        if not isinstance(text, str):
            raise ArgumentError(f"text must be a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ArgumentError(f"text is not valid Unicode: {e.reason} at {e.start}") from e
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids; broken characters become U+FFFD."""
        stream = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return "".join([stream.feed(int(i)) for i in ids]) + stream.flush()

    def id_to_token(self, id: int) -> str | None:
        """Return the vocabulary's own spelling of an id, None for padding."""
        token: str | None = self._backend.id_to_token(id)
        return token

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token spelled as in the vocabulary."""
        id: int | None = self._backend.token_to_id(token)
        return id

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """Return a fresh incremental decoder."""
        skip = self._special_ids if skip_special_tokens else frozenset()
        if self._is_byte_level:
            return _ByteDetokenizer(self, skip)
        return _DiffDetokenizer(self, skip)

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        steps = decoder.get("decoders", [decoder])
        return [s.get("type") for s in steps] == ["ByteLevel"]

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes a token of a byte-level vocabulary stands for; b"" for padding."""
        if id in self._added:
            return self._added[id].encode()
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[c] for c in token)
        except KeyError:  # as the library: a token with a foreign character stands for itself
            return bytes(token.encode())

    def _decode_whole(self, ids: list[int]) -> str:
        text: str = self._backend.decode(ids, skip_special_tokens=False)
        return text


class Detokenizer:
    """Text that grows token by token; see :meth:`Tokenizer.detokenizer`."""

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skip = skip

    def feed(self, id: int) -> str:
        """Return the text that became certain with this token; it may be empty."""
        raise NotImplementedError

    def flush(self) -> str:
        """Return what is left, as U+FFFD if it is half a character, and start anew."""
        raise NotImplementedError


class _ByteDetokenizer(Detokenizer):
    """For byte-level vocabularies: exact bytes through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]) -> None:
        super().__init__(tokenizer, skip)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        return "" if id in self._skip else self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


class _DiffDetokenizer(Detokenizer):
    """For any other decoder: decode a growing window, hold back while it ends in U+FFFD.

    The window keeps the previous tokens, because decoders treat the first token of a text apart
    (a leading space).  After `_PATIENCE` tokens without a whole character it is shown as it is.
    """

    _PATIENCE = 8

    def __init__(self, tokenizer: Tokenizer, skip: frozenset[int]) -> None:
        super().__init__(tokenizer, skip)
        self._before: list[int] = []
        self._pending: list[int] = []

    def feed(self, id: int) -> str:
        if id in self._skip:
            return ""
        self._pending.append(id)
        text = self._text()
        if text.endswith("�") and len(self._pending) < self._PATIENCE:
            return ""
        if text:
            self._before, self._pending = self._pending, []
        return text

    def flush(self) -> str:
        text = self._text() if self._pending else ""
        self._before, self._pending = [], []
        return text

    def _text(self) -> str:
        known = self._tokenizer._decode_whole(self._before)
        return self._tokenizer._decode_whole(self._before + self._pending)[len(known) :]


def _byte_alphabet() -> dict[str, int]:
    # Source: the GPT-2 alphabet: printable bytes stand for themselves, others for 256, 257, ...
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _optional_json(path: Path) -> dict[str, Any]:
    return load_json(path) if path.is_file() else {}
