"""Builds the C benches once and runs them as pytest benchmarks: `pytest bench --benchmark-only`.

What a program measures itself stands in `extra_info` of the benchmark, a JSON line each; the time
that pytest-benchmark shows is that of the whole program.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

pytest.importorskip("pytest_benchmark", reason="pip install 'flashmoe-engine[bench]'")


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Return the folder of the C benches, built as `make -C bench` does."""
    if shutil.which("make") is None or shutil.which("cc") is None:
        pytest.skip("no C compiler or no make")
    made = subprocess.run(["make", "-s", "-j2"], cwd=HERE, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return HERE.parent / "build" / "bench"


@pytest.fixture
def measure(benchmark, programs):
    """Return a function that runs a bench once and returns its JSON lines."""

    def run(program: str, *args: object) -> list[dict]:
        def once() -> str:
            done = subprocess.run(
                [programs / program, *map(str, args)], capture_output=True, text=True, timeout=600
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        lines = benchmark.pedantic(once, rounds=1, iterations=1)
        results = [json.loads(line) for line in lines.splitlines()]
        assert results, f"{program} printed nothing"
        benchmark.extra_info["results"] = results
        return results

    return run
