"""FLASHMOE_COMPARE=cpu on this backend: silent when all is well, names the op of a planted mistake.

`tests/c/test_compare.c` holds each output of each op against a lying device; here are real kernels,
real hosts and whole models.
"""

import os
import re
import subprocess
import sys

import hostlib as H
import mslc
import pytest
from conftest import HERE, in_child, run_tests
from test_metal_mutants import BACK, HOST_MUTANTS, MUTANTS, mutate

pytestmark = [in_child, pytest.mark.skipif(H.MAC, reason="mistakes are planted on Linux")]
BACKEND = "test_metal_backend.py"


def compared(select, env=None):
    """The backend's tests with the CPU as judge: (status, output)."""
    return run_tests("", HERE / BACKEND, "-k", f"({select}) and not strict_modes and not sanitizers",
                     env={"METAL_COMPARE": "1", **(env or {})})  # fmt: skip


def test_silent_when_all_is_well():
    status, output = compared("test")
    assert status == 0, output[-5000:]


# op that the judge must name first: (mutant, tests)
NAMED = {
    "embed": ("bf16 shift", "embed"),
    "matmul": ("bias term", "test_matmul"),
    "experts": ("gate and up", "test_experts"),
    "attention": ("softmax shrink", "attention"),
    "conv": ("conv tap", "conv"),
    "delta": ("decay after", "conv_and_delta"),
    "route": ("renormalise", "route"),
    "rmsnorm": ("norm eps", "rmsnorm"),
}


def planted(op, name, select, tmp_path):
    file, text, new, occurrence, *_ = MUTANTS[name]
    mutate(tmp_path / "kernels", file, text, new, occurrence)
    status, output = compared(select, {"FLASHMOE_METAL_KERNELS": str(tmp_path / "kernels")})
    assert status != 0, f"{name} was not seen"
    assert re.search(rf"FLASHMOE_COMPARE: op \d+, {op} o[fn] ", output), output[-5000:]


@pytest.mark.parametrize("op", ["matmul", "attention", "delta"])
def test_planted_mistake_is_named(op, tmp_path):
    planted(op, *NAMED[op], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("op", [o for o in NAMED if o not in ("matmul", "attention", "delta")])
def test_every_planted_mistake_is_named(op, tmp_path):
    planted(op, *NAMED[op], tmp_path)


def test_planted_host_mistake_is_named(tmp_path):
    """The kernel is right, the host hands it the wrong place."""
    file, text, new, occurrence, tests, select = HOST_MUTANTS["second span's rows"]
    assert tests == BACK
    mutate(tmp_path / "metal", file, text, new, occurrence, ".")
    status, output = compared(select, {"FLASHMOE_METAL_HOST": str(tmp_path / "metal")})
    assert status != 0
    assert "delta of 2 spans" in output, output[-5000:]


MODEL = """
import numpy as np, os, metal_core_plugin
from engines import core_engine, golden, ids_of, run
def logits():
    with core_engine("q3next", slots=None) as engine:
        rows, session = run(engine, ids_of("q3next", "p24"))
        session.step(1)
        return engine.info["backend"], np.concatenate([rows, session.logits()[None]])
name, plain = logits()
os.environ["FLASHMOE_COMPARE"] = "cpu"
judged_name, judged = logits()
assert (name, judged_name) == ("metal", "metal, compared with cpu"), (name, judged_name)
assert np.array_equal(plain, judged)
print("same bits")
os.environ["FLASHMOE_COMPARE"] = "metal"
try:
    logits()
except Exception as e:
    print(type(e).__name__, e)
"""


def model(core, env):
    full = {**os.environ, "METAL_CORE_PATH": str(core), "MSL_CHILD": "1", **env}
    full["PYTHONPATH"] = os.pathsep.join(map(str, [HERE, mslc.REPO / "tests", mslc.REPO]))
    return subprocess.run([sys.executable, "-c", MODEL], env=full, text=True, capture_output=True)


def test_whole_model_keeps_its_bits():
    pytest.importorskip("pybind11", reason="pip install pybind11")
    pytest.importorskip("flashmoe", reason="the package is not installed", exc_type=ImportError)
    out = model(H.build_core(), {})
    assert out.returncode == 0, out.stderr[-3000:]
    assert "same bits" in out.stdout
    assert "ArgumentError FLASHMOE_COMPARE=metal compares another backend" in out.stdout
