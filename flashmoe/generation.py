"""What is asked of a generation and what comes back, and the loop between the two.

Owns the options' defaults and ranges, stop strings and the token loop.  Knows no files; the engine
gives it a session.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from flashmoe.config import nearest
from flashmoe.errors import ArgumentError, Cancelled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flashmoe.sampling import Sampler
    from flashmoe.session import Session
    from flashmoe.tokenizer import Detokenizer

__all__ = [
    "Generation",
    "Piece",
    "SamplingConfig",
    "StopMatcher",
    "Timings",
    "TokenLogprob",
    "Usage",
    "collect",
    "generate_pieces",
]

# name: low, high, whether low itself is allowed
_RANGES: dict[str, tuple[float, float, bool]] = {
    "max_tokens": (1, 2**31 - 1, True),
    "temperature": (0, 100, True),
    "top_k": (0, 2**31 - 1, True),
    "top_p": (0, 1, False),
    "min_p": (0, 1, True),
    "repetition_penalty": (0, 10, False),
    "presence_penalty": (-2, 2, True),
    "frequency_penalty": (-2, 2, True),
    "seed": (0, 2**64 - 1, True),
    "logprobs": (0, 100, True),
}
_INTEGERS = {"max_tokens", "top_k", "seed", "logprobs"}


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """Options of one generation; wrong values and unknown names are refused.

    Parameters
    ----------
    max_tokens : int
        At most that many new tokens.
    temperature : float
        0 is greedy: always the most probable token.
    top_k : int
        Draw from the `top_k` most probable tokens; 0 is off.
    top_p : float
        Draw from the smallest set with at least this probability; 1 is off.
    min_p : float
        Drop tokens less probable than `min_p` times the most probable; 0 is off.
    repetition_penalty : float
        Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off.
    presence_penalty, frequency_penalty : float
        Subtracted from the logits of tokens in the output, once and per occurrence; 0 is off.
    logit_bias : mapping of int to float
        Added to the logits of these token ids; ``-inf`` forbids one.
    stop : str or sequence of str
        Generation ends before the first of these strings; they are not part of the text.
    seed : int or None
        The same seed gives the same text; None draws one, which the result names.
    logprobs : int or None
        Report log probabilities of the chosen token and of this many most probable ones.
    ignore_eos : bool
        Go on after an end-of-sequence token.

    Examples
    --------
    >>> SamplingConfig(temperature=0).temperature
    0.0
    """

    max_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 20
    top_p: float = 0.95
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: Sequence[str] = ()
    seed: int | None = None
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, (low, high, closed) in _RANGES.items():
            value = getattr(self, name)
            if value is None and name in ("seed", "logprobs"):
                continue
            object.__setattr__(self, name, _number(name, value, low, high, closed))
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if not all(isinstance(s, str) and s for s in stop):
            raise ArgumentError(f"stop={self.stop!r} must be one or more strings, none empty")
        object.__setattr__(self, "stop", stop)
        bias = dict(self.logit_bias or {})
        for key, value in bias.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not isinstance(key, int) or not number or math.isnan(value) or value == math.inf:
                raise ArgumentError(f"logit_bias: {key!r}: {value!r} must map an id to a number")
        object.__setattr__(self, "logit_bias", bias)
        if not isinstance(self.ignore_eos, bool):
            raise ArgumentError(f"ignore_eos={self.ignore_eos!r} must be True or False")

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> SamplingConfig:
        """Build from keyword options; an unknown name is refused with the nearest known one."""
        known = {f.name for f in fields(cls)}
        for name in options:
            if name not in known:
                raise ArgumentError(
                    f"unknown option {name!r}{nearest(name, known)}; known: "
                    + ", ".join(sorted(known))
                )
        return cls(**options)

    def with_seed(self) -> SamplingConfig:
        """Return the same with a seed drawn from the system if there is none."""
        if self.seed is not None:
            return self
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return SamplingConfig(**{**values, "seed": int.from_bytes(os.urandom(8), "little")})

    def sampler(self, n_vocab: int, n_vocab_used: int) -> Sampler:
        """Return a fresh sampler with these options."""
        from flashmoe.sampling import Sampler

        return Sampler(
            n_vocab,
            n_vocab_used,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=dict(self.logit_bias),
            seed=self.with_seed().seed or 0,
        )


def _number(name: str, value: Any, low: float, high: float, closed: bool) -> int | float:
    integral = name in _INTEGERS
    kinds = (int, np.integer) if integral else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ArgumentError(f"{name}={value!r} must be {'an integer' if integral else 'a number'}")
    if not (low <= value if closed else low < value) or not value <= high:
        left = "[" if closed else "("
        raise ArgumentError(f"{name}={value!r} must be in {left}{low:g}, {high:g}]")
    return int(value) if integral else float(value)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural log probability of a token by the model's own distribution, and of its rivals.

    ``top`` holds (token id, log probability), most probable first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock times [seconds] of the prompt and of the tokens after the first."""

    prefill_seconds: float
    decode_seconds: float
    prefill_tokens: int
    decode_tokens: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed of reading the prompt."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of writing; the first token belongs to the prompt."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step of a stream brings; the last piece has a ``finish_reason``.

    ``text`` may be empty: a character is never cut, and what may be the start of a stop string is
    held back.  ``finish_reason`` is None, "stop", "length" or "cancelled"; ``stopped_by`` is the
    stop string or the end token's id.
    """

    text: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stopped_by: str | int | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished generation; ``str()`` is its text.

    ``token_ids`` and ``usage`` do not count the end token.  ``experts_per_token`` is what ran,
    ``trained_experts_per_token`` what the checkpoint was trained with; ``numeric`` is "exact", or
    "fast" if activations were rounded; ``kv_format`` is that of the attention's keys and values.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stopped_by: str | int | None
    usage: Usage
    timings: Timings
    logprobs: list[TokenLogprob] | None
    seed: int
    model: str
    experts_per_token: int
    trained_experts_per_token: int
    numeric: str
    kv_format: str

    def __str__(self) -> str:
        return self.text


class StopMatcher:
    """Finds stop strings in text that comes in pieces, holding back what may be the start of one.

    >>> matcher = StopMatcher(["END"])
    >>> matcher.feed("fine E"), matcher.feed("ND of it")
    (('fine ', None), ('', 'END'))
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Return the text that is safe to show, and the stop string found or None."""
        text = self._held + text
        hits = [(at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if hits:
            at, stop = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            self._held = ""
            return text[:at], stop
        keep = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(text)), keep, -1):
                if text.endswith(stop[:n]):
                    keep = n
                    break
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


def generate_pieces(
    session: Session,
    ids: Sequence[int],
    config: SamplingConfig,
    *,
    n_vocab: int,
    n_vocab_used: int,
    eos_ids: Collection[int],
    detokenizer: Detokenizer | None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Piece]:
    """Prefill `ids` into `session`, then yield one piece per token and end with a finish reason."""
    sampler = config.sampler(n_vocab, n_vocab_used)
    sampler.observe_prompt(ids)
    matcher = StopMatcher(config.stop)
    n_new, reason, stopped_by = 0, "length", None  # type: int, str, str | int | None
    text, token_ids, logprobs = "", [], []  # type: str, list[int], list[TokenLogprob]
    started = time.perf_counter()
    first = None  # when the first token was there

    def new_text(ids: Iterable[int]) -> str:
        return "".join(detokenizer.feed(i) for i in ids) if detokenizer is not None else ""

    def draw(row: NDArray[np.float32]) -> tuple[int, tuple[TokenLogprob, ...]]:
        token = sampler.sample(row)
        if config.logprobs is None:
            return token, ()
        chosen, top_ids, top = sampler.logprobs(row, token, config.logprobs)
        rivals = tuple((int(i), float(p)) for i, p in zip(top_ids, top))
        return token, (TokenLogprob(token, chosen, rivals),)

    try:
        session.prefill(ids, progress=progress)
        while True:
            token, of_token = session.read_logits(draw)
            first = first or time.perf_counter()
            if token in eos_ids and not config.ignore_eos:
                reason, stopped_by = "stop", token
                break
            sampler.accept(token)
            n_new += 1
            token_ids, logprobs = [token], list(of_token)
            text, hit = matcher.feed(new_text(token_ids))
            if hit is not None:
                reason, stopped_by = "stop", hit
                break
            if n_new == config.max_tokens or session.pos == session.context:
                break
            yield Piece(text, tuple(token_ids), tuple(logprobs))
            text, token_ids, logprobs = "", [], []
            session.step(token)
    except Cancelled:
        reason = "cancelled"
    if not isinstance(stopped_by, str):  # the tail; it may still complete a stop string
        tail, hit = matcher.feed(detokenizer.flush() if detokenizer is not None else "")
        text += tail
        if hit is not None:
            reason, stopped_by = "stop", hit
        else:
            text += matcher.flush()
    now = time.perf_counter()
    first = first or now
    yield Piece(
        text,
        tuple(token_ids),
        tuple(logprobs),
        finish_reason=reason,
        stopped_by=stopped_by,
        usage=Usage(len(ids), n_new),
        timings=Timings(first - started, now - first, len(ids), max(n_new - 1, 0)),
    )


def collect(
    pieces: Iterable[Piece], config: SamplingConfig, identity: Mapping[str, Any]
) -> Generation:
    """Drain a stream into a :class:`Generation`."""
    text, token_ids, logprobs = [], [], []  # type: list[str], list[int], list[TokenLogprob]
    last = None
    for piece in pieces:
        text.append(piece.text)
        token_ids.extend(piece.token_ids)
        logprobs.extend(piece.logprobs)
        last = piece
    assert last is not None
    assert last.finish_reason is not None
    assert last.usage is not None
    assert last.timings is not None
    return Generation(
        text="".join(text),
        token_ids=token_ids,
        finish_reason=last.finish_reason,
        stopped_by=last.stopped_by,
        usage=last.usage,
        timings=last.timings,
        logprobs=logprobs if config.logprobs is not None else None,
        seed=config.seed or 0,
        **identity,
    )
