"""Row-wise ops, router and greedy choice against float64, at odd sizes and in several orders."""

import msl
import mslc
import numpy as np
import oracle_metal as oracle
import pytest
from conftest import assert_clean, in_child, run_tests
from metal_args import CONST, args
from test_metal_mat import ORDERS, SIZES, f32, lib

U = 2.0**-24


def nan(*shape):
    return np.full(shape, np.nan, np.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_cols", [*SIZES, 1023, 2048])
def test_rms_norm(n_cols, order):
    rng = np.random.default_rng(n_cols)
    x, w, y = f32(rng, 3, n_cols + 5), f32(rng, n_cols), nan(3, n_cols + 2)
    x[1] *= 1e-4
    a = args("fm_norm_args", n_cols=n_cols, ldx=x.shape[1], ldy=y.shape[1], eps=1e-6)
    with msl.order(order):
        lib("rows").run("rms_norm", {0: x, 1: w, 2: y, 3: a}, groups=3, tg=256)
    exact = oracle.rmsnorm(x[:, :n_cols], w, 1e-6)
    assert (np.abs(y[:, :n_cols] - exact) <= 2.0**-20 * np.abs(exact)).all()
    assert np.isnan(y[:, n_cols:]).all()


def test_rms_norm_in_place():
    rng = np.random.default_rng(0)
    x, w = f32(rng, 2, 96), f32(rng, 96)
    exact = oracle.rmsnorm(x, w, 1e-5)
    a = args("fm_norm_args", n_cols=96, ldx=96, ldy=96, eps=1e-5)
    lib("rows").run("rms_norm", {0: x, 1: w, 2: x, 3: a}, groups=2, tg=256)
    assert (np.abs(x - exact) <= 2.0**-20 * np.abs(exact)).all()


@pytest.mark.parametrize(("heads", "hd", "rot"), [(1, 2, 2), (3, 10, 6), (4, 64, 16), (2, 33, 32)])
def test_rotary(heads, hd, rot):
    rng = np.random.default_rng(1)
    n, half, ld = 3, rot // 2, heads * 2 * hd + 3
    x = f32(rng, n, ld)
    before = x.astype(np.float64)
    angle = np.array([0, 5, 200_001.0])[:, None] * 1e7 ** (-2.0 * np.arange(half) / rot)
    cs = np.stack([np.cos(angle), np.sin(angle)], -1).astype(np.float32)
    a = args("fm_rotary_args", n=n, ld=ld, ld_head=2 * hd, n_heads=heads, half_rot=half)
    lib("rows").run("rotary", {0: x, 1: cs, 2: a}, threads=(half + 1, heads, n), tg=(8, 2, 1))
    exact = before.copy()
    for h in range(heads):
        i = h * 2 * hd + np.arange(half)
        lo, hi = before[:, i], before[:, i + half]
        exact[:, i] = lo * np.cos(angle) - hi * np.sin(angle)
        exact[:, i + half] = hi * np.cos(angle) + lo * np.sin(angle)
        size = np.abs(lo) + np.abs(hi)
        for j in (i, i + half):
            assert (np.abs(x[:, j] - exact[:, j]) <= 4 * U * size).all()
    untouched = np.abs(exact - before) == 0
    assert (x[untouched] == before[untouched]).all()


@pytest.mark.parametrize("n", [*SIZES, 1023])
def test_swiglu(n):
    rng = np.random.default_rng(n)
    gate, up, y = f32(rng, n) * 8, f32(rng, n), nan(n + 1)
    gate[0] = -100
    lib("rows").run("swiglu", {0: gate, 1: up, 2: y, 3: args("fm_rows_args", n=n)},
                    groups=n // 64 + 1, tg=64)  # fmt: skip
    exact = oracle.silu(gate.astype(np.float64)) * up
    assert (np.abs(y[:n] - exact) <= 16 * U * np.abs(exact) + 1e-37).all()
    assert np.isnan(y[n])


@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize("n_cols", [1, 33, 65])
def test_add_gated(n_cols, gated):
    rng = np.random.default_rng(2)
    x, gate, y = f32(rng, 3, n_cols), f32(rng, 3), f32(rng, 3, n_cols)
    f = oracle.sigmoid(gate.astype(np.float64))[:, None] if gated else 1.0
    exact, size = y + f * x, np.abs(y) + np.abs(f * x)
    a = args("fm_rows_args", n=3, n_cols=n_cols, limit=gated)
    lib("rows").run("add_gated", {0: x, 1: gate, 2: y, 3: a}, threads=(n_cols + 3, 4), tg=(32, 2))
    assert (np.abs(y - exact) <= 8 * U * size).all()


def test_clip():
    x = np.array([-9, -8, -7.5, 0, 7.9, 8.5, 1e30], np.float32)
    exact = np.clip(x, -8, 8)
    a = args("fm_rows_args", n=6, limit=8)
    lib("rows").run("clip_abs", {0: x, 1: a}, groups=1, tg=32)
    assert np.array_equal(x[:6], exact[:6])
    assert x[6] == np.float32(1e30)


@pytest.mark.parametrize("hidden", [1, 31, 65])
def test_combine(hidden):
    rng = np.random.default_rng(3)
    part, y = f32(rng, 7, hidden), f32(rng, 3, hidden)
    start = np.array([0, 3, 3, 7], np.int32)
    index = np.array([6, 0, 2, 1, 1, 5, 3], np.int32)
    weight = rng.uniform(0, 1, 7).astype(np.float32)
    exact, size = y.astype(np.float64), np.abs(y).astype(np.float64)
    for r in range(3):
        for e in range(start[r], start[r + 1]):
            exact[r] += weight[e] * part[index[e]].astype(np.float64)
            size[r] += np.abs(weight[e] * part[index[e]])
    a = args("fm_rows_args", n=3, n_cols=hidden)
    lib("rows").run("combine", {0: y, 1: part, 2: start, 3: index, 4: weight, 5: a},
                    threads=(hidden + 2, 3), tg=(32, 1))  # fmt: skip
    assert (np.abs(y - exact) <= 8 * U * size).all()


@pytest.mark.parametrize("n_cols", [1, 33, 1023])
def test_find_nonfinite(n_cols):
    x = np.zeros((5, n_cols), np.float32)
    x[1, -1], x[3, 0], x[4, n_cols // 2] = np.nan, -np.inf, np.float32(3.4e38)
    bad = np.full(5, 9, np.uint32)
    a = args("fm_rows_args", n=5, n_cols=n_cols)
    lib("rows").run("find_nonfinite", {0: x.view(np.uint32), 1: bad, 2: a}, groups=5, tg=256)
    assert bad.tolist() == [0, 1, 0, 1, 0]


# ---- router


def run_route(logits, k, bias=None, **kw):
    n, n_experts = logits.shape
    ids, weights = np.full((n, k), -1, np.int32), nan(n, k)
    a = args("fm_topk_args", n_experts=n_experts, k=k, sigmoid=kw.get("sigmoid_score", False),
             renorm=kw.get("renorm", True), has_bias=bias is not None,
             n_group=kw.get("n_group", 1), topk_group=kw.get("topk_group", 1),
             eps=kw.get("eps", 0.0), scale=kw.get("scale", 1.0))  # fmt: skip
    lib("topk").run("route", {0: logits, 1: logits if bias is None else bias, 2: ids, 3: weights,
                              4: a}, groups=n, tg=32)  # fmt: skip
    return ids, weights


ROUTES = [
    {},
    {"renorm": False},
    {"sigmoid_score": True, "eps": 1e-20, "scale": 2.5, "bias": True},
    {"sigmoid_score": True, "renorm": False, "n_group": 4, "topk_group": 2, "bias": True},
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kw", ROUTES)
@pytest.mark.parametrize(("n_experts", "k"), [(8, 1), (8, 8), (60, 4), (128, 8), (512, 10)])
def test_route(n_experts, k, kw, order):
    rng = np.random.default_rng(n_experts)
    if kw.get("n_group") and (n_experts % 4 or k > n_experts // 2):
        pytest.skip("groups need whole groups and enough experts")
    logits = f32(rng, 3, n_experts) * 3
    kw = dict(kw)
    bias = f32(rng, n_experts) * np.float32(0.1) if kw.pop("bias", None) else None
    with msl.order(order):
        ids, weights = run_route(logits, k, bias, **kw)
    for r in range(3):
        want, w = oracle.route(logits[r], k, bias=bias, **kw)
        assert ids[r].tolist() == want.tolist()
        assert (np.abs(weights[r] - w) <= 64 * U * w).all()


def test_route_ties_and_special_values():
    logits = np.zeros((4, 33), np.float32)
    logits[0, [5, 20]] = 1.0
    logits[1, 7] = -0.0  # equal to +0: lower index first
    logits[2, :30] = -np.inf
    logits[3, 2] = np.nan
    logits[3, 9] = 4.0
    ids, weights = run_route(logits, 4)
    assert ids[0].tolist() == [5, 20, 0, 1]
    assert ids[1].tolist() == [0, 1, 2, 3]
    assert ids[2].tolist() == [30, 31, 32, 0]
    assert ids[3].tolist()[0] == 9
    assert 2 not in ids[3]
    assert np.allclose(weights[1], 0.25)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_cols", [1, 2, 31, 255, 257, 5000])
def test_argmax(n_cols, order):
    rng = np.random.default_rng(n_cols)
    logits = f32(rng, 3, n_cols)
    n_valid = max(1, n_cols - 3)
    logits[:, n_valid:] = 99
    logits[1, n_valid // 2 :: 3] = logits[1, :n_valid].max()
    logits[2] = -np.inf
    ids = np.full(3, -1, np.int32)
    a = args("fm_argmax_args", n_cols=n_cols, n_valid=n_valid)
    with msl.order(order):
        lib("topk").run("argmax_rows", {0: logits, 1: ids, 2: a}, groups=3,
                        tg=CONST["FM_NORM_THREADS"])  # fmt: skip
    assert ids.tolist() == logits[:, :n_valid].argmax(1).tolist()


SUBSET = "route and 60 or rms_norm and (33 or place) or nonfinite or combine or argmax and 257"


@in_child
@pytest.mark.parametrize("san", mslc.SANITIZERS[1:])
def test_sanitizers(san):
    status, output = run_tests(san, __file__, "-k", SUBSET)
    assert_clean(status, output)


@in_child
@pytest.mark.slow
@pytest.mark.parametrize("san", mslc.SANITIZERS[1:])
def test_sanitizers_all(san):
    status, output = run_tests(san, __file__)
    assert_clean(status, output)
