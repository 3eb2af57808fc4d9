"""The Metal backend, host and kernels together, against the CPU backend and float64.

The same calls go to both backends; results must agree within the op's bound (kernels.h), ids and
stored rows exactly. The environment of the stand-in (late, protected) multiplies the cases.
"""

import ctypes as C

import hostlib as H
import numpy as np
import oracle_metal as oracle
import pytest
from conftest import assert_clean, in_child, run_tests
from oracle_metal import Matrix
from test_metal_mat import FORMATS, cols_for

U = 2.0**-24
QUANT = {f: i for i, f in enumerate(FORMATS)}  # the order of csrc/quant/quant_list.h


class Both:
    """One list of buffers in each backend's memory, and calls made on both."""

    def __init__(self):
        self.cpu, self.metal = H.Backend("cpu"), H.Backend("metal")
        self.backends = (self.cpu, self.metal)

    def run(self, setup, *shapes):
        """setup(backend, outputs) records ops; returns the outputs of [cpu, metal]."""
        results = []
        for b in self.backends:
            outs = [b.array(s.copy() if isinstance(s, np.ndarray) else np.full(s, np.nan, "f4"))
                    for s in shapes]  # fmt: skip
            b.begin()
            setup(b, *outs)
            b.sync()
            results.append([o.copy() for o in outs])
        return results


@pytest.fixture
def both():
    made = Both()
    yield made
    for b in made.backends:
        b.close()
    assert H.MAC or made.metal.lib.fake_metal_live() == 0, "objects of the stand-in are still alive"


def put(b, w, skip=0, usage=0, skip_scales=0):
    """A weight matrix in backend memory."""
    affine = w.fmt.startswith("affine")
    areas = [b.array(w.codes, usage, skip)]
    areas += [b.array(a, usage, skip + skip_scales) if affine else None for a in (w.scales, w.biases)]
    b.keep = getattr(b, "keep", []) + areas
    return H.Mat(QUANT[w.fmt], QUANT[w.scale] if affine else 0, w.group if affine else 0, *w.shape,
                 *[H.address(a) for a in areas], w.codes.shape[1], w.scales.shape[1] if affine else 0)  # fmt: skip


def items(*rows):
    """fm_matmul_item array from (mat, y, bias, add)."""
    out = (H.MatmulItem * len(rows))()
    for o, (m, y, bias, add) in zip(out, rows):
        o.W, o.y, o.ldy = C.pointer(m), H.address(y), y.shape[1]
        o.bias, o.add = H.address(bias), add
    return out


