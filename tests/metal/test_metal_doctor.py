"""`flashmoe doctor --metal` over the stand-in: the suite that judges a real GPU, at small sizes."""

import json
import os
import subprocess
import sys

import hostlib
import mslc
import pytest
from conftest import HERE, in_child
from test_metal_mutants import MUTANTS, mutate

pytest.importorskip("pybind11", reason="pip install pybind11: builds a core with Metal in it")
pytest.importorskip(
    "flashmoe", reason="the package is not installed: sh tools/setup.sh test", exc_type=ImportError
)
pytestmark = [
    in_child,
    pytest.mark.skipif(hostlib.MAC, reason="here the command itself is at hand"),
]
COMMAND = "import metal_core_plugin; from flashmoe.cli import main; main()"
OPS = {"embed", "matmul", "experts", "rmsnorm", "swiglu", "clip", "add_gated", "combine",
       "find_nonfinite", "rope", "route", "attention", "conv", "delta"}  # fmt: skip


def doctor(*args, kernels=None, **env):
    """Run the command with the core of hostlib: (exit status, stdout, stderr)."""
    full = {**os.environ, "MSL_CHILD": "1", "COLUMNS": "200", **env}
    if kernels:  # the shaders are embedded in the core: build another
        full["FLASHMOE_METAL_KERNELS"] = str(kernels)
        path = subprocess.run([sys.executable, "-c", "import hostlib; print(hostlib.build_core())"],
                              env=full, cwd=HERE, text=True, capture_output=True, check=True).stdout.strip()  # fmt: skip
    else:
        path = str(hostlib.build_core())
    full["METAL_CORE_PATH"] = path
    full["PYTHONPATH"] = os.pathsep.join(map(str, [HERE, mslc.REPO / "tests", mslc.REPO]))
    out = subprocess.run([sys.executable, "-c", COMMAND, "doctor", "--metal", "--small", *args],
                         env=full, text=True, capture_output=True)  # fmt: skip
    return out.returncode, out.stdout, out.stderr


def test_all_kernels_are_right():
    code, out, err = doctor("--json")
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert report["device"] == "stand-in for Metal (CPU)"
    assert (report["max_bytes"], report["max_buffer_bytes"]) == (16 << 30, 8 << 30)
    cases = report["cases"]
    assert report["n_wrong"] == 0 and {c["op"] for c in cases} == OPS
    assert all(c["worst"] <= 1 and c["message"] == "" for c in cases)
    timed = [c for c in cases if c["gb_per_s"]]
    assert all(c["us"] > 0 for c in timed)
    for model in ("(35B)", "(397B)"):
        assert {c["op"] for c in timed if model in c["sizes"]} == {
            "experts",
            "matmul",
            "attention",
            "delta",
        }


def test_the_table_and_a_wrong_kernel(tmp_path):
    """The mistake is in products of few rows: those are named, the rest stays right."""
    file, text, new, occurrence, *_ = MUTANTS["bias term"]
    mutate(tmp_path / "kernels", file, text, new, occurrence)
    code, out, _ = doctor(kernels=tmp_path / "kernels")
    assert code == 1
    assert out.startswith(
        "stand-in for Metal (CPU): memory 16.00 GiB, one buffer 8.00 GiB; flashmoe "
    )
    rows = {tuple(line.split()[:2]): line.rstrip() for line in reversed(out.splitlines())}
    assert rows["matmul", "affine4"].endswith("WRONG")
    assert rows["matmul", "f32"].endswith("ok")
    assert rows["attention", "34"].endswith("ok")
    assert "WRONG matmul affine4 g32 1 x [1, 32]: FLASHMOE_COMPARE: op " in out
    assert " of 360 cases are wrong" in out


def test_no_device():
    code, out, err = doctor(FAKE_METAL_NO_DEVICE="1")
    assert (code, out) == (1, "")
    assert err == "flashmoe: backend 'metal': this machine has no Metal device\n"
