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
RUNS = {  # name: (environment, what pytest is given); the longest first
    "session": (ROWS, ["test_session.py"]),
    "chunks": (ROWS, ["test_arch.py", "-k", "chunks or max_rows"]),
    "arch": ({}, ["test_arch.py"]),
    "experts": (ROWS, ["test_experts.py"]),
    "faults": (ROWS, ["test_faults.py", "test_faults_random.py"]),
}


def run(env, select):
    full = {**os.environ, "METAL_CORE_PATH": core(), "MSL_CHILD": "1", "FLASHMOE_CPU": "ref", **env}
    full["PYTHONPATH"] = os.pathsep.join([str(HERE), str(mslc.REPO)])
    cmd = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "metal_core_plugin"]
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


COUNT = """
import ctypes as C, os, metal_core_plugin
from engines import core_engine, ids_of, run, n_experts, core_desc
counts, at = C.CDLL(os.environ["METAL_CORE_PATH"]).fake_metal_counts, (C.c_long * 2)()
def now():
    counts(at)
    return list(at)
for slots in ("all", None):
    with core_engine("q35moe_base/mlx4", slots=slots) as engine:
        _, session = run(engine, ids_of("q35moe_base/mlx4", "p24"))
        session.step(1)
        before = now()
        for i in range(8):
            session.step(i)
        used = [(b - a) / 8 for a, b in zip(before, now())]
        print("per token", slots, *used)
"""


def test_commands_per_token():
    """How much is recorded for a token of a 4-layer model; the number is a fact, the limit loose."""
    env = {**os.environ, "METAL_CORE_PATH": core(), "MSL_CHILD": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(TESTS), str(mslc.REPO)])
    out = subprocess.run([sys.executable, "-c", COUNT], env=env, cwd=TESTS, text=True,
                         capture_output=True)  # fmt: skip
    assert out.returncode == 0, out.stderr[-3000:]
    for line in out.stdout.splitlines():
        if line.startswith("per token"):
            slots, commands, dispatches = line.split()[2:]
            print(slots, commands, dispatches)
            assert float(commands) <= 6 * 4 + 3