def rand(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def near(got, exact, bound):
    assert np.isfinite(got).all()
    worst = np.max(np.abs(got - exact) / np.maximum(bound, 1e-30))
    assert worst <= 1, f"error {worst:.2f} of the bound"


# ---- matrices


@pytest.mark.parametrize("n", [1, 4, 5, 33])
@pytest.mark.parametrize("fmt", FORMATS)
def test_matmul(both, fmt, n):
    rng = np.random.default_rng(n)
    for n_out, n_cols, skip in ((1, 32, 0), (33, 65, 4), (50, 127, 64), (9, 64, 3)):
        w = Matrix(rng, n_out, cols_for(fmt, n_cols), fmt, 32)
        x = rand(rng, n, w.shape[1] + 3)

        def setup(b, y, w=w, x=x, skip=skip):
            m, xb = put(b, w, skip), b.array(x)
            b.matmul(xb.ctypes.data, x.shape[1], n, items((m, y, None, False)), 1)

        cpu, metal = both.run(setup, (n, n_out))
        x64 = x[:, : w.shape[1]].astype(np.float64)
        size = np.abs(x64) @ np.abs(w.values.T)
        near(metal[0], x64 @ w.values.T, 2.0**-20 * size)
        near(metal[0], cpu[0], 2.0**-19 * size)


@pytest.mark.parametrize("n_cols", [1088, 4160])
def test_slices_follow_columns(both, n_cols):
    """Few and many rows of a matrix are cut differently for mat_vec; a row's bits stay."""
    rng = np.random.default_rng(12)
    w, x = Matrix(rng, 2600 if n_cols > 4096 else 5200, n_cols, "affine4"), rand(rng, 1, n_cols)

    def setup(b, few, many):
        m, xb = put(b, w), b.array(x)
        for y in (few, many):
            m.n_rows = y.shape[1]
            b.matmul(xb.ctypes.data, n_cols, 1, items((m, y, None, False)), 1)

    cpu, metal = both.run(setup, (1, 9), (1, w.shape[0]))
    near(metal[1], x @ w.values.T, 2.0**-20 * (np.abs(x) @ np.abs(w.values.T)))
    assert np.array_equal(metal[0], metal[1][:, :9])
    near(metal[1], cpu[1], 2.0**-19 * (np.abs(x) @ np.abs(w.values.T)))


@pytest.mark.parametrize("n", [1, 7])
def test_matmul_mixed_items(both, n):
    """Items of different formats, heights and strides; bias; y += alone."""
    rng = np.random.default_rng(3)
    ws = [Matrix(rng, o, 128, f, g) for o, f, g in
          ((9, "affine4", 64), (70, "affine8", 64), (1, "affine4", 64), (5, "bf16", 64),
           (12, "affine4", 32))]  # fmt: skip
    x, bias, start = rand(rng, n, 128), rand(rng, 70), rand(rng, n, 9)

    def setup(b, *ys):
        mats, xb, bb = [put(b, w) for w in ws], b.array(x), b.array(bias)
        rows = [(m, y, bb if i == 1 else None, False) for i, (m, y) in enumerate(zip(mats, ys))]
        b.matmul(xb.ctypes.data, 128, n, items(*rows), len(rows))
        b.sync()  # the next call has an encoder of its own, with its own declarations
        b.matmul(xb.ctypes.data, 128, n, items((mats[0], ys[-1], None, True)), 1)

    _cpu, metal = both.run(setup, *[(n, w.shape[0] + 2) for w in ws], start)
    for i, w in enumerate(ws):
        exact = x.astype("f8") @ w.values.T + (bias if i == 1 else 0)
        size = np.abs(x).astype("f8") @ np.abs(w.values.T) + (np.abs(bias) if i == 1 else 0)
        near(metal[i][:, : w.shape[0]], exact, 2.0**-20 * size)
        assert np.isnan(metal[i][:, w.shape[0] :]).all()
    exact = start + x.astype("f8") @ ws[0].values.T
    near(metal[-1], exact, 2.0**-19 * (np.abs(start) + np.abs(x) @ np.abs(ws[0].values.T)))


@pytest.mark.parametrize("skip", [0, 1, 2])
@pytest.mark.parametrize("fmt", FORMATS)
def test_embed(both, fmt, skip):
    rng = np.random.default_rng(4)
    w = Matrix(rng, 13, cols_for(fmt, 127), fmt, 32)
    ids = np.array([12, 0, 5, 5], np.int32)

    def setup(b, y):
        copy = ids.copy()
        b.embed(C.byref(put(b, w, skip)), copy.ctypes.data, 4, y.ctypes.data, y.shape[1])
        copy[:] = -1  # the ids belong to the caller again once the call returns

    cpu, metal = both.run(setup, (4, w.shape[1] + 1))
    assert np.array_equal(cpu[0][:, :-1], metal[0][:, :-1])
    near(metal[0][:, :-1], w.values[ids], 2.0**-23 * np.abs(w.values[ids]))


def expert_case(rng, fmt, hidden, width, n_experts, rows_of, down_fmt=None):
    ws = [[Matrix(rng, width, hidden, fmt, 32), Matrix(rng, width, hidden, fmt, 32),
           Matrix(rng, hidden, width, down_fmt or fmt, 32)] for _ in range(n_experts)]  # fmt: skip
    x = rand(rng, max(max(r) for r in rows_of) + 1, hidden)
    return ws, x


@pytest.mark.parametrize("fmt", ["affine2", "affine3", "affine4", "affine8", "f32", "bf16"])
@pytest.mark.parametrize("counts", [[1] * 10, [1, 4, 2], [9, 1, 33, 5]])
def test_experts(both, fmt, counts):
    rng = np.random.default_rng(sum(counts))
    hidden, width = 96, 64
    rows_of = [rng.integers(0, 40, n).astype(np.int32) for n in counts]
    ws, x = expert_case(rng, fmt, hidden, width, len(counts), rows_of)
    n_part = sum(counts) + 2

    def setup(b, out):
        mats = [[put(b, w, 3 * i) for w in e] for i, e in enumerate(ws)]  # every alignment
        xb, gate, up = b.array(x), b.empty((n_part, width)), b.empty((n_part, width))
        jobs, at = (H.ExpertJob * len(counts))(), 1
        for job, mat, rows in zip(jobs, mats, rows_of):
            job.gate, job.up, job.down = mat
            job.rows, job.n, job.out0 = rows.ctypes.data, len(rows), at
            at += len(rows)
        b.experts(C.byref(H.ExpertArgs(xb.ctypes.data, len(x), C.cast(jobs, H.P), len(jobs),
                                       gate.ctypes.data, up.ctypes.data, out.ctypes.data)))  # fmt: skip

    cpu, metal = both.run(setup, (n_part, hidden))
    at = 1
    for e, rows in zip(ws, rows_of):
        xr = x[rows].astype("f8")
        g, u = xr @ e[0].values.T, xr @ e[1].values.T
        h = oracle.silu(g) * u
        h_size = np.abs(xr) @ np.abs(e[0].values.T) * (np.abs(u) + 1)
        h_size += np.abs(g) * (np.abs(xr) @ np.abs(e[1].values.T))
        bound = 2.0**-20 * (np.abs(h) + h_size) @ np.abs(e[2].values.T)
        near(metal[0][at : at + len(rows)], h @ e[2].values.T, bound)
        near(metal[0][at : at + len(rows)], cpu[0][at : at + len(rows)], 2 * bound)
        at += len(rows)
    assert np.isnan(metal[0][0]).all()
    assert np.isnan(metal[0][-1]).all()


@pytest.fixture
def units(both):
    """mat_vec_units wherever it fits."""
    tune = (C.c_int * 4).in_dll(both.metal.lib, "fm_metal_tune")
    tune[3] = 1
    yield tune
    tune[3] = 0


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("fmt", ["affine2", "affine4", "affine8"])
def test_units_matmul(both, units, fmt, n):
    """Chosen when asked for and only where it fits: aligned codes and x, few rows, up to 4096 columns."""
    rng = np.random.default_rng(n)
    lane = {"affine2": 128}.get(fmt, 64)  # columns
    odd = 7 * lane
    cases = [(lane, 0, 0, 0), (31 * lane, 0, 4, 0), (4096, 0, 0, 0), (odd, 4, 0, 0), (odd, 0, 1, 0)]
    for n_cols, skip, pad, skip_scales in (*cases, (4096 + lane, 0, 0, 0), (2 * lane, 0, 0, 2)):
        w, x, got = Matrix(rng, 21, n_cols, fmt), rand(rng, n, n_cols + pad), []

        def setup(b, y, w=w, x=x, skips={"skip": skip, "skip_scales": skip_scales}):
            m, xb = put(b, w, **skips), b.array(x)
            b.matmul(xb.ctypes.data, x.shape[1], n, items((m, y, None, False)), 1)

        for on in (1, 0):
            units[3] = on
            got.append(both.run(setup, (n, 21))[1][0])
        x64 = x[:, :n_cols].astype(np.float64)
        near(got[0], x64 @ w.values.T, 2.0**-20 * (np.abs(x64) @ np.abs(w.values.T)))
        shared = skip_scales and fmt == "affine2"  # two scales a load
        fits = fmt != "affine8" and n <= 4 and n_cols != odd and n_cols <= 4096 and not shared
        assert np.array_equal(*got) != fits


@pytest.mark.parametrize("fmt", ["affine2", "affine4"])
def test_units_experts(both, units, fmt):
    """gate and up in one pass, ragged counts and gathered rows, then down; as the plain form has them."""
    rng, counts, got = np.random.default_rng(21), (1, 3, 2), []
    rows_of = [rng.integers(0, 40, n).astype(np.int32) for n in counts]
    ws, x = expert_case(rng, fmt, 384, 128, len(counts), rows_of)

    def setup(b, out):
        xb, gate, up = b.array(x), b.empty((6, 128)), b.empty((6, 128))
        jobs, at = (H.ExpertJob * len(counts))(), 0
        for job, e, rows in zip(jobs, ws, rows_of):
            job.gate, job.up, job.down = (put(b, w) for w in e)
            job.rows, job.n, job.out0, at = rows.ctypes.data, len(rows), at, at + len(rows)
        b.experts(C.byref(H.ExpertArgs(xb.ctypes.data, len(x), C.cast(jobs, H.P), len(jobs),
                                       gate.ctypes.data, up.ctypes.data, out.ctypes.data)))  # fmt: skip

    for on in (1, 0):
        units[3] = on
        got.append(both.run(setup, (6, 384))[1][0])
    assert np.allclose(*got, rtol=1e-4, atol=1e-4 * np.abs(got[1]).max())
    assert not np.array_equal(*got)


@pytest.mark.parametrize("n", [1, 9])
def test_expert_of_three_formats(both, n):
    """gate, up and down each in its own format: no fused pass, whatever the row count."""
    rng = np.random.default_rng(n)
    ws = [Matrix(rng, 64, 96, "affine3", 32), Matrix(rng, 64, 96, "affine6", 32),
          Matrix(rng, 96, 64, "affine5", 64)]  # fmt: skip
    x, rows = rand(rng, n, 96), np.arange(n, dtype=np.int32)

    def setup(b, out):
        job = H.ExpertJob(*[put(b, w) for w in ws], rows.ctypes.data, n, 0)
        gate, up = b.empty((n, 64)), b.empty((n, 64))
        b.experts(C.byref(H.ExpertArgs(b.array(x).ctypes.data, n, C.cast(C.pointer(job), H.P), 1,
                                       gate.ctypes.data, up.ctypes.data, out.ctypes.data)))  # fmt: skip

    cpu, metal = both.run(setup, (n, 96))
    near(metal[0], cpu[0], 1e-4 * (1 + np.abs(cpu[0])))


# ---- rows


def test_rows_in_one_command_buffer(both):
    """norm -> matmul -> swiglu -> clip -> add_gated, recorded together and run in order."""
    rng = np.random.default_rng(5)
    n, hidden, width = 3, 64, 40
    x, w_norm, gate = rand(rng, n, hidden), rand(rng, hidden), rand(rng, n)
    w1, w2 = Matrix(rng, width, hidden, "affine4", 32), Matrix(rng, width, hidden, "f16")

    def setup(b, y):
        xb, h = b.array(x), b.empty((n, hidden))
        a, c = b.empty((n, width)), b.empty((n, width))
        nw, g = b.array(w_norm), b.array(gate)
        b.rmsnorm(xb.ctypes.data, hidden, nw.ctypes.data, 1e-6, h.ctypes.data, hidden, n, hidden)
        two = items((put(b, w1), a, None, False), (put(b, w2), c, None, False))
        b.matmul(h.ctypes.data, hidden, n, two, 2)
        b.swiglu(a.ctypes.data, c.ctypes.data, a.ctypes.data, n * width)
        b.clip(a.ctypes.data, n * width, 5.0)
        b.add_gated(a.ctypes.data, g.ctypes.data, y.ctypes.data, n, width)
        b.add_gated(a.ctypes.data, None, y.ctypes.data, n, width)

    start = rand(rng, n, width)
    cpu, metal = both.run(setup, start)
    h = oracle.rmsnorm(x, w_norm, 1e-6)
    a = np.clip(oracle.silu(h @ w1.values.T) * (h @ w2.values.T), -5, 5)
    exact = start + a * (1 + oracle.sigmoid(gate.astype("f8"))[:, None])
    near(metal[0], exact, 1e-4 * (1 + np.abs(exact)))
    near(metal[0], cpu[0], 1e-4 * (1 + np.abs(exact)))


def test_rmsnorm_strides(both):
    rng = np.random.default_rng(8)
    x, w = rand(rng, 3, 40), rand(rng, 33)

    def setup(b, y):
        xb, wb = b.array(x), b.array(w)
        b.rmsnorm(xb.ctypes.data, 40, wb.ctypes.data, 1e-5, y.ctypes.data, 35, 3, 33)

    cpu, metal = both.run(setup, (3, 35))
    near(metal[0][:, :33], oracle.rmsnorm(x[:, :33], w, 1e-5), 1e-5)
    assert np.isnan(metal[0][:, 33:]).all()


@pytest.mark.parametrize("kw", [{}, {"renorm": 0}, {"sigmoid": 1, "bias": 1, "eps": 1e-20, "scale": 2.5},
                                {"sigmoid": 1, "bias": 1, "n_group": 4, "topk_group": 2}])  # fmt: skip
@pytest.mark.parametrize(("n_experts", "k"), [(8, 2), (512, 10)])
def test_route_and_combine(both, n_experts, k, kw):
    rng = np.random.default_rng(k)
    n, hidden = 4, 48
    logits, bias = rand(rng, n, n_experts) * 3, rand(rng, n_experts) * np.float32(0.1)
    logits[1, [3, 6]] = 9.0
    y0, parts = rand(rng, n, hidden), rand(rng, n * k, hidden)
    start = (np.arange(n + 1) * k).astype(np.int32)
    index = rng.permutation(n * k).astype(np.int32)
    kw = {"renorm": 1, **kw}

    def setup(b, y, weights):
        ids = b.empty((n, k), "i4")
        lb, bb = b.array(logits), b.array(bias)
        a = H.RouteArgs(n_experts, k, kw.get("sigmoid", 0), kw["renorm"], kw.get("eps", 0.0),
                        kw.get("scale", 1.0), kw.get("n_group", 1), kw.get("topk_group", 1),
                        bb.ctypes.data if kw.get("bias") else None)  # fmt: skip
        b.route(C.byref(a), lb.ctypes.data, n, ids.ctypes.data, weights.ctypes.data)
        c = H.CombineArgs(y.ctypes.data, n, hidden, b.array(parts).ctypes.data, start.ctypes.data,
                          index.ctypes.data, weights.ctypes.data, n * k)  # fmt: skip
        b.combine(C.byref(c))
        b.sync()
        b.ids = ids.copy()

    cpu, metal = both.run(setup, y0, (n, k))
    assert np.array_equal(both.cpu.ids, both.metal.ids)
    near(metal[1], cpu[1], 64 * U * np.abs(cpu[1]))
    near(metal[0], cpu[0], 1e-5 * (1 + np.abs(cpu[0])))


def test_find_nonfinite(both):
    x = np.zeros((5, 33), np.float32)
    for b in both.backends:
        for where in (None, (3, 32), (0, 0)):
            data = x.copy()
            if where:
                data[where] = np.inf
            row = C.c_int64()
            b.find_nonfinite(b.array(data).ctypes.data, 5, 33, C.byref(row))
            assert row.value == (where[0] if where else -1)


# ---- mixers


def spans(*rows):
    """fm_span array from (n, pos0); rows follow each other."""
    out, at = (H.Span * len(rows))(), 0
    for s, (n, pos) in zip(out, rows):
        s.row0, s.n, s.pos0 = at, n, pos
        at += n
    return out, at


@pytest.mark.parametrize(
    ("heads", "kv", "hd", "rot"), [(4, 2, 16, 8), (6, 1, 33, 32), (16, 2, 64, 16)]
)
@pytest.mark.parametrize("batch", [[(1, 0)], [(1, 5), (1, 0), (2, 40)], [(17, 3), (1, 2), (3, 0)]])
def test_attention_and_rope(both, heads, kv, hd, rot, batch):
    run_attention(both, heads, kv, hd, rot, batch)


@pytest.mark.parametrize("batch", [[(1, 511), (2, 255), (1, 4), (1, 512)], [(1, 8300)]])
def test_attention_in_parts(both, batch):
    """Decode over long contexts: parts of 256 positions, and longer ones where there are most."""
    run_attention(both, 2, 1, 16, 8, batch)


def run_attention(both, heads, kv, hd, rot, batch):
    rng = np.random.default_rng(hd)
    sp, n = spans(*batch)
    ld_q = heads * 2 * hd
    q, k, v = rand(rng, n, ld_q), rand(rng, n, kv * hd), rand(rng, n, kv * hd)
    inv_freq = 1e7 ** (-2.0 * np.arange(rot // 2) / rot)
    caps = [rows + pos + 3 for rows, pos in batch]
    caches = [[rand(rng, kv, c, hd), rand(rng, kv, c, hd)] for c in caps]

    def setup(b, y, *cached):
        qb, kb, vb = b.array(q), b.array(k), b.array(v)
        kvs = (H.Kv * len(batch))()
        for i, o in enumerate(kvs):
            o.k, o.v = cached[2 * i].ctypes.data, cached[2 * i + 1].ctypes.data
            o.capacity = caps[i]
        for x, ld, head, count in ((qb, ld_q, 2 * hd, heads), (kb, kv * hd, hd, kv)):
            b.rope(C.byref(H.RopeArgs(x.ctypes.data, ld, head, count, rot, inv_freq.ctypes.data,
                                      C.cast(sp, H.P), len(sp))))  # fmt: skip
        a = H.AttnArgs(heads, kv, hd, hd**-0.5, qb.ctypes.data, qb.ctypes.data + 4 * hd, ld_q,
                       2 * hd, y.ctypes.data, y.shape[1])  # fmt: skip
        b.attention(C.byref(H.AttentionArgs(a, kb.ctypes.data, vb.ctypes.data, kv * hd,
                                            C.cast(sp, H.P), C.cast(kvs, H.P), len(sp))))  # fmt: skip

    cpu, metal = both.run(setup, (n, heads * hd), *[c for pair in caches for c in pair])
    biggest = max(np.abs(c).max() for c in cpu[1:])
    near(metal[0], cpu[0], np.full(cpu[0].shape, 2.0**-17 * biggest))
    for got, want in zip(metal[1:], cpu[1:]):
        near(got, want, 8 * U * (np.abs(want) + biggest))


@pytest.mark.parametrize("batch", [[(1, 0)], [(1, 0), (1, 7)], [(2, 0), (40, 0), (1, 0)]])
@pytest.mark.parametrize(("hk", "hv", "dk", "dv"), [(1, 1, 8, 8), (2, 4, 16, 33), (1, 2, 160, 16)])
def test_conv_and_delta(both, hk, hv, dk, dv, batch):
    rng = np.random.default_rng(dk)
    sp, n = spans(*batch)
    n_ch, kern = 2 * hk * dk + hv * dv, 4
    m, w = rand(rng, n, n_ch), rand(rng, n_ch, kern)
    z, a, bb = rand(rng, n, hv * dv), rand(rng, n, hv), rand(rng, n, hv)
    a_log, dt = np.log(rng.uniform(0.01, 8, hv)).astype("f4"), rand(rng, hv)
    norm = rand(rng, dv)
    hists = [rand(rng, kern - 1, n_ch) for _ in batch]
    states = [rand(rng, hv, dk, dv) * np.float32(0.2) for _ in batch]

    def setup(b, y, *outs):
        hist_out, s_out = outs[: len(batch)], outs[len(batch) :]
        mb, wb, qkv = b.array(m), b.array(w), b.empty((n, n_ch))
        hist_in, s_in = [b.array(h) for h in hists], [b.array(s) for s in states]
        lists = [H.pointers(t) for t in (hist_in, hist_out, s_in, s_out)]
        b.conv(C.byref(H.ConvArgs(mb.ctypes.data, qkv.ctypes.data, n_ch, n_ch, n_ch, kern,
                                  wb.ctypes.data, C.cast(sp, H.P), C.cast(lists[0], H.P),
                                  C.cast(lists[1], H.P), len(sp))))  # fmt: skip
        zb, ab, bbb, lb, db, nb = (b.array(t) for t in (z, a, bb, a_log, dt, norm))
        args = H.DeltaArgs(hk, hv, dk, dv, qkv.ctypes.data, zb.ctypes.data, ab.ctypes.data,
                           bbb.ctypes.data, lb.ctypes.data, db.ctypes.data, nb.ctypes.data, 1e-6,
                           y.ctypes.data, n_ch, hv * dv, hv, hv * dv)  # fmt: skip
        b.delta(C.byref(H.DeltaBatch(args, C.cast(sp, H.P), C.cast(lists[2], H.P),
                                     C.cast(lists[3], H.P), len(sp))))  # fmt: skip

    shapes = [(kern - 1, n_ch)] * len(batch) + [(hv, dk, dv)] * len(batch)
    cpu, metal = both.run(setup, (n, hv * dv), *shapes)
    at = 0
    for i, (rows, _) in enumerate(batch):
        assert np.array_equal(metal[1 + i], cpu[1 + i])
        qkv, _ = oracle.conv(m[at : at + rows], w, hists[i])
        part = [t[at : at + rows] for t in (z, a, bb)]
        y, S, o = oracle.delta(qkv, *part, a_log, dt, norm, states[i], hk, dk, dv, 1e-6)
        got = metal[1 + len(batch) + i]
        size = np.abs(states[i]).max() + np.abs(qkv).max()
        near(got, S, np.full(S.shape, 2.0**-17 * size))
        rms = np.sqrt((o.reshape(rows, hv, dv) ** 2).mean(-1, keepdims=True) + 1e-6)
        scale = np.abs(norm).max() * np.abs(oracle.silu(z.astype("f8"))).max()
        bound = np.broadcast_to(2.0**-17 * size / rms * scale + 1e-5 * np.abs(y).max(),
                                (rows, hv, dv))  # fmt: skip
        near(metal[0][at : at + rows].reshape(rows, hv, dv), y.reshape(rows, hv, dv), bound)
        at += rows


# ---- the same under the stand-in's other modes, and under sanitizers

SUBSET = (
    "mixed or one_command or (test_experts and affine4 and not sanit) or nonfinite or route "
    "or (test_conv_and_delta and 16) or (test_attention and 33)"
)


@in_child
@pytest.mark.skipif(H.MAC, reason="modes of the stand-in")
@pytest.mark.parametrize("mode", ["FAKE_METAL_LATE", "FAKE_METAL_PROTECT"])
def test_strict_modes(mode):
    """Late: a result read before sync is wrong. Protect: an undeclared buffer is a crash."""
    status, output = run_tests("", __file__, "-k", SUBSET, env={mode: "1"})
    assert status == 0, output[-5000:]


@in_child
@pytest.mark.slow
@pytest.mark.parametrize("san", ["address", "undefined", "thread"])
def test_sanitizers(san):
    status, output = run_tests(san, __file__, "-k", SUBSET)
    assert_clean(status, output)
