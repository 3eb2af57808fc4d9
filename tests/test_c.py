"""The C tests of tests/c and the fuzz drivers of tests/fuzz: plain, under ASan + UBSan, under TSan.

Each program is built by tests/c/Makefile (incrementally, into build/ctests) and says by its exit code
whether it passed (0), failed (1) or was skipped (77).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
C_TESTS = TESTS / "c"
BUILD = TESTS.parent / "build" / "ctests"
CC = os.environ.get("CC", "cc")
PROGRAMS = sorted(p.stem for p in [*C_TESTS.glob("test_*.c"), *TESTS.glob("fuzz/fuzz_*.c")])
THREADED = ("test_threads", "test_io", "test_experts", "test_store", "test_session")
SANITIZERS = {"plain": [], "asan": ["-fsanitize=address,undefined"], "tsan": ["-fsanitize=thread"]}
CASES = [
    (mode, program)
    for mode in SANITIZERS
    for program in PROGRAMS
    if mode != "tsan" or program.startswith(THREADED)
]


def simd_objects() -> str:
    """Return the folder of the SIMD variants that the package was built with, "" if any is out of date.

    They are tested as they ship, and run several times as fast as those of tests/c/Makefile.
    """
    csrc, wanted = TESTS.parent / "csrc", "cpu/kernels_a*"
    sources = list(csrc.glob(wanted + ".c"))
    newest = max(p.stat().st_mtime for p in [*csrc.glob("*/*.h"), *sources])
    for folder in (TESTS.parent / "build" / "core").glob("*/csrc"):
        objects = list(folder.glob(wanted + ".o"))
        if len(objects) == len(sources) and all(o.stat().st_mtime >= newest for o in objects):
            return str(folder)
    return ""


def _make(mode: str, programs: list[str]) -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", "-j2", f"MODE={mode}", f"CC={CC}", f"TESTS={' '.join(programs)}"]
    command += [f"SIMD_FROM={simd_objects()}"]
    return subprocess.run(
        [*command, f"BUILD={BUILD}", "programs"],
        cwd=C_TESTS,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Return a function that builds a mode once and gives the folder of its programs."""
    done: dict[str, Path | str] = {}

    def build(mode: str) -> Path | str:
        if mode in done:
            return done[mode]
        if shutil.which(CC) is None or shutil.which("make") is None:
            return "no C compiler or no make"
        probe = tmp_path_factory.mktemp("probe") / "probe"
        source = "int main(void) { return 0; }"
        command = [CC, *SANITIZERS[mode], "-x", "c", "-", "-o", str(probe)]
        tried = subprocess.run(command, input=source, capture_output=True, text=True)
        ran = tried.returncode == 0 and subprocess.run([probe], capture_output=True).returncode == 0
        if not ran:
            done[mode] = f"this machine cannot build or run {mode} programs"
            return done[mode]
        result = _make(mode, [program for m, program in CASES if m == mode])
        assert result.returncode == 0, result.stdout
        done[mode] = BUILD / f"{mode}-{Path(CC).name}"
        return done[mode]

    return build


@pytest.mark.parametrize(("mode", "program"), CASES, ids=[f"{m}-{p}" for m, p in CASES])
def test_c_program(mode, program, built, tmp_path):
    folder = built(mode)
    if isinstance(folder, str):
        pytest.skip(folder)
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLASHMOE_")}
    env.pop("LD_PRELOAD", None)
    env["TMPDIR"] = str(tmp_path)
    result = subprocess.run(
        [folder / program], env=env, capture_output=True, text=True, timeout=120
    )
    if result.returncode == 77:
        pytest.skip(result.stderr.strip() or "skipped without a reason")
    assert result.returncode == 0, f"exit {result.returncode}\n{result.stdout}{result.stderr}"


def test_bench_io_measures_every_method(tmp_path):
    """A few milliseconds each: the numbers mean nothing, the lines must be whole."""
    if shutil.which(CC) is None or shutil.which("make") is None:
        pytest.skip("no C compiler or no make")
    out = BUILD.parent / "bench-test"
    command = ["make", "-s", "-j2", "DIRS=base io", "PROGRAMS=bench_io", f"OUT={out}", f"CC={CC}"]
    made = subprocess.run([*command], cwd=TESTS.parent / "bench", capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    options = "--size 4M --blocks 64K,1M --depths 1,4 --runs 2 --seconds 0.02".split()
    result = subprocess.run(
        [out / "bench_io", "--file", tmp_path / "data", *options],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["method"] for line in lines} >= {"pread", "mmap"}
    assert [line["bench"] for line in lines].count("io_best") == 1
    assert lines[-1]["bench"] == "io_best"
    for line in lines:
        assert line["gb_per_s"] > 0
        assert line["p50_us"] <= line["p99_us"]
        assert line["data_checked"]
        assert line["commit"]
