"""Every architecture against float64: logits, greedy tokens, router sets, residual stream.

The goldens are the float64 oracle's, made after the reference implementation agreed with it
(``tests/golden/make_goldens.py``).  Each holds for every CPU variant of this machine.
"""

from __future__ import annotations

import json

import engines
import numpy as np
import pytest
from engines import (
    BOUND,
    GOLDEN,
    core_desc,
    core_engine,
    golden,
    golden_names,
    greedy,
    ids_of,
    prompts,
    run,
    worst,
)
from oracle import model as oracle

from flashmoe import _core

NAMES = golden_names()
VARIANTS = _core.cpu_variants()


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CPU", request.param)
    return request.param


def sets(router: np.ndarray) -> np.ndarray:
    return np.sort(router.astype(np.int64), axis=-1)


def test_goldens_are_all_there():
    manifest = GOLDEN / "MANIFEST.json"
    models = json.loads(manifest.read_text())["models"]
    assert set(models) == {n for n in NAMES if "/" not in n}
    kinds = {core_desc(n)["arch"] for n in NAMES}
    assert kinds == set(_core.architectures()), "an architecture without a golden model"


@pytest.mark.parametrize("name", NAMES)
def test_golden(name, variant):
    z = golden(name)
    with core_engine(name) as engine:
        assert engine.info["cpu_variant"] == variant
        for p in prompts(name):
            session = engine.session()
            out = engine.forward([session], [ids_of(name, p)], all_logits=True, trace_router=True)
            assert worst(out["logits"], z[f"{p}.logits_f64"]) <= BOUND, p
            if f"{p}.router_idx" in z:
                np.testing.assert_array_equal(sets(out["router"]), sets(z[f"{p}.router_idx"]))
            want = z[f"{p}.greedy_tokens"].tolist()
            tokens, rows = greedy(session, len(want) - 1)
            assert tokens == want, p
            assert worst(rows, z[f"{p}.greedy_logits_f64"]) <= BOUND, p
            session.close()


@pytest.mark.parametrize("name", NAMES)
def test_router_sets_of_decode(name, variant):
    """Teacher-forced on the golden's own tokens, one row at a time."""
    z, p = golden(name), prompts(name)[-1]
    if f"{p}.greedy_router_idx" not in z:
        assert not core_desc(name)["experts"]
        return
    with core_engine(name) as engine:
        session = engine.session()
        session.prefill(ids_of(name, p))
        for token, want in zip(z[f"{p}.greedy_tokens"][:-1], z[f"{p}.greedy_router_idx"]):
            ids = np.array([token], dtype=np.int32)
            got = engine.forward([session], [ids], trace_router=True)["router"][0]
            np.testing.assert_array_equal(sets(got), sets(want))


@pytest.mark.parametrize("name", [n for n in NAMES if "/" not in n])
def test_residual_stream(name, variant):
    """After each layer, so that a wrong block is named.  Bound: 2^-15 of the stream's largest."""
    m = oracle.load(GOLDEN / name)
    ids = ids_of(name, prompts(name)[1])
    want = hidden_f64(m, ids)
    with core_engine(name) as engine:
        out = engine.forward([engine.session()], [ids], trace_hidden=True)["hidden"]
    assert out.shape == want.shape
    for layer in range(want.shape[1]):
        scale = np.abs(want[:, layer]).max()
        assert worst(out[:, layer], want[:, layer]) <= 2.0**-15 * scale, f"layer {layer}"


def hidden_f64(m: oracle.Model, ids: np.ndarray) -> np.ndarray:
    """Return the oracle's residual stream after each layer (n_tokens, n_layers, hidden)."""
    seen = []
    norm = m.norm

    def spy(name, x):
        seen.append((name, x))
        return norm(name, x)

    m.norm = spy
    m.forward(ids)
    # What a layer leaves is what the next norm of its kind is given.
    starts = [x for name, x in seen if name.endswith("input_layernorm") or name == "norm"]
    return np.stack(starts[1:], axis=1)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_in_chunks(name, variant):
    """Chunks of 1, 3, 64 and the whole: all within the bound of the golden, and one stream.

    Bound between two chunkings: far inside the golden's; recurrent layers add up in another order
    within a chunk, the rest is the same bit for bit (`test_chunks_bitwise`).
    """
    p = prompts(name)[-1]
    want = golden(name)[f"{p}.logits_f64"]
    with core_engine(name) as engine:
        whole, session = run(engine, ids_of(name, p))
        end = session.logits()
        for chunk in (1, 3, 64):
            got, session = run(engine, ids_of(name, p), chunk=chunk)
            assert worst(got, want) <= BOUND, chunk
            assert worst(got, whole) <= engines.CHUNK_BOUND, chunk
            assert worst(session.logits(), end) <= engines.CHUNK_BOUND, chunk
            assert session.pos == len(want)


@pytest.mark.skipif(not engines.SAME_BITS, reason="this backend sums many rows in another order")
@pytest.mark.parametrize("name", [n for n in NAMES if not any(core_desc(n)["config"]["mixers"])])
def test_chunks_bitwise(name, variant):
    """Without recurrent layers chunking changes nothing at all."""
    ids = ids_of(name, prompts(name)[-1])
    with core_engine(name) as engine:
        whole, _ = run(engine, ids)
        for chunk in (1, 3, 64):
            np.testing.assert_array_equal(run(engine, ids, chunk=chunk)[0], whole)


def test_prefill_splits_at_max_rows():
    name = NAMES[0]
    ids = ids_of(name, prompts(name)[-1])
    with core_engine(name) as engine:
        want = run(engine, ids, chunk=7)[1].logits()
    with core_engine(name, max_rows=7) as engine:
        session = engine.session()
        done = 0
        while done < len(ids):
            n = session.prefill(ids[done:])
            assert n == min(7, len(ids) - done)
            done += n
        assert session.pos == len(ids)
        np.testing.assert_array_equal(session.logits(), want)


def test_fewer_experts_per_token_is_another_result():
    """An explicit choice: it is taken, shown, and changes the numbers."""
    name = "q35moe_base"
    ids = ids_of(name, "p24")
    with core_engine(name) as engine:
        trained = engine.info["trained_experts_per_token"]
        assert engine.info["experts_per_token"] == trained
        whole, _ = run(engine, ids)
    with core_engine(name, experts_per_token=trained - 1) as engine:
        assert engine.info["experts_per_token"] == trained - 1
        out = engine.forward([engine.session()], [ids], all_logits=True, trace_router=True)
        assert out["router"].shape[-1] == trained - 1
        assert worst(out["logits"], whole) > BOUND
