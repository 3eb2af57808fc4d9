"""Fixtures of the Metal tests: skip without the tools, sanitizer runs in a child process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import mslc

HERE = Path(__file__).parent
ON_A_MAC = {"test_metal_backend.py"}  # these run on the real GPU there
INSTALL = (
    "apt-get install -y --no-install-recommends clang-19 libclang-rt-19-dev lld-19 llvm-19 "
    "libgnustep-base-dev gobjc libblocksruntime-dev"
)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: minutes long; run with -m slow")


def pytest_collection_modifyitems(config, items):
    missing = None if "MSL_CUDA" in os.environ else mslc.missing()
    asked = "slow" in (config.option.markexpr or "") or os.environ.get("FLASHMOE_SLOW")
    for item in items:
        if HERE not in Path(item.fspath).parents:
            continue
        if sys.platform == "darwin" and item.path.name not in ON_A_MAC:
            item.add_marker(pytest.mark.skip(reason="Linux: executes Metal without a Mac"))
        elif missing:
            item.add_marker(pytest.mark.skip(reason=f"{missing} is not installed: {INSTALL}"))
        elif item.get_closest_marker("slow") and not asked:
            item.add_marker(pytest.mark.skip(reason="slow: run with -m slow"))


def sanitizer_env(san):
    """Environment in which a child Python can load libraries built with `san`."""
    return {
        **os.environ,
        "MSL_SAN": san,
        "LD_PRELOAD": mslc.sanitizer_library(san),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        # use-after-return costs a factor of 50 with fibers; leaks are Python's; GNUstep takes two of
        # its own locks in both orders
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "exitcode=66:detect_deadlocks=0",
        "UBSAN_OPTIONS": "print_stacktrace=0",
    }


def run_child(args, env, timeout=600):
    """Run a child Python; returns (exit status, output)."""
    cmd = [sys.executable, *map(str, args)]
    out = subprocess.run(cmd, env=env, cwd=HERE, timeout=timeout, text=True, errors="replace",
                         stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    return out.returncode, out.stdout


def run_tests(san, *select, env=None):
    """Run a selection of these tests in a child under a sanitizer; returns (status, output)."""
    full = {**(sanitizer_env(san) if san else os.environ), **(env or {})}
    full.setdefault("MSL_CHILD", "1")
    args = ["-m", "pytest", "-q", "-s", "-x", "-p", "no:cacheprovider", "-c", HERE / "child.ini"]
    args += ["--rootdir", HERE, "--confcutdir", HERE]
    status, output = run_child([*args, *select], full)
    assert status != 5, f"no test matched {select}"
    return status, output


def reports(output):
    """The sanitizer's summary lines."""
    return re.findall(r"(?:SUMMARY: .*|.*runtime error: .*)", output)


def assert_clean(status, output):
    """The child passed and its sanitizer said nothing."""
    assert status == 0, output[-5000:]
    assert not reports(output), output[-5000:]


in_child = pytest.mark.skipif(
    bool(os.environ.get("MSL_CHILD")), reason="already inside a sanitizer run"
)
