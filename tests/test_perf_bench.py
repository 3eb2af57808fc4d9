"""The measuring loop on tiny models: what it reports, not how fast it is."""

from __future__ import annotations

import builtins
import json
import os

import numpy as np
import pytest

from flashmoe import _core
from flashmoe.cli import main
from flashmoe.errors import ArgumentError, StorageError, UnsupportedError
from flashmoe.perf import machine, plots, roof
from flashmoe.perf.bench import Setting, Work, bench, settings_of, spread
from flashmoe.perf.runner import Runner, random_ids
from flashmoe.perf.terms import measure_terms, terms_context

QUICK = Work(prompt_tokens=12, gen_tokens=6, repeat=3, roof_seconds=0.02)


@pytest.fixture(scope="module")
def model(request):
    return str(request.config.rootpath / "tests" / "golden" / "q35moe_base" / "mlx4")


@pytest.fixture
def run(capsys):
    def call(*args):
        with pytest.raises(SystemExit) as exit:
            main([str(a) for a in args])
        captured = capsys.readouterr()
        return exit.value.code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def results(model):
    settings = settings_of(memory=["700MiB", "900MiB"], threads=[1], io=["pread"],
                           lookahead=[0], core={"n_slots": 12})  # fmt: skip
    return list(bench(model, settings, QUICK))


def test_a_result_names_what_was_measured(results):
    assert [(r["memory"], r["again"]) for r in results] == [
        ("700MiB", False), ("900MiB", False), ("700MiB", True)
    ]  # fmt: skip
    r = results[0]
    assert (r["experts_per_token"], r["trained_experts_per_token"]) == (3, 3)
    assert "affine4" in r["arch"]
    assert (r["n_slots"], r["n_experts"], r["n_threads"]) == (12, 64, 1)
    assert (r["prompt_tokens"], r["gen_tokens"], r["feed"]) == (12, 6, "random")
    assert {"cpu", "os", "date", "commit", "version"} <= r["machine"].keys()
    assert r["rss_peak_bytes"] > 10 << 20
    assert json.loads(json.dumps(r)) == r
    assert "drift_of_first_setting" in results[2]


def test_a_result_adds_up(results, model):
    r = results[0]
    speed = r["decode_tokens_per_second"]
    assert speed["min"] <= speed["median"] <= speed["max"]
    assert 0 <= r["hit_rate"] <= 1
    # a token's misses are what it reads: buffered, so not rounded to pages
    with Runner(model, memory="1GiB") as runner:
        record = runner.plan.experts_bytes // runner.plan.n_experts
    assert r["bytes_read_per_token"] == pytest.approx((1 - r["hit_rate"]) * 8 * 3 * record)
    assert r["cold"]["hit_rate"] <= 1
    n = r["device_gb_per_s"] / r["bytes_read_per_token"] * 1e9
    assert speed["min"] * 0.999 <= n <= speed["max"] * 1.001  # the runs' harmonic mean
    phases = r["phases_seconds_per_token"]
    assert phases["experts"] > 0
    assert phases["delta"] > 0
    assert all(v >= 0 for v in phases.values())
    assert r["prefill_bytes_read"] > 0
    if r["roof"]["gb_per_s"]:
        assert r["share_of_larger_term"] > 0
        assert r["device_utilisation"] == pytest.approx(
            r["device_gb_per_s"] / r["roof"]["gb_per_s"]
        )


@pytest.mark.parametrize("slots", [12, 60])
def test_terms(model, slots):
    """Both terms are there; compute is measured alone where a token's experts fit."""
    with Runner(
        model, {"n_slots": slots}, memory="1GiB", threads=1, context=terms_context(60, 6)
    ) as runner:
        terms = measure_terms(runner, 60, 6)
        fits = slots == 60
        assert terms["decode"]["compute_is"].startswith("measured" if fits else "time not")
        assert terms["prefill"]["experts_read_twice_in_a_forward"] == 0
        assert terms["prefill"]["bytes_read"] > 0
        assert terms["decode"]["rounds"] == 2
        assert (
            terms["decode"]["share_min"]
            <= terms["decode"]["share_of_larger_term"]
            <= terms["decode"]["share_max"]
        )
        for t in terms.values():
            assert t["seconds"] > 0
            assert t["compute_seconds"] > 0
            assert t["share_of_larger_term"] > 0
            assert t["larger_term"] in ("I/O", "compute")
            assert t["io_seconds"] >= 0
            assert (t["io_gb_per_s"] > 0) == (t["bytes_read"] > 0)


