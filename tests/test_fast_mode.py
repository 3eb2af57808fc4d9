"""Numeric mode `fast`: near the goldens of the tiny models, and the same text on the trained demo model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from engines import core_desc, core_engine, golden, golden_names, greedy, ids_of, prompts, worst

from flashmoe import Engine, _core

FAST_BOUND = 0.05
"""Largest difference of a logit from the float64 golden; the exact mode's is 1e-3."""
NAMES = [n for n in golden_names() if any("affine" in str(t) for t in core_desc(n)["tensors"])]
HELDOUT_TEXT = Path(__file__).resolve().parent.parent / "tools" / "demo_model" / "heldout"
HELDOUT = ("austen", "sotu", "sqlite-doc", "wordnet-glosses")


def test_quantised_goldens_exist():
    assert len(NAMES) >= 3


@pytest.mark.parametrize("variant", _core.cpu_variants())
@pytest.mark.parametrize("name", NAMES)
def test_golden(name, variant, monkeypatch):
    """Rounding to 2^-15 is 512 times coarser than f32, and so is the bound; random weights amplify.

    Where two experts tie within that rounding the choice may differ; rows from there on are not
    compared, but there may be only one such place in a prompt.
    """
    monkeypatch.setenv("FLASHMOE_CPU", variant)
    z = golden(name)
    with core_engine(name, numeric="fast") as engine:
        assert engine.info["numeric"] == "fast"
        for p in prompts(name):
            session = engine.session()
            out = engine.forward([session], [ids_of(name, p)], all_logits=True, trace_router=True)
            differ = np.sort(out["router"], -1) != np.sort(
                z[f"{p}.router_idx"].astype(np.int64), -1
            )
            places = np.argwhere(differ.any(-1))  # (row, layer)
            n = len(differ) if len(places) == 0 else int(places[0, 0])
            assert len(places) == 0 or n >= len(differ) // 2, f"{p}: other experts in row {n}"
            assert worst(out["logits"][:n], z[f"{p}.logits_f64"][:n]) <= FAST_BOUND, p
            want = z[f"{p}.greedy_tokens"].tolist()
            tokens, _ = greedy(session, len(want) - 1)
            assert tokens == want, p
            session.close()


def test_demo_model_keeps_its_choices():
    """At least 99 % of the arg-maxes and the perplexity within 0.5 %, on text the model never saw."""
    same = total = 0
    nats = {"exact": 0.0, "fast": 0.0}
    with Engine(numeric="exact") as exact, Engine(numeric="fast") as fast:
        for name in HELDOUT:
            path = HELDOUT_TEXT / f"{name}.u16"
            ids = np.fromfile(path, np.uint16).astype(np.int32)[:400]
            best = {}
            for mode, engine in (("exact", exact), ("fast", fast)):
                logits = engine.logits(ids[:-1]).astype(np.float64)
                top = logits.max(-1, keepdims=True)
                log_sum = np.log(np.exp(logits - top).sum(-1)) + top[:, 0]
                nats[mode] += float((log_sum - logits[np.arange(len(ids) - 1), ids[1:]]).sum())
                best[mode] = logits.argmax(-1)
            same += int((best["exact"] == best["fast"]).sum())
            total += len(ids) - 1
    assert same >= 0.99 * total, f"{same} of {total}"
    assert abs(nats["fast"] - nats["exact"]) / total < np.log(1.005)
