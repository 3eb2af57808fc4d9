"""Whole models on the Metal backend: the core's own tests, run with the core that hostlib builds.

A child pytest loads `metal_core_plugin`, which puts that core in place of `flashmoe._core` and
opens every engine with the backend "metal". Default: a few goldens. Slow: all goldens, sequences,
ragged batches, slots, snapshots and faults during reads.
"""

import functools
import os
import subprocess
import sys

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


def run(*select, env=None):
    """Run tests of the core on Metal; the variant of the CPU kernels does not matter: "ref"."""
    full = {**os.environ, "METAL_CORE_PATH": core(), "MSL_CHILD": "1", **(env or {})}
    full["PYTHONPATH"] = os.pathsep.join([str(HERE), str(mslc.REPO)])
    cmd = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "metal_core_plugin"]
    cmd += ["-p", "no:cacheprovider", *select]
    out = subprocess.run(cmd, env=full, cwd=TESTS, text=True, capture_output=True)
    assert out.returncode == 0, out.stdout[-6000:] + out.stderr[-2000:]
    return out.stdout


def test_goldens():
    """Logits within 1e-3 of float64, greedy tokens and router sets equal."""
    names = "ref-q35moe_base] or ref-q35moe_base/mlx4] or ref-q3next] or ref-q35moe_odd]"
    run("test_arch.py", "-k", f"test_golden and ({names})".replace("]", ""))


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


@pytest.mark.slow
def test_every_golden():
    """All models and twins, in the fast mode. Left out: chunk tests that compare two chunkings more
    finely than kernels that sum in another order can agree (they pass below)."""
    run("test_arch.py", "-k", "ref and not test_prefill_in_chunks and not test_chunks_bitwise")


@pytest.mark.slow
@pytest.mark.parametrize("file", ["test_arch.py", "test_session.py", "test_faults.py"])
def test_bit_for_bit(file):
    """With the row kernels alone a batch equals its members: the CPU's tests hold as they are."""
    run(file, "-k", "not avx", env={"METAL_CORE_ROWS": "1", "FLASHMOE_CPU": "ref"})
