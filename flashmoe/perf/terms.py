"""The two terms of a forward, each measured alone: reads without compute, compute without reads.

The larger one bounds the speed.  Reads alone are the recorded forward's own, made again into the
same slots by the same method while nothing computes.  A token's compute alone is the token taken
again from the position before it: the experts it wants are in their slots then.  Tokens are
measured in rounds of a few, each with its own terms right after it: the speed of a disk may drift
within seconds, the share of what it gives at the time does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.perf.runner import Runner, random_ids
from flashmoe.perf.timeline import repeated_reads

__all__ = ["measure_terms", "terms_context"]

_EVENTS = 1 << 19
WARM_TOKENS = 16
ROUND_TOKENS = 4
MEASURED, NOT_WAITING = "measured alone", "time not waiting for reads"


def terms_context(prompt_tokens: int, gen_tokens: int) -> int:
    """Return the positions that `measure_terms` uses: it makes every token, then once more."""
    return prompt_tokens + WARM_TOKENS + 2 * gen_tokens


def measure_terms(
    runner: Runner, prompt_tokens: int, gen_tokens: int, *, seed: int = 1
) -> dict[str, dict[str, Any]]:
    """Measure a new prompt and tokens after it, and both terms of each.

    Parameters
    ----------
    runner : Runner
        With a context of `terms_context` positions or more.
    prompt_tokens, gen_tokens : int
        Tokens to read, and to make.  WARM_TOKENS more are taken before those that count: the
        prompt left its own experts behind.
    seed : int
        Of the token ids.

    Returns
    -------
    dict
        ``"prefill"`` and ``"decode"``, each with ``seconds``, ``io_seconds`` (of the experts that
        were needed), ``compute_seconds``, ``larger_term``, ``share_of_larger_term``,
        ``io_gb_per_s`` (reads alone) and ``device_share`` (GB/s of the run over that).  Times of
        decode are per token, medians over ``rounds`` of ROUND_TOKENS; the share also has its
        ``share_min`` and ``share_max``.  ``compute_is`` says whether compute was measured alone or
        is the time not spent waiting for reads.  Prefill has
        ``experts_read_twice_in_a_forward``.
    """
    ids = random_ids(runner.vocab_size, prompt_tokens + WARM_TOKENS + gen_tokens, seed, 77)
    session = runner.core.session()
    try:
        prompt, tokens = ids[:prompt_tokens], ids[prompt_tokens + WARM_TOKENS :]
        prefill, events = _recorded(runner, lambda: _prefill(session, prompt))
        record = runner.plan.experts_bytes // max(runner.plan.n_experts, 1)
        kinds = _kinds()
        out = {"prefill": _term(runner, prefill, events, lambda: None)}
        out["prefill"]["experts_read_twice_in_a_forward"] = repeated_reads(events, kinds, record)
        for token in ids[prompt_tokens : prompt_tokens + WARM_TOKENS]:
            session.step(int(token))
        rounds = [tokens[i : i + ROUND_TOKENS] for i in range(0, len(tokens), ROUND_TOKENS)]
        out["decode"] = _medians([_round(runner, session, part) for part in rounds])
    finally:
        session.close()
    return out


def _kinds() -> list[str]:
    from flashmoe import _core

    return _core.trace_kinds()


def _prefill(session: Any, prompt: NDArray[np.int32]) -> None:
    done = 0
    while done < len(prompt):
        done += session.prefill(prompt[done:])


def _steps(session: Any, tokens: NDArray[np.int32]) -> None:
    for token in tokens:
        session.step(int(token))


def _round(runner: Runner, session: Any, tokens: NDArray[np.int32]) -> dict[str, Any]:
    """Return the terms of some tokens, per token."""
    decode, events = _recorded(runner, lambda: _steps(session, tokens))
    term = _term(runner, decode, events, lambda: _compute_alone(runner, session, tokens))
    for name in ("seconds", "io_seconds", "compute_seconds", "bytes_read"):
        term[name] /= len(tokens)
    return term


def _medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return one term of several: medians of its numbers, the spread of its share."""
    shares = [r["share_of_larger_term"] for r in rounds]
    numbers = [name for name, value in rounds[0].items() if isinstance(value, float)]
    out = {**rounds[0], **{n: float(np.median([r[n] for r in rounds])) for n in numbers}}
    measured = all(r["compute_is"] == MEASURED for r in rounds)
    out["compute_is"] = MEASURED if measured else NOT_WAITING
    out["larger_term"] = "I/O" if out["io_seconds"] > out["compute_seconds"] else "compute"
    return {**out, "rounds": len(rounds), "share_min": min(shares), "share_max": max(shares)}


def _recorded(runner: Runner, work: Any) -> tuple[dict[str, Any], NDArray[Any]]:
    """Return the counters with ``"seconds"``, and the events."""
    runner.core.reset_stats()
    runner.core.trace_start(_EVENTS)
    try:
        began = time.perf_counter()
        work()
        seconds = time.perf_counter() - began
    finally:
        events, _ = runner.core.trace_take(_EVENTS)
    return {**runner.core.stats(), "seconds": seconds}, events


def _compute_alone(runner: Runner, session: Any, tokens: NDArray[np.int32]) -> float | None:
    """Return the seconds of the tokens with every expert in its slot; None if they do not fit."""
    seconds, hits, asked = 0.0, 0, 0
    for token in tokens:
        at = session.pos
        session.step(int(token))
        session.rewind(at)
        runner.core.reset_stats()
        began = time.perf_counter()
        session.step(int(token))
        seconds += time.perf_counter() - began
        stats = runner.core.stats()
        hits, asked = hits + stats["hits"], asked + stats["hits"] + stats["misses"]
    return seconds if hits >= 0.99 * asked else None


def _term(
    runner: Runner,
    stats: Mapping[str, Any],
    events: NDArray[Any],
    compute_alone: Callable[[], float | None],
) -> dict[str, Any]:
    kinds = _kinds()
    reads = events[np.isin(events["kind"], [kinds.index("read"), kinds.index("guess")])]
    reads = reads[reads["bytes"] > 0]
    n_bytes = int(reads["bytes"].sum())
    where = np.stack([reads["layer"], reads["id"]], axis=1).astype(np.int32)
    _, first = np.unique(where, axis=0, return_index=True)
    where = np.ascontiguousarray(where[np.sort(first)])
    seconds = float(stats["seconds"])
    rate = 0.0
    if len(where):
        runner.core.reset_stats()
        alone = runner.core.reread(where[:, 0].copy(), where[:, 1].copy())
        rate = runner.core.stats()["bytes_read"] / max(alone, 1e-9)
    needed = n_bytes - int(stats["guess_wasted_bytes"])
    io = max(needed, 0) / rate if rate else 0.0
    compute = compute_alone()
    measured = compute is not None
    compute = compute if compute is not None else max(seconds - stats["wait_ns"] * 1e-9, 0.0)
    return {
        "seconds": seconds, "io_seconds": io, "compute_seconds": compute,
        "compute_is": MEASURED if measured else NOT_WAITING,
        "larger_term": "I/O" if io > compute else "compute",
        "share_of_larger_term": max(io, compute) / max(seconds, 1e-9),
        "io_gb_per_s": rate * 1e-9, "bytes_read": n_bytes,
        "device_share": n_bytes / max(seconds, 1e-9) / rate if rate else 0.0,
    }  # fmt: skip