def test_terms_have_room_in_the_context(model):
    """They take more positions than the runs before them."""
    work = Work(prompt_tokens=12, gen_tokens=6, repeat=2, roof=False, terms=True)
    (result,) = bench(model, settings_of(memory=["1GiB"], threads=[1]), work)
    assert result["options"]["context"] == 12 + 16 + 2 * 6
    assert result["terms"].keys() == {"prefill", "decode"}


def test_prompts_never_repeat():
    ids = [random_ids(1000, 50, 1, run, part).tolist() for run in range(5) for part in range(4)]
    assert len({tuple(i) for i in ids}) == 20
    assert random_ids(1000, 50, 1, 0, 0).tolist() == ids[0]
    assert max(max(i) for i in ids) < 1000


def test_settings():
    found = settings_of(["1GiB", "2GiB"], lookahead=[0, 4], core={"split_bytes": 1})
    assert [s.label() for s in found] == [
        "1GiB, lookahead 0, split bytes 1", "2GiB, lookahead 0, split bytes 1",
        "1GiB, lookahead 4, split bytes 1", "2GiB, lookahead 4, split bytes 1",
    ]  # fmt: skip
    assert Setting().label() == "default"
    assert spread([2.0, 2.0])["spread"] == 0


def test_wrong_settings_are_refused(model):
    with pytest.raises(ArgumentError, match="lru"):
        Runner(model, {"cache_policy": "fifo"}, memory="1GiB")


def test_measured_counters_are_split_between_prompt_and_output(model):
    with Runner(model, {"n_slots": 64}, memory="1GiB", threads=1) as runner:
        prompt = random_ids(runner.vocab_size, 10, 1)
        m = runner.measure(prompt, 5)
        assert (m.prompt_tokens, m.decode_tokens, len(m.token_seconds)) == (10, 4, 4)
        assert m.prefill["prefill_tokens"] == 10
        assert m.decode["decode_tokens"] == 4
        assert m.decode["prefill_tokens"] == 0
        again = runner.measure(prompt, 5)
        assert again.prefill["misses"] == 0


# ------------------------------------------------------------------ the device


def test_links_are_read_once(tmp_path):
    a, b, c = (str(tmp_path / n) for n in "abc")
    for path in (a, c):
        with open(path, "wb") as f:
            f.write(b"x" * 8192)
    os.link(a, b)
    assert roof.distinct_files([a, b, c]) == [a, c]
    with pytest.raises(StorageError):
        roof.distinct_files([str(tmp_path / "none")])


@pytest.mark.parametrize("direct", [False, True])
def test_probe_with_threads_reads_every_block_once(tmp_path, direct):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(20 * 4096 + 100))
    try:
        r = roof.probe_with_threads([str(path)], "pread", direct, 4096, 3, 5.0, 1)
    except OSError as e:
        pytest.skip(f"no direct reads in {tmp_path}: {e}")
    assert (r["n_reads"], r["bytes"]) == (20, 20 * 4096)
    assert r["gb_per_s"] > 0
    assert r["p50_us"] <= r["p99_us"]


@pytest.mark.parametrize("has_core", [True, False])
def test_roof(tmp_path, monkeypatch, has_core):
    path = tmp_path / "data"
    path.write_bytes(os.urandom(64 * 4096))
    if not has_core:
        monkeypatch.delattr(_core, "io_probe", raising=False)
    r = roof.measure_roof([str(path)], 4000, depths=(1, 2), seconds=0.01, drain_seconds=0)
    if r["gb_per_s"] is None:
        pytest.skip(f"no direct reads in {tmp_path}: {r['reason']}")
    assert r["block_bytes"] == 4096
    assert set(r["all"]) == {"1", "2"}
    assert r["gb_per_s"] == r["all"][str(r["depth"])] == max(r["all"].values())
    assert has_core or r["probe"] == "threads"


