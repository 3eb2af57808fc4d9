"""What the tests of the running core share: the golden models, and engines straight on `_core`."""

from __future__ import annotations

from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np

from flashmoe import _core
from flashmoe.checkpoint import open_checkpoint

GOLDEN = Path(__file__).resolve().parent / "golden"
BOUND = 1e-3
"""Largest difference of a logit from the float64 golden."""
CHUNK_BOUND = 2e-4
"""The same between two ways of cutting one prompt. Kernels of a backend may sum differently for many
rows than for few (`tests/metal/metal_core_plugin.py` raises it and says why)."""
SAME_BITS = True
"""Whether models without recurrent layers then keep every bit."""
STAND_IN = False
"""Whether a stand-in plays the device, lane by lane: what repeats itself then does so less often."""


def golden_names() -> list[str]:
    """Return every golden model and twin, such as ``"q35moe_base/mlx4"``."""
    directories = [p.parent for p in GOLDEN.rglob("golden.npz")]
    return sorted(str(d.relative_to(GOLDEN)) for d in directories if (d / "config.json").exists())


@cache
def golden(name: str) -> dict[str, np.ndarray]:
    """Return a model's golden arrays."""
    with np.load(GOLDEN / name / "golden.npz") as z:
        return {k: z[k] for k in z}


def prompts(name: str) -> list[str]:
    """Return the names of a model's prompts, the shortest first."""
    z = golden(name)
    return sorted((k[:-4] for k in z if k.endswith(".ids")), key=lambda p: len(z[p + ".ids"]))


def ids_of(name: str, prompt: str) -> np.ndarray:
    """Return a prompt, ndarray of shape (n,), int32."""
    return golden(name)[f"{prompt}.ids"].astype(np.int32)


@cache
def _described(path: Path):
    return open_checkpoint(path)


def core_desc(path) -> dict:
    """Return a fresh dict for ``_core.Engine``; relative names are golden models."""
    return _described(GOLDEN / path).to_core()


def n_experts(desc: dict) -> int:
    """Return how many routed experts a model has in all layers together."""
    return sum(len(e["file"]) for e in desc["experts"])


@contextmanager
def core_engine(model, *, slots: int | str | None = "all", **opts):
    """Open a core engine on a golden model's name, a path or a description; close it.

    Parameters
    ----------
    model : str, path-like or dict
    slots : int, "all" or None
        Expert slots; None is the smallest number that works.
    **opts
        Options of the core; context 256, 2 threads by default.
    """
    desc = model if isinstance(model, dict) else core_desc(model)
    n = n_experts(desc) if slots == "all" else slots or 0
    engine = _core.Engine(desc, {"context": 256, "n_threads": 2, "n_slots": n, **opts})
    try:
        yield engine
    finally:
        engine.close()


def run(engine, ids, *, chunk: int | None = None, session=None):
    """Feed ids in chunks; return (logits of every row, the session)."""
    session = session or engine.session()
    ids = np.ascontiguousarray(ids, dtype=np.int32)
    step = chunk or len(ids)
    parts = [
        engine.forward([session], [ids[i : i + step]], all_logits=True)["logits"]
        for i in range(0, len(ids), step)
    ]
    return np.concatenate(parts), session


def greedy(session, n: int) -> tuple[list[int], np.ndarray]:
    """Take n greedy steps; return the tokens (n + 1) and the logits of the steps (n, vocab)."""
    tokens, rows = [int(session.logits().argmax())], []
    for _ in range(n):
        session.step(tokens[-1])
        rows.append(session.logits())
        tokens.append(int(rows[-1].argmax()))
    return tokens, np.stack(rows)


def worst(a, b) -> float:
    """Return the largest absolute difference."""
    assert a.shape == b.shape
    return float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
