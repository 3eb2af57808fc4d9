"""Whole models on the Metal backend: the core's own tests, run with the core that hostlib builds.

A child pytest loads `metal_core_plugin`, which puts that core in place of `flashmoe._core` and
opens every engine with the backend "metal".
"""

import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import hostlib
import mslc
import pytest
from conftest import HERE, in_child

pytest.importorskip("pybind11", reason="pip install pybind11: builds a core with Metal in it")
pytest.importorskip(
    "flashmoe", reason="the package is not installed: sh tools/setup.sh test", exc_type=ImportError
)
pytestmark = in_child

TESTS = mslc.REPO / "tests"


@functools.lru_cache(None)
def core():
    return str(hostlib.build_core())


ROWS = {"METAL_CORE_ROWS": "1"}
# How a file is read, which policy evicts and what is guessed is the store's: some of each, all by -m slow.
SOME = "packed- or lru-0 or lru-3 or lfu--1 or 0-lru or 4-lru or counters or refused or reread or twice[2] or trace"
# What a device computes does not hang on `numeric` or the number of threads either.
FAULTS = "not -fast and not mlx-eof-3 and not mlx-eio-3"
RUNS = {  # name: (environment, what pytest is given); the longest first
    "experts": (ROWS, ["test_experts.py", "-k", SOME]),
    "session": (ROWS, ["test_session.py", "-k", "not threads_and_verify"]),
    "chunks": (ROWS, ["test_arch.py", "-k", "chunks or max_rows"]),
    "arch": ({}, ["test_arch.py"]),
    "faults": (ROWS, ["test_faults.py", "test_faults_random.py", "-k", FAULTS]),
}


def run(env, select):
    full = {**os.environ, "METAL_CORE_PATH": core(), "MSL_CHILD": "1", "FLASHMOE_CPU": "ref", **env}
    full["PYTHONPATH"] = os.pathsep.join([str(HERE), str(mslc.REPO)])
    cmd = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "metal_core_plugin"]
    cmd += ["-p", "no:cacheprovider", *select]
    return subprocess.run(cmd, env=full, cwd=TESTS, text=True, capture_output=True)


@pytest.fixture(scope="module")
def runs(request):
    """The runs that were asked for, two at a time: the runner uses one thread."""
    asked = [i.callspec.params["name"] for i in request.session.items if "runs" in i.fixturenames]
    core()
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(run, *RUNS[name]) for name in RUNS if name in asked}


@pytest.mark.parametrize("name", RUNS)
def test_the_cores_own_tests(runs, name):
    """All that the CPU passes.

    With tiles: every golden and twin, logits within 1e-3 of float64, greedy tokens and router sets
    equal, the residual stream, chunks. With the row kernels, where results are equal to the bit:
    chunks, few slots, ragged batches, going back, saving, cancelling, every way to read, failing reads.
    """
    out = runs[name].result()
    assert out.returncode == 0, out.stdout[-6000:] + out.stderr[-2000:]


@pytest.mark.slow
def test_every_way_to_read_and_more_faults():
    env = {**ROWS, "METAL_CORE_ALL": "1"}
    out = run(env, ["test_experts.py", "test_faults_random.py"])
    assert out.returncode == 0, out.stdout[-6000:] + out.stderr[-2000:]


COUNT = """
import ctypes as C, os, metal_core_plugin
from engines import core_engine, ids_of, run
from hostlib import Counters
lib = C.CDLL(os.environ["METAL_CORE_PATH"])
lib.fm_metal_counters_newest.restype = C.POINTER(Counters)
def now():
    c = lib.fm_metal_counters_newest().contents
    return [getattr(c, n) for n, _ in Counters._fields_]
for form in "10":
    os.environ["FLASHMOE_PIPELINE"] = form
    for slots in ("all", None):
        with core_engine("q35moe_base/mlx4", slots=slots) as engine:
            _, session = run(engine, ids_of("q35moe_base/mlx4", "p24"))
            session.step(1)
            before = now()
            for i in range(8):
                session.step(i)
            used = [(b - a) / 8 for a, b in zip(before, now())]
            print("per token", form, slots, *used)
"""


def test_commands_per_token():
    """What a token of an 8-layer model costs the CPU: counts are facts; times are only reported."""
    env = {**os.environ, "METAL_CORE_PATH": core(), "MSL_CHILD": "1", "FAKE_METAL_LATE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(TESTS), str(mslc.REPO)])
    out = subprocess.run([sys.executable, "-c", COUNT], env=env, cwd=TESTS, text=True,
                         capture_output=True)  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    lines = [x.split()[2:] for x in out.stdout.splitlines() if x.startswith("per token")]
    print()
    for form, slots, commands, encoders, dispatches, _waits, upload, ns, events, awaits in lines:
        print(f"{'pipelined' if form == '1' else 'plain':9} slots={slots:4} per token: "
              f"{commands} command buffers, {encoders} encoders, {dispatches} dispatches, {events} "
              f"events, {awaits} awaits, {upload} bytes, {float(ns) / 1000:.0f} us of encoding")  # fmt: skip
        assert float(commands) == 1 if form == "1" else float(commands) <= 6 * 4 + 3
    assert len(lines) == 4
