"""Recording and replaying routing, timelines, and the commands around them."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from flashmoe import _core
from flashmoe.cli import main
from flashmoe.errors import ArgumentError, ModelFileError, StorageError
from flashmoe.perf.runner import Runner, random_ids
from flashmoe.perf.timeline import chrome_trace, repeated_reads, write_chrome_trace
from flashmoe.perf.trace import RoutingTrace, load_trace, record, replay

EVENT = np.dtype([("kind", "i4"), ("layer", "i4"), ("id", "i4"), ("reserved", "i4"),
                  ("t0_ns", "i8"), ("t1_ns", "i8"), ("bytes", "i8")])  # fmt: skip


@pytest.fixture
def run(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as exit:
            main([str(a) for a in args])
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def model(request):
    return str(request.config.rootpath / "tests" / "golden" / "q35moe_base" / "mlx4")


@pytest.fixture(scope="module")
def recorded(model):
    with Runner(model, memory="1GiB", threads=1, prefill_chunk=8) as runner:
        return record(runner, random_ids(runner.vocab_size, 20, 3), 30)


def test_a_recorded_run(recorded, model):
    assert recorded.ids.shape == (50, 8, 3)
    assert recorded.forwards.tolist() == [8, 8, 4] + [1] * 30
    assert (recorded.n_prompt, recorded.n_experts, recorded.n_keys) == (20, 8, 64)
    assert recorded.counts().sum() == 50 * 8 * 3
    assert (recorded.counts("prompt") + recorded.counts("decode") == recorded.counts()).all()
    # the same rows in one forward route the same way
    with Runner(model, memory="1GiB", threads=1) as runner:
        out = runner.core.forward([runner.core.session()], [recorded.tokens], trace_router=True)
    assert (np.sort(out["router"]) == np.sort(recorded.ids)).all()


def test_waves_are_one_layer_of_one_row(recorded):
    waves = list(recorded.waves("decode"))
    assert len(waves) == 30 * 8
    assert waves[0] == sorted(recorded.ids[20, 0].tolist())
    assert waves[9] == sorted((8 + recorded.ids[21, 1]).tolist())
    assert len(list(recorded.waves("all"))) == 50 * 8


def test_dense_layers_are_left_out():
    ids = np.full((2, 3, 2), -1, np.int32)
    ids[:, 1] = [[0, 3], [1, 2]]
    t = RoutingTrace(ids, np.zeros(2, np.int32), np.ones(2, np.int64), 0, 4)
    assert list(t.waves()) == [[4, 7], [5, 6]]
    assert t.n_keys == 4
    assert t.counts().sum() == 4


def test_replay(recorded):
    rows = replay(recorded, [3, 24, 64], ["lru", "clock", "lfu", "belady"])
    rate = {(r["n_slots"], r["policy"]): r["hit_rate"] for r in rows}
    for n in (3, 24, 64):
        assert rate[n, "belady"] == max(rate[n, p] for p in ("lru", "clock", "lfu", "belady"))
    used = len({k for wave in recorded.waves() for k in wave})
    assert rate[64, "lru"] == rate[64, "belady"] == 1 - used / (30 * 8 * 3)
    with pytest.raises(ArgumentError, match="part"):
        replay(recorded, [3], ["lru"], "rest")


def test_files(recorded, tmp_path):
    path = tmp_path / "t.npz"
    recorded.save(path)
    back = load_trace(path)
    assert (back.ids == recorded.ids).all()
    assert (back.forwards == recorded.forwards).all()
    assert back.n_prompt == 20
    assert back.meta["experts_per_token"] == 3
    with pytest.raises(StorageError):
        load_trace(tmp_path / "none.npz")
    (tmp_path / "x.npz").write_bytes(b"PK not really")
    with pytest.raises(ModelFileError, match="not a routing trace"):
        load_trace(tmp_path / "x.npz")
    broken = RoutingTrace(recorded.ids, recorded.tokens[:-1], recorded.forwards, 20, 8)
    broken.save(path)
    with pytest.raises(ModelFileError, match="contradict"):
        load_trace(path)


def test_dense_models_have_no_routing(root):
    with (
        Runner(str(root / "tests/golden/q35dense"), memory="1GiB") as runner,
        pytest.raises(ArgumentError, match="dense"),
    ):
        record(runner, np.zeros(1, np.int32), 1)


def test_commands(run, model, tmp_path):
    out = tmp_path / "t.npz"
    code, _, err = run(
        "trace", "record", model, "random:10", "-n", 6, "-o", out, "--feed", "random"
    )
    assert code == 0
    assert "16 rows (10 of the prompt), 64 experts" in err
    code, text, _ = run("trace", "replay", out, "--slots", "10%,24", "--policy", "lru,belady")
    assert code == 0
    assert "belady" in text
    assert "37.5 %" in text
    code, text, _ = run("trace", "replay", out, "--json")
    result = json.loads(text)
    assert len(result["results"]) == 6 * 4
    assert run("trace", "replay", out, "--slots", "many")[0] == 2
    assert run("trace", "replay", out, "--policy", "fifo")[0] == 1
    code, text, _ = run(
        "plan", "--model", model, "--ssd", 1, "--ram", 0.5, "--trace", out, "--json"
    )
    plan = json.loads(text)
    assert code == 0
    assert "lru on" in plan["hit_model"]


# ------------------------------------------------------------------ timelines


def test_chrome_trace_of_made_up_events():
    kinds = ["attention", "read", "guess", "forward"]
    rows = [
        (3, -1, 1, 0, 1000, 9000, 0),
        (0, 0, 0, 0, 1000, 3000, 0),
        (1, 0, 5, 0, 2000, 6000, 4096),
        (1, 0, 6, 0, 2500, 5000, 4096),  # overlaps: a second lane
        (2, 1, 7, 0, 5500, 7000, 4096),  # the second lane is free again
    ]
    trace = chrome_trace(np.array(rows, EVENT), kinds, {"model": "m"})
    spans = {e["name"]: e for e in trace["traceEvents"] if e["ph"] == "X"}
    assert spans["attention L0"]["ts"] == 0
    assert spans["attention L0"]["dur"] == 2
    assert spans["forward of 1 rows"]["tid"] != spans["attention L0"]["tid"]
    assert spans["read L0 E5"]["tid"] != spans["read L0 E6"]["tid"] == spans["guess L1 E7"]["tid"]
    assert spans["read L0 E5"]["args"]["bytes"] == 4096
    flight = [e["args"]["reads"] for e in trace["traceEvents"] if e["ph"] == "C"]
    assert flight == [1, 2, 1, 2, 1, 0]
    names = {e["args"]["name"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert names == {"forward", "compute", "reads 0", "reads 1"}


def test_chrome_trace_of_a_run(model, tmp_path):
    """Every lane is a sequence of spans that do not overlap; reads are as many as counted."""
    with Runner(model, {"n_slots": 6}, memory="1GiB", io="pread", threads=1) as runner:
        prompt = random_ids(runner.vocab_size, 4, 1)
        events, n_lost = runner.events(prompt, 4)
    assert n_lost == 0
    trace = chrome_trace(events, _core.trace_kinds())
    path = tmp_path / "t.json"
    write_chrome_trace(path, trace)
    spans = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    kinds = {e["cat"] for e in spans}
    assert {"read", "attention", "delta", "router", "experts", "head"} <= kinds
    by_track = {}
    for e in spans:
        by_track.setdefault(e["tid"], []).append((e["ts"], e["ts"] + e["dur"]))
    for tid, times in by_track.items():
        if tid >= 100:
            times.sort()
            assert all(a[1] <= b[0] + 1e-6 for a, b in itertools.pairwise(times)), tid
    assert sum(e["args"].get("bytes", 0) for e in spans) == int(events["bytes"].sum())


def test_empty_timeline():
    assert chrome_trace(np.array([], EVENT), [])["traceEvents"]
    assert repeated_reads(np.array([], EVENT), [], 4096) == 0


def test_repeated_reads_of_made_up_events():
    kinds = ["read", "guess", "forward"]
    rows = [
        (2, -1, 9, 0, 0, 100, 0),
        (2, -1, 9, 0, 100, 200, 0),
        (0, 0, 1, 0, 10, 20, 2048),  # two halves: once
        (0, 0, 1, 0, 10, 30, 2048),
        (0, 0, 1, 0, 110, 120, 4096),  # again, but in the next forward
        (0, 1, 2, 0, 10, 40, 4096),
        (1, 1, 2, 0, 50, 60, 4096),  # twice in one
    ]
    assert repeated_reads(np.array(rows, EVENT), kinds, 4096) == 1


@pytest.mark.parametrize("slots", [6, 12, 40])
def test_a_prompt_reads_every_expert_at_most_once_per_chunk(model, slots):
    core = {"n_slots": slots}
    with Runner(model, core, memory="1GiB", io="pread", threads=1, prefill_chunk=40) as runner:
        record = runner.plan.experts_bytes // runner.plan.n_experts
        events, n_lost = runner.events(random_ids(runner.vocab_size, 120, 5), 1)
    kinds = _core.trace_kinds()
    assert n_lost == 0
    reads = np.isin(events["kind"], [kinds.index("read"), kinds.index("guess")])
    assert reads.sum() >= 64
    assert repeated_reads(events, kinds, record) == 0
