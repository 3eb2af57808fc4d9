"""The core compiles for macOS on Apple silicon: checked on any machine with Zig's clang and its libc."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(p for p in ROOT.glob("csrc/*/*.c"))
FLAGS = ["-std=gnu11", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
TARGET = "aarch64-macos.14.0"


def compile_one(source: Path, out: Path, *more: str) -> str:
    """Return what is wrong with a source on macOS, "" if nothing."""
    command = [sys.executable, "-m", "ziglang", "cc", "-target", TARGET, *FLAGS, *more]
    done = subprocess.run(
        [*command, "-c", source, "-o", out / f"{source.stem}.o"],
        capture_output=True,
        text=True,
        env={"ZIG_GLOBAL_CACHE_DIR": str(out / "cache"), "ZIG_LOCAL_CACHE_DIR": str(out / "cache")},
        timeout=300,
    )
    return "" if done.returncode == 0 else f"{source.name}: {done.stderr or done.returncode}"


@pytest.mark.skipif(
    importlib.util.find_spec("ziglang") is None,
    reason="no compiler for macOS: pip install ziglang==0.17.1",
)
@pytest.mark.skipif(not SOURCES, reason="not in a source tree")
def test_every_source_of_the_core_compiles_for_macos(tmp_path):
    """Objects are made, not only syntax checked: a kernel's target must allow its instructions."""
    assert {"kernels_neon", "kernels_i8mm"} <= {p.stem for p in SOURCES}
    broken = tmp_path / "broken.c"
    broken.write_text("int f(void) { return SOMETHING_LINUX_ONLY; }\n")
    assert "SOMETHING_LINUX_ONLY" in compile_one(broken, tmp_path)  # the check can fail
    with ThreadPoolExecutor(2) as pool:
        wrong = [w for w in pool.map(lambda s: compile_one(s, tmp_path), SOURCES) if w]
    assert not wrong, "\n".join(wrong)
