"""The expert store as the model sees it: how experts get into slots never changes a bit.

Every I/O method, cache policy, split and lookahead, with few slots, against all experts resident.
"""

from __future__ import annotations

import random

import engines
import numpy as np
import pytest
from engines import GOLDEN, core_desc, core_engine, greedy, ids_of, n_experts, run

from flashmoe import _core
from flashmoe.checkpoint import open_checkpoint
from flashmoe.errors import ArgumentError, StorageError, UnsupportedError
from flashmoe.pack import pack
from flashmoe.perf.timeline import repeated_reads

NAME = "q35moe_base/mlx4"
METHODS = [m for m in _core.io_methods() if m != "fault"]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "m"
    pack(GOLDEN / NAME, path, bits=None)
    return open_checkpoint(path)


@pytest.fixture(scope="module")
def want():
    with core_engine(NAME) as engine:
        rows, session = run(engine, ids_of(NAME, "p24"))
        return rows, greedy(session, 6)[1]


def check(engine, want):
    rows, session = run(engine, ids_of(NAME, "p24"))
    np.testing.assert_array_equal(rows, want[0])
    np.testing.assert_array_equal(greedy(session, 6)[1], want[1])


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["packed", "mlx"])
def test_every_method(packed, want, form, method, direct):
    desc = packed.to_core() if form == "packed" else core_desc(NAME)
    try:
        manager = core_engine(desc, slots=None, io_method=method, io_direct=direct)
        with manager as engine:
            check(engine, want)
            assert engine.info["io_method"] == method
    except UnsupportedError as e:
        pytest.skip(str(e))


