"""Which experts a run picked: recording it, keeping it, and what caches would have made of it."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import ArgumentError, ModelFileError, StorageError
from flashmoe.perf.policies import simulate
from flashmoe.perf.runner import Runner

__all__ = ["RoutingTrace", "load_trace", "record", "replay"]

VERSION = 1


@dataclass(frozen=True, slots=True)
class RoutingTrace:
    """The routing of one run.

    ``ids`` is an ndarray of shape (n_rows, n_layers, k), int32: the experts of every row and layer,
    -1 in layers without.  ``forwards`` says how many rows each forward had; the first ``n_prompt``
    rows are the prompt's.
    """

    ids: NDArray[np.int32]
    tokens: NDArray[np.int32]  # (n_rows,)
    forwards: NDArray[np.int64]
    n_prompt: int
    n_experts: int
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def n_keys(self) -> int:
        """Experts of all MoE layers."""
        return int((self.ids[0, :, 0] >= 0).sum()) * self.n_experts if len(self.ids) else 0

    def counts(self, part: str = "all") -> NDArray[np.int64]:
        """Return how often each expert was picked, ndarray of shape (n_layers, n_experts)."""
        ids = self.ids[_rows(self, part)]
        out = np.zeros((ids.shape[1], self.n_experts), np.int64)
        for layer in range(ids.shape[1]):
            chosen = ids[:, layer].reshape(-1)
            out[layer] = np.bincount(chosen[chosen >= 0], minlength=self.n_experts)
        return out

    def waves(self, part: str = "decode") -> Iterator[list[int]]:
        """Yield the keys that each layer wants at a time, rising, row after row."""
        for row in self.ids[_rows(self, part)]:
            for layer, chosen in enumerate(row):
                if chosen[0] >= 0:
                    yield sorted(layer * self.n_experts + int(e) for e in set(chosen.tolist()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write an ``.npz`` file."""
        meta = {**self.meta, "version": VERSION, "n_prompt": self.n_prompt,
                "n_experts": self.n_experts}  # fmt: skip
        try:
            with open(path, "wb") as f:
                np.savez_compressed(
                    f, ids=self.ids.astype(np.int16 if self.n_experts < 1 << 15 else np.int32),
                    tokens=self.tokens, forwards=self.forwards, meta=np.array(json.dumps(meta)),
                )  # fmt: skip
        except OSError as e:
            raise StorageError(e.errno, e.strerror, str(path)) from e


def _rows(trace: RoutingTrace, part: str) -> slice:
    parts = {"all": slice(None), "prompt": slice(0, trace.n_prompt),
             "decode": slice(trace.n_prompt, None)}  # fmt: skip
    if part not in parts:
        raise ArgumentError(f"part {part!r}; there are: {', '.join(parts)}")
    return parts[part]


def load_trace(path: str | os.PathLike[str]) -> RoutingTrace:
    """Read what :meth:`RoutingTrace.save` wrote.

    Raises
    ------
    ModelFileError
        It is no such file, or its arrays contradict each other.
    """
    try:
        with np.load(path, allow_pickle=False) as z:
            meta = json.loads(str(z["meta"]))
            ids, tokens, forwards = (z[k] for k in ("ids", "tokens", "forwards"))
        n_prompt, n_experts = int(meta.pop("n_prompt")), int(meta.pop("n_experts"))
        version = meta.pop("version")
    except FileNotFoundError as e:
        raise StorageError(e.errno, e.strerror, str(path)) from e
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise ModelFileError(f"{path}: not a routing trace: {e}") from e
    ok = (
        version == VERSION and ids.ndim == 3 and ids.dtype.kind == "i" and ids.shape[2] >= 1
        and tokens.shape == ids.shape[:1] and forwards.ndim == 1
        and int(forwards.sum()) == len(ids) and 0 <= n_prompt <= len(ids)
        and (ids.size == 0 or (int(ids.min()) >= -1 and int(ids.max()) < n_experts))
    )  # fmt: skip
    if not ok:
        raise ModelFileError(f"{path}: a routing trace whose arrays contradict each other")
    return RoutingTrace(ids.astype(np.int32), tokens.astype(np.int32), forwards.astype(np.int64),
                        n_prompt, n_experts, meta)  # fmt: skip


def record(
    runner: Runner,
    prompt: NDArray[np.int32],
    n_gen: int,
    *,
    feed: NDArray[np.int32] | None = None,
    stop_ids: Sequence[int] = (),
) -> RoutingTrace:
    """Run a prompt and `n_gen` tokens and return the routing.

    Parameters
    ----------
    runner : Runner
    prompt : ndarray of shape (n,), int32
    n_gen : int
    feed : ndarray of shape (n_gen,), int32, optional
        Tokens to go on with; by default the most probable ones.
    stop_ids : sequence of int
        Tokens that end the run early, if chosen.
    """
    if not runner.prepared.desc.experts:
        raise ArgumentError(f"{runner.plan.model}: a dense model routes nothing")
    session = runner.core.session()
    chunk = runner.plan.prefill_chunk
    ids, tokens, forwards = [], [], []
    try:
        pieces = [prompt[i : i + chunk] for i in range(0, len(prompt), chunk)]
        for piece in pieces:
            ids.append(_forward(runner, session, piece))
            tokens.append(piece)
            forwards.append(len(piece))
        for i in range(n_gen):
            token = int(session.read_logits(np.argmax))
            if token in stop_ids and feed is None:
                break
            one = np.array([feed[i] if feed is not None else token], np.int32)
            ids.append(_forward(runner, session, one))
            tokens.append(one)
            forwards.append(1)
    finally:
        session.close()
    plan = runner.plan
    meta = {"model": plan.model, "arch": plan.arch, "experts_per_token": plan.experts_per_token,
            "trained_experts_per_token": plan.trained_experts_per_token,
            "slot_bytes": plan.slot_bytes,
            "feed": "given" if feed is not None else "greedy"}  # fmt: skip
    return RoutingTrace(
        np.concatenate(ids), np.concatenate(tokens), np.array(forwards, np.int64), len(prompt),
        int(runner.prepared.desc.config["num_experts"]), meta,
    )  # fmt: skip


def _forward(runner: Runner, session: Any, ids: NDArray[np.int32]) -> NDArray[np.int32]:
    out = runner.core.forward([session], [np.ascontiguousarray(ids)], trace_router=True)
    return np.asarray(out["router"], np.int32)


def replay(
    trace: RoutingTrace, slots: Sequence[int], policies: Sequence[str], part: str = "decode"
) -> list[dict[str, Any]]:
    """Return the hit rate of every policy and size, the cache empty at first.

    Rows go through one after the other, as decoding does; a prompt's rows too, although the engine
    reads a chunk layer by layer.
    """
    waves = list(trace.waves(part))
    if not waves:
        raise ArgumentError(f"the trace has no rows in its part {part!r}")
    out = []
    for n in slots:
        for policy in policies:
            hits, asked = simulate(policy, n, waves)
            out.append({"n_slots": n, "share": n / max(trace.n_keys, 1), "policy": policy,
                        "hits": hits, "asked": asked, "hit_rate": hits / asked})  # fmt: skip
    return out