def test_roof_says_why_there_is_none(tmp_path, monkeypatch):
    def refuse(*args):
        raise UnsupportedError("no direct reads here")

    monkeypatch.setattr(roof, "_probe", lambda: (refuse, "core"))
    path = tmp_path / "data"
    path.write_bytes(b"x" * 4096)
    r = roof.measure_roof([str(path)], 4096)
    assert (r["gb_per_s"], r["reason"]) == (None, "no direct reads here")


def test_machine(tmp_path):
    facts = machine.identity()
    assert facts["cpu"]
    assert facts["n_cpus"] >= 1
    path = tmp_path / "x"
    path.write_bytes(b"x")
    machine.drop_page_cache([path])
    assert machine.peak_rss_bytes() > 1 << 20


# ------------------------------------------------------------------ the commands


def test_bench_command(run, model, tmp_path):
    timeline = tmp_path / "t.json"
    code, out, err = run(
        "bench", model, "--prompt-tokens", 8, "--gen", 4, "--repeat", 2, "--memory", "1GiB",
        "--no-roof", "--timeline", timeline, "--core", "n_slots=10",
    )  # fmt: skip
    assert code == 0, err
    for word in ("decode tok/s", "prefill tok/s", "hit rate", "peak RSS", "K=3", "10 of 64"):
        assert word in out
    events = json.loads(timeline.read_text())["traceEvents"]
    assert {"read", "experts", "forward"} <= {e.get("cat") for e in events}
    assert "perfetto" in err


def test_bench_prints_json_lines(run, model):
    code, out, _ = run(
        "bench", model, "--prompt-tokens", 8, "--gen", 4, "--repeat", 2, "--memory", "1GiB",
        "--cache-policy", "lru,lfu", "--no-roof", "--json", "-q", "--feed", "greedy",
    )  # fmt: skip
    assert code == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [r["options"].get("cache_policy") for r in lines] == ["lru", "lfu", "lru"]
    assert lines[0]["roof"] is None


def test_bench_refuses(run, model):
    assert run("bench", model, "--threads", "two")[0] == 2
    assert run("bench", model, "--feed", "own")[0] == 2
    assert run("bench", model, "--core", "nonsense=1", "--memory", "1GiB")[0] == 1


def test_plan_command(run):
    code, out, _ = run("plan", "--model", "397b", "--ssd", 17.3, "--ram", 48, "--mem-bw", 200)
    assert code == 0
    for word in ("4246732800 B", "hit rate", "ceiling   = 1 / max(io, moe + rest)", "uniform"):
        assert word in out
    code, out, _ = run(
        "plan", "--model", "35b", "--ssd", 1, "--ram", 8, "--bits", 2, "-k", 4, "--json"
    )
    p = json.loads(out)
    assert code == 0
    assert p["routed_bytes_per_token"] == 157_286_400
    assert run("plan", "--model", "397b", "--ssd", 6, "--ram", 4)[0] == 1


def test_plan_of_a_checkpoint_uses_the_engines_own_plan(run, model):
    code, out, _ = run("plan", "--model", model, "--ssd", 1, "--ram", 1, "--json")
    assert code == 0
    assert json.loads(out)["n_slots"] == 64


# ------------------------------------------------------------------ pictures


def without_matplotlib(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


def test_missing_matplotlib_is_named_before_anything_is_measured(run, model, monkeypatch):
    without_matplotlib(monkeypatch)
    code, out, err = run("bench", model, "--plot", "x.png")
    assert (code, out) == (1, "")
    assert "flashmoe-engine[plot]" in err


@pytest.fixture
def picture(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install '.[plot]'")
    return tmp_path / "p.png"


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 5000


def test_pictures(results, picture):
    plots.plot_bench(results, picture)
    assert is_png(picture)
    plots.plot_bench(results[:1], picture)
    plots.plot_heat_map(np.random.default_rng(0).poisson(3, (8, 64)), picture, "t")
    assert is_png(picture)
    rows = [
        {"n_slots": n, "policy": p, "hit_rate": n / 10} for n in (1, 5) for p in ("lru", "belady")
    ]
    plots.plot_hit_rates(rows, picture)
    assert is_png(picture)
    with pytest.raises(UnsupportedError, match="xyz"):
        plots.plot_hit_rates(rows, picture.with_suffix(".xyz"))
    with pytest.raises(StorageError):
        plots.plot_hit_rates(rows, picture.parent / "none" / "p.png")
