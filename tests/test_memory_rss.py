"""The budget is kept by a real process: peak resident memory, measured by the kernel.

``test_memory.py`` does it for experts read straight from a checkpoint; here they are packed records
with checksums, and the smallest budget that the refusal names has to work.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest
from make_synthetic import make

MIB = 1 << 20
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the peak")

RUN = """
import re, sys
from flashmoe import Engine, OutOfMemory, UnsupportedError

path, memory, io, n = sys.argv[1:]
try:
    engine = Engine(path, memory=memory, io=io, threads=2, context=512)
except OutOfMemory as e:
    print("refused", e)
    sys.exit()
except UnsupportedError as e:
    print("skip", e)
    sys.exit()
ids = [(i * 37) % 1000 for i in range(100)]
engine.generate(ids, max_tokens=int(n), ignore_eos=True, temperature=0)
plan, stats = engine.plan, engine.stats()
engine.close()
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print("ran", int(peak) * 1024, plan.budget_bytes, plan.experts_bytes, plan.n_slots, stats["misses"])
"""


def run(path, memory: str, io: str, n_tokens: int = 8) -> list[str]:
    """Generate in a fresh process; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(path), memory, io, str(n_tokens)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    words = done.stdout.split(maxsplit=1)
    if words[0] == "skip":
        pytest.skip(words[1])
    return words


def check_ran(words: list[str]) -> tuple[int, int, int, int]:
    assert words[0] == "ran", words[1]
    peak, budget, experts_bytes, n_slots, misses = map(int, words[1].split())
    assert peak <= budget, f"peak {peak / MIB:.1f} MiB, budget {budget / MIB:.1f} MiB"
    return budget, experts_bytes, n_slots, misses


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """75 MB of experts, 7 MB trunk."""
    path = tmp_path_factory.mktemp("small") / "m"
    make(path, layers=4, hidden=512, experts=64, top_k=4, width=384, vocab=1024)
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("io", ["direct", "pread"])
def test_the_smallest_budget_that_is_named_works(small, io):
    what, message = run(small, "40MiB", io)
    assert what == "refused"
    named = re.search(r"smallest that works is (\d+)MiB.*give memory='\1MiB'", message)
    assert named, message
    check_ran(run(small, f"{named[1]}MiB", io))
    less = int(named[1]) - 16  # well below it, refused again and not tried
    assert run(small, f"{less}MiB", io)[0] == "refused"


@pytest.mark.slow
@pytest.mark.parametrize("io", ["direct", "pread"])
def test_experts_of_ten_times_the_budget(tmp_path, io):
    """1.8 GB of packed records, most of them read several times."""
    path = tmp_path / "m"
    try:
        make(path, layers=8, hidden=1024, experts=128, top_k=4, width=1024, vocab=1024)
        budget, experts_bytes, n_slots, misses = check_ran(run(path, "165MiB", io, 40))
        assert experts_bytes >= 10 * budget
        assert misses > n_slots
    finally:
        shutil.rmtree(path, ignore_errors=True)
