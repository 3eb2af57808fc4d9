"""mat_vec, mat_mul and embed_rows against float64, for every format, odd sizes and run orders."""

import functools

import msl
import mslc
import numpy as np
import pytest
from conftest import assert_clean, in_child, run_tests
from metal_args import CONST, args, table
from oracle_metal import Matrix, at_offset, silu

FORMATS = ["f32", "f16", "bf16"] + [f"affine{b}" for b in (2, 3, 4, 5, 6, 8)]
SIZES = [1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 127]
ORDERS = ["", "rev", "rand7"]
UNITS = ("affine2", "affine4")  # formats of mat_vec_units
BOUND = 2.0**-20
FMT = {"f32": 32, "f16": 16, "bf16": 17, **{f"affine{b}": b for b in (2, 3, 4, 5, 6, 8)}}


@functools.lru_cache(None)
def lib(name):
    return msl.library(name)


def constants(w, vec=0, gated=0):
    unit = 2 if w.fmt in ("f16", "bf16") else 4
    anywhere = w.codes.ctypes.data % unit != 0  # as the host decides it
    return {"FC_FORMAT": FMT[w.fmt], "FC_GROUP": w.group, "FC_SCALE": FMT[w.scale], "FC_VEC": vec,
            "FC_GATED": gated, "FC_BYTES": int(anywhere)}  # fmt: skip


def item(w, y, up=None, bias=None, n=1, row0=0, add=0, n_out=None):
    up = up or w
    codes, ups = w.codes.ctypes.data, up.codes.ctypes.data
    return args("fm_metal_item", codes=codes & ~3, codes_at=codes & 3, up_codes=ups & ~3,
                up_at=ups & 3, scales=w.scales.ctypes.data, biases=w.biases.ctypes.data,
                up_scales=up.scales.ctypes.data, up_biases=up.biases.ctypes.data,
                bias=0 if bias is None else bias.ctypes.data, y=y.ctypes.data,
                n_out=n_out or w.shape[0], ldy=y.shape[1], n=n, row0=row0,
                has_bias=bias is not None, add=add)  # fmt: skip


def mat_args(w, x, rows, slices, pairs):
    return args("fm_mat_args", n_cols=w.shape[1], ldx=x.shape[1], codes_stride=w.codes.shape[1],
                scales_stride=w.scales.shape[1], gather=rows is not None, slices=slices,
                pairs=pairs)  # fmt: skip


