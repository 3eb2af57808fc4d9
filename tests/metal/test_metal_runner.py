"""The runner itself: planted mistakes must be found, correct kernels must pass in every mode."""

import os
import struct

import msl
import mslc
import numpy as np
import pytest
from conftest import HERE, assert_clean, in_child, reports, run_tests
from msl_rewrite import MslError

ORDERS = ["", "rev", "rand1", "rand2"]
N = struct.pack("I", 1000)


@pytest.fixture(scope="module")
def lib():
    return msl.Library(HERE / "faults.metal")


def f32(n, fill=0.0):
    return np.full(n, fill, np.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tg", [1, 5, 32, 33, 250, 1024])
def test_reduction(lib, order, tg):
    rng = np.random.default_rng(0)
    x, out = rng.standard_normal(1000).astype(np.float32), f32(1)
    with msl.order(order):
        lib.run("sum_ok", {0: out, 1: x, 2: N}, groups=1, tg=tg, fc={"FC_MODE": 2})
    assert abs(out[0] - 2 - x.sum(dtype=np.float64)) <= 2.0**-20 * np.abs(x).sum()


def test_no_barrier_shows_in_some_order(lib):
    x = np.arange(64, dtype=np.float32)
    wrong = 0
    for order in ORDERS:
        out = f32(64)
        with msl.order(order):
            lib.run("no_barrier", {0: out, 1: x}, groups=1, tg=64)
        wrong += not np.array_equal(out, x[::-1])
    assert wrong


def test_uninitialised_is_nan(lib):
    out = f32(64)
    lib.run("uninitialised", {0: out}, groups=1, tg=64)
    assert np.isnan(out[63])
    assert not np.isnan(out[:63]).any()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("partial_barrier", "reached by 63 of 64"),
        ("two_barriers", "different barriers"),
        ("inactive_shuffle", "source lane is not active"),
        ("inactive_matrix", "not all 32 lanes"),
        ("too_much", "more than 32768 bytes"),
    ],
)
def test_faults(lib, name, words):
    with pytest.raises(msl.KernelFault, match=words):
        lib.run(name, {0: f32(64)}, groups=1, tg=64)


@pytest.mark.parametrize(
    ("buffers", "tg", "words"),
    [
        ({1: f32(9), 2: N}, 32, "missing buffer binding at index 0"),
        ({0: f32(1), 1: f32(9), 2: b"\1\0"}, 32, "has space for 2 bytes"),
        ({0: f32(4).view(np.uint8)[1:], 1: f32(9), 2: N}, 32, "not aligned to 4"),
        ({0: f32(1), 1: f32(9), 2: N}, 1025, "1025 threads"),
    ],
)
def test_bindings(lib, buffers, tg, words):
    with pytest.raises(msl.KernelFault, match=words):
        lib.run("sum_ok", buffers, groups=1, tg=tg)


REFUSED = {
    "is not known": "kernel void k(device float *o [[buffer(0)]], uint i [[thread_pos]]) {}",
    "same buffer index": "kernel void k(device float *o [[buffer(0)]], device int *p [[buffer(0)]]) {}",
    "without an address space": "kernel void k(float *o [[buffer(0)]]) {}",
    "no attribute": "kernel void k(device float *o) {}",
    "threadgroup variable cannot": "kernel void k(device float *o [[buffer(0)]])"
    " { threadgroup float x = 1; o[0] = x; }",
    "address": "kernel void k(device float *o [[buffer(0)]])"
    " { threadgroup float *p = o; p[0] = 1; }",
    "const": "kernel void k(constant float *o [[buffer(0)]]) { o[0] = 1; }",
    "double": "kernel void k(device float *o [[buffer(0)]]) { double x = 1; o[0] = x; }",
    "erf": "kernel void k(device float *o [[buffer(0)]]) { o[0] = erf(o[1]); }",
    "ambiguous": "kernel void k(device uint *o [[buffer(0)]]) { o[0] = min(o[1], 7); }",
    "components": "kernel void k(device float4 *o [[buffer(0)]]) { o[0] = float4(1, 2, 3); }",
    "lengths": "kernel void k(device float4 *o [[buffer(0)]]) { o[0] = float4(int3(1)); }",
    "extension": "kernel void k(device int *o [[buffer(0)]]) { if (int x = o[0]; x) o[0] = 1; }",
}


@pytest.mark.parametrize("words", REFUSED)
def test_check_refuses(words, tmp_path):
    path = tmp_path / "k.metal"
    path.write_text("#include <metal_stdlib>\nusing namespace metal;\n" + REFUSED[words])
    with pytest.raises(MslError, match=words):
        mslc.check(path)


def test_check_accepts():
    mslc.check(HERE / "faults.metal")


# ---- under the sanitizers: each case runs in a child, alone

CASES = {
    "past_end": ({"buffers": {0: f32(1), 1: f32(1000), 2: N}, "threads": 1001, "tg": 64}, "address"),
    "past_threadgroup": ({"buffers": {0: f32(64)}, "groups": 1, "tg": 64}, "address"),
    "no_barrier": ({"buffers": {0: f32(64), 1: f32(64)}, "groups": 1, "tg": 64}, "thread"),
    "racy_write": ({"buffers": {0: f32(1)}, "groups": 1, "tg": 128}, "thread"),
    "racy_groups": ({"buffers": {0: f32(2)}, "groups": 4, "tg": 32}, "thread"),
    "misaligned": ({"buffers": {0: np.zeros((32, 4), np.uint32), 1: np.zeros(133, np.uint32)},
                        "groups": 1, "tg": 32}, "undefined"),
    "wide_shift": ({"buffers": {0: np.zeros(32, np.uint32)}, "groups": 1, "tg": 32}, "undefined"),
}  # fmt: skip


@pytest.mark.skipif("MSL_CHILD" not in os.environ, reason="run by test_sanitizer_finds")
@pytest.mark.parametrize("name", CASES)
def test_one_planted(lib, name):
    buffers = {i: b.copy() if isinstance(b, np.ndarray) else b
               for i, b in CASES[name][0]["buffers"].items()}  # fmt: skip
    lib.run(name, **{**CASES[name][0], "buffers": buffers})


@in_child
@pytest.mark.parametrize("name", CASES)
def test_sanitizer_finds(name):
    san = CASES[name][1]
    status, output = run_tests(san, f"{__file__}::test_one_planted[{name}]")
    assert status != 0, output
    assert reports(output), output
    if san != "undefined":
        assert "faults.metal" in output, output


@pytest.mark.skipif("MSL_CHILD" not in os.environ, reason="run by the next test")
def test_many_groups(lib):
    """More threadgroups than TSan's record of unfinished calls has places."""
    out = f32(70000)
    lib.run("groups_ok", {0: out}, groups=out.size, tg=1)
    assert (out == np.arange(out.size)).all()


@in_child
@pytest.mark.parametrize("san", mslc.SANITIZERS[1:])
def test_sanitizer_has_no_false_alarm(san):
    status, output = run_tests(san, __file__, "-k", "test_reduction or many_groups")
    assert_clean(status, output)
