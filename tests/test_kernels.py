"""CPU kernels from Python, and the C kernel tests of other instruction sets.

The kernels' bounds are checked against float64 in ``tests/c/test_kernels*.c``, which
``test_c.py`` runs, for every variant of this machine. Here: variants seen from Python agree with an
oracle that shares no code with the core, and Arm's variants run under an emulator.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from flashmoe import _core

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "ctests-arm"
ARM_CC, ARM_AR, ARM_RUN = "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-ar", "qemu-aarch64"
NO_ARM = "needs: apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"
VARIANTS = _core.cpu_variants()


def affine_oracle(codes, scales, biases, bits, group, n_cols):
    """Decode rows of an affine matrix: code j is bits j*b .. j*b+b-1 of the row's bytes."""
    stream = np.unpackbits(codes.reshape(len(codes), -1), axis=1, bitorder="little")
    digits = stream.reshape(len(codes), n_cols, bits).astype(np.float64)
    code = digits @ (2.0 ** np.arange(bits))
    scale, bias = (
        (a.reshape(len(codes), -1).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        for a in (scales, biases)
    )
    return code * np.repeat(scale, group, axis=1) + np.repeat(bias, group, axis=1)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_decode_is_the_oracles(variant, bits, group):
    rng = np.random.default_rng(bits * group)
    for n_cols in (group, 5 * group, 1024 + group):
        w = rng.standard_normal((3, n_cols)).astype(np.float32)
        name = f"affine{bits}"
        areas = _core.internals.encode(w, name, group, "bf16")
        got = _core.internals.decode(variant, name, group, "bf16", 3, n_cols, *areas)
        rows = [a.reshape(3, -1) for a in areas]
        want = affine_oracle(*rows, bits, group, n_cols)
        np.testing.assert_array_equal(got, want.astype(np.float32))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("n_experts", "k"), [(1, 1), (7, 7), (128, 8), (256, 8), (512, 10)])
def test_route_is_the_oracles(variant, n_experts, k):
    rng = np.random.default_rng(n_experts)
    logits = rng.standard_normal((50, n_experts)).astype(np.float32)
    logits[::3] = np.round(logits[::3])  # ties: the lower id first
    ids, weights = _core.internals.route(variant, logits, k)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    top = np.take_along_axis(logits, order, axis=1).astype(np.float64)
    p = np.exp(top - top.max(axis=1, keepdims=True))
    np.testing.assert_allclose(weights, p / p.sum(axis=1, keepdims=True), rtol=3e-7)


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **env}, capture_output=True, text=True, cwd=ROOT
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_can_be_forced(variant):
    code = "from flashmoe import _core; print(_core.cpu_variant())"
    assert run_python(code, FLASHMOE_CPU=variant).stdout.strip() == variant


def test_unknown_variant_is_refused():
    code = "from flashmoe import _core; _core.cpu_variant()"
    result = run_python(code, FLASHMOE_CPU="mmx")
    assert result.returncode != 0
    assert "'mmx' is unknown" in result.stderr


@pytest.fixture(scope="session")
def arm_tests():
    """Cross-compile the kernels and their tests for AArch64, only what has changed."""
    if not all(shutil.which(tool) for tool in (ARM_CC, ARM_AR, ARM_RUN)):
        pytest.skip(NO_ARM)
    csrc, tests = ROOT / "csrc", ROOT / "tests" / "c"
    flags = ["-O2", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{csrc}", f"-I{tests}"]
    headers = [*csrc.glob("*/*.h"), *tests.glob("*.h")]
    newest = max(p.stat().st_mtime for p in headers)
    BUILD.mkdir(parents=True, exist_ok=True)
    folders = [csrc / folder for folder in ("base", "quant", "cpu")]
    objects: dict[Path, Path] = {}

    def compile_one(source):
        out = objects[source]
        if not out.exists() or out.stat().st_mtime < max(newest, source.stat().st_mtime):
            subprocess.run([ARM_CC, *flags, "-c", source, "-o", out], check=True)

    cases = sorted(tests.glob("test_kernels*.c"))
    for source in [*sorted(p for folder in folders for p in folder.glob("*.c")), *cases]:
        objects[source] = BUILD / f"{source.stem}.o"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sorted(objects, key=lambda p: -p.stat().st_size)))
    core = [out for source, out in objects.items() if source not in cases]
    programs = {}
    for source in cases:
        out = programs[source.stem] = BUILD / source.stem
        command = [ARM_CC, "-static", objects[source], *core, "-lpthread", "-lm", "-o", out]
        subprocess.run(command, check=True)
    return programs


@pytest.mark.parametrize("program", ["test_kernels", "test_kernels_ops"])
@pytest.mark.slow
def test_arm_variants_under_emulation(arm_tests, program):
    command = [ARM_RUN, "-cpu", "max", arm_tests[program], "neon", "i8mm"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr


def test_arm_ops_under_emulation(arm_tests):
    command = [ARM_RUN, "-cpu", "max", arm_tests["test_kernels_ops"], "neon"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