@pytest.mark.parametrize("lookahead", [0, 1, 3, 8, -1])
@pytest.mark.parametrize("policy", _core.cache_policies())
def test_every_policy_and_lookahead(packed, want, policy, lookahead):
    total = n_experts(core_desc(NAME))
    for slots in (None, 4, 17, total // 2, total):
        opts = {"cache_policy": policy, "lookahead": lookahead, "split_bytes": 4096}
        with core_engine(packed.to_core(), slots=slots, **opts) as engine:
            check(engine, want)
            stats = engine.stats()
            assert stats["guess_used"] <= stats["guessed"]
            assert stats["predicted_right"] <= stats["predicted"]
            assert (stats["predicted"] > 0) == (lookahead != 0 and slots != total)
            if slots == total:
                assert stats["n_failed_reads"] == 0


def test_counters_add_up(packed):
    """All resident: each expert is read once, then only hits; bytes are those of the records."""
    ids = ids_of(NAME, "p24")
    total = n_experts(core_desc(NAME))
    with core_engine(packed.to_core(), slots=total) as engine:
        out = engine.forward([engine.session()], [ids], trace_router=True)["router"]
        used = sum(len(np.unique(out[:, layer])) for layer in range(out.shape[1]))
        stats = engine.stats()
        record = _core.Engine.plan(packed.to_core(), {"context": 8})["expert_record_bytes_max"]
        assert (stats["misses"], stats["hits"]) == (used, 0)
        assert stats["n_reads"] == used
        assert stats["bytes_read"] == used * record
        engine.forward([engine.session()], [ids])
        again = engine.stats()
        assert (again["misses"], again["hits"]) == (used, used)
        assert again["bytes_read"] == stats["bytes_read"]
        engine.reset_stats()
        assert not any(engine.stats().values())


@pytest.mark.parametrize("policy", _core.cache_policies())
@pytest.mark.parametrize("lookahead", [0, 4])
def test_random_faults(packed, want, policy, lookahead):
    """Whatever fails, in whatever order: an error or the right bits, and then the right bits."""
    rng = random.Random(f"{policy} {lookahead}")
    ids = ids_of(NAME, "p24")
    for _ in range(4 if engines.STAND_IN else 12):
        kinds = rng.sample(["short%2", "reorder", "delay=50us", "eio%97", "eof%131"], 3)
        script = ",".join([*kinds, f"seed={rng.randrange(1000)}"])
        opts = {"cache_policy": policy, "lookahead": lookahead, "split_bytes": 4096}
        slots = rng.choice((None, 9, 30))
        faulty = {"io_method": "fault", "io_fault": script, "io_workers": 3}
        with core_engine(packed.to_core(), slots=slots, **opts, **faulty) as engine:
            session = engine.session()
            for token, row in zip(ids, want[0]):
                for _ in range(40):
                    try:
                        session.step(int(token))
                        break
                    except StorageError:
                        continue
                else:
                    pytest.fail(f"{script}: a step never went through")
                assert np.abs(session.logits() - row).max() < 2e-4  # in single steps, see test_arch
            assert engine.set_slots(engine.info["n_slots"]) == engine.info["n_slots"]


def test_what_is_refused(packed):
    for opts, error in [
        ({"cache_policy": "fifo"}, ArgumentError),
        ({"lookahead": -2}, ArgumentError),
        ({"lookahead": 1000}, ArgumentError),
        ({"io_method": "carrier"}, UnsupportedError),
        ({"io_workers": -1}, ArgumentError),
    ]:
        with pytest.raises(error), core_engine(packed.to_core(), **opts):
            pass


def test_reread(packed):
    """Reads again what is there, and counts it; logits stay what they were."""
    with core_engine(packed.to_core(), slots=20) as engine:
        before, _ = run(engine, ids_of(NAME, "p24"))
        engine.reset_stats()
        layers, ids = np.arange(3, dtype=np.int32).repeat(2), np.array([0, 1] * 3, np.int32)
        assert engine.reread(layers, ids) > 0
        record = _core.Engine.plan(packed.to_core(), {"context": 8})["expert_record_bytes_max"]
        assert engine.stats()["bytes_read"] == 6 * record
        np.testing.assert_array_equal(run(engine, ids_of(NAME, "p24"))[0], before)
        assert engine.reread(layers[:0], ids[:0]) >= 0
        for bad in ((layers, ids[:1]), (layers + 99, ids), (layers, ids - 1), (layers[None], ids)):
            with pytest.raises(ArgumentError):
                engine.reread(*bad)


@pytest.mark.parametrize("lookahead", [0, 2, -1])
def test_a_prompt_reads_no_expert_twice(packed, lookahead):
    """Rows that want every expert: each is read at most once in a forward, by few slots too."""
    desc = packed.to_core()
    record = _core.Engine.plan(desc, {"context": 8})["expert_record_bytes_max"]
    ids = np.resize(ids_of(NAME, "p24"), 96)
    for slots in (12,) if engines.STAND_IN else (8, 12, 24, 40):
        with core_engine(desc, slots=slots, lookahead=lookahead, max_rows=96) as engine:
            for _ in range(1 if engines.STAND_IN else 3):
                engine.trace_start(10_000)
                run(engine, ids)
                events, lost = engine.trace_take(10_000)
                assert lost == 0
                assert repeated_reads(events, _core.trace_kinds(), record) == 0


def test_trace(packed):
    """Events of reads and claims are recorded up to the capacity, and counted beyond it."""
    with core_engine(packed.to_core(), slots=None) as engine:
        engine.trace_start(100_000)
        run(engine, ids_of(NAME, "p24"))
        events, lost = engine.trace_take(100_000)
        assert lost == 0
        read = _core.trace_kinds().index("read")
        assert (events["kind"] == read).sum() == engine.stats()["n_reads"]
        assert events[events["kind"] == read]["bytes"].sum() == engine.stats()["bytes_read"]
        assert (events["t1_ns"] >= events["t0_ns"]).all()
        engine.trace_start(10)
        run(engine, ids_of(NAME, "p24"))
        events, lost = engine.trace_take(4)
        assert len(events) == 4
        assert lost > 6
        for bad in (0, -1):
            with pytest.raises(ArgumentError):
                engine.trace_start(bad)
        with pytest.raises(ArgumentError):
            engine.trace_take(-1)
