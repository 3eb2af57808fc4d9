"""A core engine opened for measuring: any option of the core, prompts of token ids, counters.

The same preparation and memory plan as :class:`flashmoe.Engine`; the token loop is the bare one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe import _core
from flashmoe.errors import UnsupportedError
from flashmoe.memory import MemoryPlan
from flashmoe.prepare import prepare

__all__ = ["PHASES", "Measured", "Runner", "random_ids"]

PHASES = ("embed", "attention", "delta", "router", "experts", "wait", "shared", "mlp", "head")
"""Parts of a forward, as the core counts them; "wait" is waiting for reads."""

Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Measured:
    """One prompt and its continuation: times [seconds] and the core's counters of each part."""

    prompt_tokens: int
    decode_tokens: int  # after the first, which belongs to the prompt
    first_token_seconds: float
    decode_seconds: float
    token_seconds: tuple[float, ...]
    prefill: Mapping[str, int]
    decode: Mapping[str, int]


class Runner:
    """A core engine with the plan it was opened by; close it, or use it in a ``with``.

    Parameters
    ----------
    model : str
        Checkpoint directory.
    core_opts : mapping
        Options of the core on top of the plan's, such as ``n_slots``.
    **options
        Of :func:`flashmoe.prepare.prepare`.
    """

    def __init__(
        self, model: str | None, core_opts: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        prepared = prepare(model, **options)
        extra = {k: v for k, v in (core_opts or {}).items() if v is not None}
        began = time.perf_counter()
        try:
            self.core = _core.Engine(prepared.core_desc, {**prepared.core_opts(), **extra})
        except UnsupportedError as e:
            if options.get("io", "auto") != "auto" or not prepared.plan.io_direct:
                raise
            prepared = prepared.without_direct(str(e))
            self.core = _core.Engine(prepared.core_desc, {**prepared.core_opts(), **extra})
        self.open_seconds = time.perf_counter() - began
        self.prepared = prepared
        self.opts = {**prepared.core_opts(), **extra}
        self.path = prepared.path

    @property
    def plan(self) -> MemoryPlan:
        """The memory plan."""
        return self.prepared.plan

    @property
    def vocab_size(self) -> int:
        """Token ids are below this."""
        return int(self.prepared.desc.config["vocab_size"])

    def expert_files(self) -> list[str]:
        """Return the files that hold routed experts, each once."""
        used = sorted({int(f) for e in self.prepared.desc.experts for f in np.unique(e.file)})
        return [self.prepared.desc.files[i][0] for i in used]

    def files(self) -> list[str]:
        """Return every file of the checkpoint."""
        return [path for path, _ in self.prepared.desc.files]

    def measure(self, prompt: Ids, n_gen: int, feed: Ids | None = None) -> Measured:
        """Read a prompt and make `n_gen` tokens in a new session.

        Parameters
        ----------
        prompt : ndarray of shape (n,), int32
        n_gen : int
        feed : ndarray of shape (n_gen - 1,), int32, optional
            Tokens to go on with; by default the most probable ones.
        """
        session = self.core.session()
        try:
            self.core.reset_stats()
            began = time.perf_counter()
            done = 0
            while done < len(prompt):
                done += session.prefill(prompt[done:])
            token = int(session.read_logits(np.argmax))
            first = time.perf_counter()
            prefill = self.core.stats()
            self.core.reset_stats()
            marks = [time.perf_counter()]
            for i in range(n_gen - 1):
                session.step(int(feed[i]) if feed is not None else token)
                token = int(session.read_logits(np.argmax))
                marks.append(time.perf_counter())
            decode = self.core.stats()
        finally:
            session.close()
        return Measured(
            len(prompt), n_gen - 1, first - began, marks[-1] - marks[0],
            tuple(b - a for a, b in pairwise(marks)), prefill, decode,
        )  # fmt: skip

    def events(self, prompt: Ids, n_gen: int, feed: Ids | None = None,
               capacity: int = 1 << 18) -> tuple[NDArray[Any], int]:  # fmt: skip
        """Like `measure`, returning the core's timed events and how many did not fit."""
        self.core.trace_start(capacity)
        try:
            self.measure(prompt, n_gen, feed)
        finally:
            events, n_lost = self.core.trace_take(capacity)
        return events, n_lost

    def close(self) -> None:
        """Free everything."""
        self.core.close()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def random_ids(vocab_size: int, n: int, *seed: int) -> Ids:
    """Return token ids that depend on every number of `seed`, ndarray of shape (n,), int32."""
    rng = np.random.default_rng([n, *seed])
    return rng.integers(0, vocab_size, n, dtype=np.int32)