def run_mat(kernel, items, w, x, rows=None, vec=0, gated=0, slices=1, teams=2, pairs=2):
    """One dispatch as the host makes it: `items` share x and the format of w."""
    n_out, n = max(i.n_out for i in items), max(i.n for i in items)
    rows_buf = np.zeros(1, np.int32) if rows is None else rows
    if kernel == "mat_vec_units":
        assert w.fmt in UNITS
        side, vec = slices, 1  # simdgroups that share a row; pairs: tiles of a threadgroup
        slices = -(-w.shape[1] * FMT[w.fmt] // (1024 * side)) * side
        per = pairs * (8 if gated else 16)
        groups, tg = (-(-n_out // per), len(items), n), (32 * side, teams)
    elif kernel == "mat_vec":
        per = teams * pairs * (1 if gated else 2)
        groups, tg = (-(-n_out // per), len(items), n), 32 * slices * teams
    else:
        tile = CONST["FM_MM_TILE"]
        groups, tg = (-(-n_out // tile), -(-n // tile), len(items)), CONST["FM_MM_THREADS"]
    name = {"mat_vec": "matvec", "mat_vec_units": "matunits", "mat_mul": "matmul"}[kernel]
    fc = constants(w, vec, gated)
    if kernel == "mat_vec":
        fc["FC_LONG"] = int(w.shape[1] > 1024 * slices)
    return lib(name).run(kernel, {0: table(items), 1: mat_args(w, x, rows, slices, pairs), 2: x, 3: rows_buf},
                         groups=groups, tg=tg, fc=fc)  # fmt: skip


def check(y, w, x, bias=None):
    """|y - W x| <= BOUND * sum |w x|, for all rows."""
    x = np.asarray(x, np.float64)
    exact, size = x @ w.values.T, np.abs(x) @ np.abs(w.values.T)
    if bias is not None:
        exact, size = exact + bias, size + np.abs(bias)
    assert np.isfinite(y).all()
    worst = np.max(np.abs(y - exact) / np.maximum(size, 1e-30))
    assert worst <= BOUND, f"error {worst / BOUND:.2f} of the bound"


def f32(rng, *shape):
    return at_offset(rng.standard_normal(shape).astype(np.float32), 4)


def cols_for(fmt, n, group=32):
    return n if not fmt.startswith("affine") else -(-n // group) * group


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("kernel", "n"), [("mat_vec", 1), ("mat_mul", 5)])
@pytest.mark.parametrize(("n_out", "n_cols"), [(1, 32), (9, 65), (33, 127), (17, 1023)])
def test_formats(kernel, n, fmt, n_out, n_cols):
    rng = np.random.default_rng(1)
    w = Matrix(rng, n_out, cols_for(fmt, n_cols), fmt, group=32).aligned(4)
    x, y = f32(rng, n, w.shape[1]), np.full((n, n_out), np.nan, np.float32)
    run_mat(kernel, [item(w, y, n=n)], w, x)
    check(y, w, x)


@pytest.mark.parametrize("scale", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("kernel", ["mat_vec", "mat_mul"])
def test_groups_and_scales(kernel, group, scale):
    rng = np.random.default_rng(2)
    for fmt in ("affine4", "affine3", "affine2"):
        w = Matrix(rng, 10, 256, fmt, group, scale).aligned(4)
        x, y = f32(rng, 3, 256), np.full((3, 10), np.nan, np.float32)
        run_mat(kernel, [item(w, y, n=3)], w, x)
        check(y, w, x)


@pytest.mark.parametrize("fmt", ["f32", "f16", "bf16", "affine2", "affine4", "affine8"])
def test_vector_loads(fmt):
    """FC_VEC needs 16-byte alignment, of x too, and gives the same bits as the scalar path."""
    rng = np.random.default_rng(3)
    w = Matrix(rng, 12, 512, fmt).aligned(0)
    x, out = at_offset(f32(rng, 1, 512), 0), []
    for vec in (0, 1):
        y = np.full((1, 12), np.nan, np.float32)
        run_mat("mat_vec", [item(w, y)], w, x, vec=vec)
        out.append(y)
    check(out[0], w, x)
    assert np.array_equal(*out)


@pytest.mark.parametrize("cut", [(1, 1, 2), (1, 4, 16), (2, 2, 4), (3, 1, 2), (4, 1, 6)])
@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize("fmt", ["affine4", "affine5", "affine2"])
def test_tiles_of_x(fmt, gated, cut):
    """More columns than a tile, the last one's last slice shorter than a simdgroup."""
    rng = np.random.default_rng(8)
    slices, teams, pairs = cut
    n_cols = 1024 * slices + 1120
    w, up = (Matrix(rng, 13, n_cols, fmt, 32).aligned(4) for _ in range(2))
    x, y = f32(rng, 2, n_cols), np.full((2, 13), np.nan, np.float32)
    run_mat("mat_vec", [item(w, y, up=up, n=2)], w, x, None, 0, gated, *cut)
    if gated:
        gate, other = (x.astype(np.float64) @ m.values.T for m in (w, up))
        assert np.allclose(y, silu(gate) * other, rtol=1e-4, atol=1e-2)
    else:
        check(y, w, x)


@pytest.mark.parametrize("gated", [0, 1])
def test_bits_follow_from_slices_alone(gated):
    """However many rows a simdgroup takes and however many simdgroups a threadgroup has."""
    rng = np.random.default_rng(9)
    w, up = (Matrix(rng, 37, 1600, "affine4").aligned(4) for _ in range(2))
    x, out = f32(rng, 1, 1600), []
    for teams, pairs in ((1, 2), (2, 2), (1, 8), (2, 16)):
        y = np.full((1, 37), np.nan, np.float32)
        run_mat("mat_vec", [item(w, y, up=up)], w, x, None, 0, gated, 2, teams, pairs)
        out.append(y)
    assert all(np.array_equal(out[0], y) for y in out)


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("skip", [1, 2, 3])
def test_any_address(fmt, skip):
    """Areas of foreign files begin anywhere: FC_BYTES, in all three kernels, gated too."""
    rng = np.random.default_rng(skip)
    w, up = (Matrix(rng, 11, cols_for(fmt, 127), fmt, 32).aligned(skip) for _ in range(2))
    x, y = f32(rng, 3, w.shape[1]), np.full((3, 11), np.nan, np.float32)
    for kernel in ("mat_vec", "mat_mul"):
        run_mat(kernel, [item(w, y, n=3)], w, x)
        check(y, w, x)
    run_mat("mat_vec", [item(w, y, up=up, n=3)], w, x, gated=1)
    gate, other = (x.astype(np.float64) @ m.values.T for m in (w, up))
    assert np.allclose(y, silu(gate) * other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", SIZES)
def test_ragged_rows(n, order):
    """Any number of rows; what lies past row n stays untouched."""
    rng = np.random.default_rng(n)
    w = Matrix(rng, 19, 96, "affine4", 32).aligned(4)
    x, y = f32(rng, n, 99), np.full((n + 2, 23), 7.0, np.float32)
    with msl.order(order):
        run_mat("mat_mul", [item(w, y, n=n)], w, x)
    check(y[:n, :19], w, x[:, :96])
    assert (y[n:] == 7).all()
    assert (y[:, 19:] == 7).all()


@pytest.mark.parametrize("kernel", ["mat_vec", "mat_mul"])
@pytest.mark.parametrize("fmt", ["affine4", "bf16"])
def test_items_bias_add_gather(kernel, fmt):
    """Several matrices in one dispatch: own height, bias, y += and gathered rows."""
    rng = np.random.default_rng(4)
    big, small = (Matrix(rng, n, 64, fmt).aligned(8) for n in (41, 6))
    x = f32(rng, 9, 64)
    rows = np.array([5, 0, 8, 3, 3, 7], np.int32)
    bias = f32(rng, 41)
    y0, y1 = np.ones((4, 41), np.float32), np.full((2, 6), np.nan, np.float32)
    items = [item(big, y0, bias=bias, n=4, add=1), item(small, y1, n=2, row0=4)]
    run_mat(kernel, items, big, x, rows=rows)
    check(y0 - np.float32(1), big, x[rows[:4]], bias.astype(np.float64))
    check(y1, small, x[rows[4:]])


def check_gated(y, w, up, x):
    x = np.asarray(x, np.float64)
    gate, other = x @ w.values.T, x @ up.values.T
    size = np.abs(x) @ np.abs(w.values.T) * (np.abs(other) + 1)
    size += np.abs(silu(gate)) * (np.abs(x) @ np.abs(up.values.T))
    assert (np.abs(y - silu(gate) * other) <= BOUND * size).all()


@pytest.mark.parametrize("fmt", ["affine2", "affine4", "affine6", "f16"])
@pytest.mark.parametrize("order", ORDERS)
def test_gated(fmt, order):
    """[gate | up] with SwiGLU in one pass, several experts at once."""
    rng = np.random.default_rng(5)
    pairs = [[Matrix(rng, 21, 128, fmt).aligned(4) for _ in range(2)] for _ in range(3)]
    x = f32(rng, 2, 128)
    ys = [np.full((2, 21), np.nan, np.float32) for _ in pairs]
    items = [item(g, y, up=u, n=n) for (g, u), y, n in zip(pairs, ys, (2, 1, 2))]
    with msl.order(order):
        run_mat("mat_vec", items, pairs[0][0], x, gated=1)
    for (g, u), y, n in zip(pairs, ys, (2, 1, 2)):
        check_gated(y[:n], g, u, x[:n])
        assert np.isnan(y[n:]).all()


# ---- on matrix units

CUTS = [(1, 1, 3), (2, 2, 3), (1, 3, 4), (4, 2, 1)]  # simdgroups that share a row, teams, tiles


def units_case(rng, fmt, n_out, n_cols, n=1, group=64, scale="bf16"):
    w, up = (Matrix(rng, n_out, n_cols, fmt, group, scale).aligned(0) for _ in range(2))
    return w, up, at_offset(f32(rng, n, n_cols), 0), np.full((n, n_out), np.nan, np.float32)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("gated", [0, 1])
@pytest.mark.parametrize("fmt", UNITS)
def test_units_sizes(fmt, gated, order):
    """Odd heights, columns that fill no slice, passes; a row's bits follow from n_cols alone."""
    rng = np.random.default_rng(11)
    lane = 256 // FMT[fmt]  # columns
    for n_out, n_cols in ((1, lane), (37, 7 * lane), (19, 1024)):
        w, up, x, _ = units_case(rng, fmt, n_out, n_cols, 2)
        out = []
        for side, teams, tiles in CUTS:
            if n_cols > 512 * side * teams:  # more slices than a threadgroup splits x for
                continue
            y = np.full((2, n_out), np.nan, np.float32)
            with msl.order(order):
                run_mat("mat_vec_units", [item(w, y, up=up, n=2)], w, x, None, 1, gated, side, teams, tiles)
            check_gated(y, w, up, x) if gated else check(y, w, x)
            out.append(y)
        assert all(np.array_equal(out[0], y) for y in out)


@pytest.mark.parametrize("scale", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
@pytest.mark.parametrize("fmt", UNITS)
def test_units_groups(fmt, group, scale):
    rng = np.random.default_rng(12)
    w, _, x, y = units_case(rng, fmt, 21, 384, 1, group, scale)
    run_mat("mat_vec_units", [item(w, y)], w, x, slices=2, teams=1, pairs=2)
    check(y, w, x)


@pytest.mark.parametrize("fmt", UNITS)
def test_units_widest(fmt):
    rng = np.random.default_rng(13)
    w, _, x, y = units_case(rng, fmt, 17, 4096)
    run_mat("mat_vec_units", [item(w, y)], w, x, slices=8, teams=1, pairs=10)
    check(y, w, x)


@pytest.mark.parametrize("fmt", UNITS)
def test_units_items(fmt):
    """Several matrices, ragged counts, one without a job; bias, y += and gathered rows."""
    rng = np.random.default_rng(14)
    big, small = (Matrix(rng, n, 128, fmt).aligned(0) for n in (41, 6))
    x, rows = at_offset(f32(rng, 9, 128), 0), np.array([5, 0, 8, 3, 3, 7], np.int32)
    bias, y0 = f32(rng, 41), np.ones((4, 41), np.float32)
    y1 = np.full((3, 6), np.nan, np.float32)
    none = args("fm_metal_item", n_out=41, ldy=41, n=1)
    items = [item(big, y0, bias=bias, n=4, add=1), none, item(small, y1, n=2, row0=4)]
    run_mat("mat_vec_units", items, big, x, rows=rows, slices=1, teams=2, pairs=2)
    check(y0 - np.float32(1), big, x[rows[:4]], bias.astype(np.float64))
    check(y1[:2], small, x[rows[4:]])
    assert np.isnan(y1[2]).all()


@pytest.mark.parametrize("fmt", UNITS)
def test_units_range(fmt):
    """x of any size is scaled; what is not finite stays in its row."""
    rng = np.random.default_rng(15)
    w, _, x, y = units_case(rng, fmt, 18, 640, 9)
    for row, factor in enumerate((1e30, 1e-30, 1e36, 1e-36, 0.0)):
        x[row] *= np.float32(factor)
    x[1, 256:] *= np.float32(1e4)  # the largest is another simdgroup's
    x[5] *= np.exp(rng.uniform(-20, 20, 640)).astype(np.float32)
    x[6, 7], x[7, 100] = np.nan, np.inf
    x[8] = np.abs(x[8]) * np.float32(1e-3)
    run_mat("mat_vec_units", [item(w, y, n=9)], w, x, slices=3, teams=1, pairs=2)
    finite = [0, 1, 2, 3, 4, 5, 8]
    check(y[finite], w, x[finite])
    assert (y[4] == 0).all()
    assert not np.isfinite(y[[6, 7]]).any()


@pytest.mark.parametrize("fmt", FORMATS)
def test_embed(fmt):
    rng = np.random.default_rng(6)
    w = Matrix(rng, 11, cols_for(fmt, 127, 64), fmt).aligned(4)
    ids = np.array([0, 10, 3, 3], np.int32)
    y = np.full((5, w.shape[1] + 3), 7.0, np.float32)
    a = args("fm_embed_args", n=4, n_cols=w.shape[1], ldy=y.shape[1],
             codes_stride=w.codes.shape[1], scales_stride=w.scales.shape[1])  # fmt: skip
    lib("matvec").run("embed_rows", {0: w.codes, 1: w.scales, 2: w.biases, 3: ids, 4: y, 5: a},
                      threads=(y.shape[1], 6), tg=(32, 2), fc=constants(w))  # fmt: skip
    got, exact = y[:4, : w.shape[1]], w.values[ids]
    assert (np.abs(got - exact) <= 2.0**-23 * (np.abs(exact) + 1e-30)).all()
    assert (y[:, w.shape[1] :] == 7).all()
    assert (y[4] == 7).all()


@pytest.mark.parametrize("n_out", SIZES)
@pytest.mark.parametrize("n_cols", [1, 3, 7, 33, 63])
def test_plain_odd(n_out, n_cols):
    rng = np.random.default_rng(7)
    w = Matrix(rng, n_out, n_cols, "f16").aligned(2)
    x, y = f32(rng, 1, n_cols), np.full((1, n_out), np.nan, np.float32)
    run_mat("mat_vec", [item(w, y)], w, x)
    check(y, w, x)


SUBSET = "(test_units and not test_units_sizes and not widest and not (groups and not 32)) or test_items or (test_any_address and 3) or (test_formats and 33-127) or (test_gated and not rev) or (test_embed and 3)"


@in_child
@pytest.mark.parametrize("san", mslc.SANITIZERS[1:])
def test_sanitizers(san):
    status, output = run_tests(san, __file__, "-k", SUBSET)
    assert_clean(status, output)


@in_child
@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("san", mslc.SANITIZERS[1:])
def test_sanitizers_all(san, order):
    status, output = run_tests(san, __file__, env={"MSL_ORDER": order})
    assert_clean(status, output)
