"""Attention and Gated DeltaNet kernels against float64: odd sizes, grouped heads, chunks."""

import msl
import mslc
import numpy as np
import oracle_metal as oracle
import pytest
from conftest import assert_clean, in_child, run_tests
from metal_args import CONST, args, table
from test_metal_mat import ORDERS, f32, lib
from test_metal_ops import nan

U = 2.0**-24


class Attention:
    """Random rows of a batch and their caches; `spans` lists (rows, first position)."""

    def __init__(self, rng, heads, kv, hd, spans, gated=True):
        self.heads, self.kv, self.hd, self.spans = heads, kv, hd, spans
        self.n = sum(n for n, _ in spans)
        self.scale = hd**-0.5
        per_head = 2 * hd if gated else hd
        self.ld_q, self.ld_head = heads * per_head + 3, per_head
        self.gated = gated
        self.q = f32(rng, self.n, self.ld_q)
        self.k_new, self.v_new = f32(rng, self.n, kv * hd + 1), f32(rng, self.n, kv * hd + 1)
        self.caps = [n + pos + 2 for n, pos in spans]
        self.k = [f32(rng, kv, cap, hd) for cap in self.caps]
        self.v = [f32(rng, kv, cap, hd) for cap in self.caps]
        self.y = nan(self.n, heads * hd + 2)

    def gate_view(self):
        """The buffer that begins hd floats into q: gates lie right after their queries."""
        return self.q.reshape(-1)[self.hd :] if self.gated else self.q

    def store(self):
        row0 = 0
        for (n, pos), k, v, cap in zip(self.spans, self.k, self.v, self.caps):
            a = args("fm_store_args", n_kv_heads=self.kv, head_dim=self.hd, ld=self.kv * self.hd + 1,
                     capacity=cap, row0=row0, n=n, pos0=pos)  # fmt: skip
            lib("attention").run("kv_store", {0: self.k_new, 1: self.v_new, 2: k, 3: v, 4: a},
                                 threads=(self.kv * self.hd + 5, n), tg=(32, 1))  # fmt: skip
            for g in range(self.kv):
                cols = slice(g * self.hd, (g + 1) * self.hd)
                assert np.array_equal(k[g, pos : pos + n], self.k_new[row0 : row0 + n, cols])
                assert np.array_equal(v[g, pos : pos + n], self.v_new[row0 : row0 + n, cols])
            row0 += n

    def args(self, **kw):
        return args("fm_attend_args", n_heads=self.heads, n_kv_heads=self.kv, head_dim=self.hd,
                    ld_q=self.ld_q, ld_q_head=self.ld_head, ld_y=self.y.shape[1],
                    has_gate=self.gated, scale=self.scale, **kw)  # fmt: skip

    def run_rows(self, part=1 << 20):
        """Decode: rows of more than `part` positions in parts, as the host does it."""
        rows, most = [], 1
        for (n, pos), k, v, cap in zip(self.spans, self.k, self.v, self.caps):
            for t in range(n):
                rows.append(args("fm_attn_row", k=k.ctypes.data, v=v.ctypes.data, row=len(rows),
                                 n_pos=pos + t + 1, capacity=cap, part=part))  # fmt: skip
                most = max(most, -(-(pos + t + 1) // part))
        parts = nan(self.n, self.heads, most, self.hd + 2)
        buffers = {0: table(rows), 1: self.q, 2: self.gate_view(), 3: self.y,
                   4: self.args(max_parts=most), 5: parts}  # fmt: skip
        lib("attention").run("attend_rows", buffers, groups=(self.heads, self.n, most),
                             tg=32 * CONST["FM_ATTN_SIMDGROUPS"], fc={"FC_DIM": self.hd})  # fmt: skip
        if most > 1:
            lib("attention").run("attend_merge", buffers, groups=(self.heads, self.n),
                                 tg=CONST["FM_ATTN_MERGE"], fc={"FC_DIM": self.hd})  # fmt: skip

    def run_tiles(self):
        row0 = 0
        for (n, pos), k, v, cap in zip(self.spans, self.k, self.v, self.caps):
            a = self.args(row0=row0, n=n, pos0=pos, capacity=cap)
            tiles = -(-n * (self.heads // self.kv) // CONST["FM_ATTN_QUERIES"])
            lib("attention").run("attend_tiles",
                                 {0: k, 1: v, 2: self.q, 3: self.gate_view(), 4: self.y, 5: a},
                                 groups=(tiles, self.kv),
                                 tg=CONST["FM_ATTN_QUERIES"] * CONST["FM_ATTN_KEYS"],
                                 fc={"FC_DIM": self.hd})  # fmt: skip
            row0 += n

    def check(self):
        row0 = 0
        for (n, pos), k, v in zip(self.spans, self.k, self.v):
            rows = self.q[row0 : row0 + n, : self.heads * self.ld_head]
            rows = rows.reshape(n, self.heads, self.ld_head)
            q, gate = rows[..., : self.hd], rows[..., self.hd :] if self.gated else None
            exact = oracle.attention(q, k, v, gate, pos, self.scale).reshape(n, -1)
            got = self.y[row0 : row0 + n, : self.heads * self.hd]
            assert (np.abs(got - exact) <= 2.0**-18 * np.abs(v).max()).all()
            row0 += n
        assert np.isnan(self.y[:, self.heads * self.hd :]).all()


SHAPES = [(4, 2, 16), (6, 1, 7), (2, 2, 65), (16, 2, 64)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attend_rows(shape, order):
    """A decode batch: sequences of different lengths, one with several rows."""
    case = Attention(np.random.default_rng(1), *shape, spans=[(1, 0), (1, 1), (3, 6), (1, 70)])
    with msl.order(order):
        case.store()
        case.run_rows()
    case.check()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("part", [1, 7, 32, 70, 71])
def test_attend_parts(part, order):
    """Long rows in parts: a last part of one position, rows of one part among rows of many."""
    case = Attention(np.random.default_rng(6), 4, 2, 65, spans=[(2, 70), (1, 0), (1, 6), (3, 30)])
    with msl.order(order):
        case.store()
        case.run_rows(part)
    case.check()
    if part > 70:
        return
    alone = Attention(np.random.default_rng(6), 4, 2, 65, spans=[(2, 70), (1, 0), (1, 6), (3, 30)])
    alone.store()
    alone.run_rows()
    short = slice(2, 4) if part == 7 else slice(2, 3)
    assert np.array_equal(case.y[short], alone.y[short], equal_nan=True)  # rows of one part


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(2, 1, 256), (3, 3, 1)])
def test_attend_rows_dims(shape, gated):
    case = Attention(np.random.default_rng(2), *shape, spans=[(2, 40)], gated=gated)
    case.store()
    case.run_rows()
    case.check()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("n", "pos"), [(1, 0), (5, 0), (17, 0), (7, 33)])
def test_attend_tiles(shape, n, pos, order):
    case = Attention(np.random.default_rng(3), *shape, spans=[(n, pos), (2, 3)])
    with msl.order(order):
        case.store()
        case.run_tiles()
    case.check()


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("hd", [256, 129])
def test_attend_tiles_dims(hd, gated):
    case = Attention(np.random.default_rng(4), 2, 1, hd, spans=[(9, 20)], gated=gated)
    case.store()
    case.run_tiles()
    case.check()


def test_large_scores_do_not_overflow():
    for run in ("run_rows", "run_tiles"):
        case = Attention(np.random.default_rng(5), 2, 1, 8, spans=[(4, 30)])
        case.q *= 200
        case.store()
        getattr(case, run)()
        assert np.isfinite(case.y[:, :16]).all()
        case.scale_bound = 1
        exact = oracle.attention(
            case.q[:, :32].reshape(4, 2, 16)[..., :8], case.k[0], case.v[0],
            case.q[:, :32].reshape(4, 2, 16)[..., 8:], 30, case.scale)  # fmt: skip
        assert np.allclose(case.y[:, :16], exact.reshape(4, -1), atol=1e-2)


# ---- DeltaNet


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 17])
@pytest.mark.parametrize(("n_ch", "kern"), [(1, 4), (33, 4), (64, 2)])
def test_conv(n_ch, kern, n, order):
    rng = np.random.default_rng(n)
    m, w, hist = f32(rng, n, n_ch + 2), f32(rng, n_ch, kern), f32(rng, kern - 1, n_ch)
    out, y = nan(kern - 1, n_ch), nan(n, n_ch + 1)
    a = args("fm_conv_silu_args", n=n, n_ch=n_ch, kern=kern, ldm=n_ch + 2, ldy=n_ch + 1)
    with msl.order(order):
        lib("delta").run("conv_silu", {0: m, 1: w, 2: hist, 3: out, 4: y, 5: a},
                         groups=n_ch // 32 + 1, tg=32)  # fmt: skip
    exact, hist_exact = oracle.conv(m[:, :n_ch], w, hist)
    full = np.concatenate([np.abs(hist), np.abs(m[:, :n_ch])])
    size = sum(full[j : j + n] * np.abs(w[:, j]) for j in range(kern))
    assert (np.abs(y[:, :n_ch] - exact) <= 16 * U * (size + np.abs(exact))).all()
    assert np.array_equal(out, hist_exact.astype(np.float32))
    assert np.isnan(y[:, n_ch:]).all()


class Delta:
    """One sequence's rows through the op, as the host dispatches it."""

    def __init__(self, rng, n, hk, hv, dk, dv):
        self.n, self.hk, self.hv, self.dk, self.dv, self.eps = n, hk, hv, dk, dv, 1e-6
        self.qkv = f32(rng, n, 2 * hk * dk + hv * dv + 1)
        self.z, self.y = f32(rng, n, hv * dv + 2), nan(n, hv * dv + 3)
        self.a, self.b = f32(rng, n, hv + 1), f32(rng, n, hv + 1)
        rates = rng.uniform(0.1, 16, hv)
        rates[1::2] *= 1e-3  # heads that remember over many chunks
        self.a_log = np.log(rates).astype(np.float32)
        self.dt_bias, self.norm = f32(rng, hv), f32(rng, dv)
        self.s_in, self.s_out = f32(rng, hv, dk, dv) * np.float32(0.3), nan(hv, dk, dv)
        self.shape = args("fm_delta_shape", n=n, n_k_heads=hk, n_v_heads=hv, dk=dk, dv=dv,
                          ld_qkv=self.qkv.shape[1], ld_z=self.z.shape[1], ld_ab=hv + 1,
                          ld_y=self.y.shape[1], eps=self.eps)  # fmt: skip

    def run(self, kernel):
        qk, gates = nan(self.n, 2, self.hk, self.dk), nan(self.n, 2, self.hv)
        d = lib("delta")
        d.run("delta_prepare", {0: self.qkv, 1: self.a, 2: self.b, 3: self.a_log, 4: self.dt_bias,
                                5: qk, 6: gates, 7: self.shape},
              groups=(max(self.hk, self.hv), self.n), tg=32)  # fmt: skip
        d.run(kernel, {0: qk, 1: gates, 2: self.qkv, 3: self.s_in, 4: self.s_out, 5: self.y,
                       6: self.shape}, groups=(-(-self.dv // 32), self.hv),
              tg=32 * CONST["FM_DELTA_SIMDGROUPS"], fc={"FC_DIM": self.dk})  # fmt: skip
        core = self.y[:, : self.hv * self.dv].copy()
        d.run("delta_output", {0: self.y, 1: self.z, 2: self.norm, 3: self.shape},
              groups=(self.hv, self.n), tg=32)  # fmt: skip
        return core

    def check(self, kernel):
        core = self.run(kernel)
        y, S, o = oracle.delta(
            self.qkv[:, : 2 * self.hk * self.dk + self.hv * self.dv],
            self.z[:, : self.hv * self.dv], self.a[:, : self.hv], self.b[:, : self.hv],
            self.a_log, self.dt_bias, self.norm, self.s_in, self.hk, self.dk, self.dv,
            self.eps)  # fmt: skip
        size = np.abs(self.s_in).max() + np.abs(self.qkv).max()
        assert np.abs(self.s_out - S).max() <= 2.0**-18 * size
        assert np.abs(core - o).max() <= 2.0**-18 * size
        # the norm divides by the head's rms: errors of o are seen relative to it
        got = self.y[:, : self.hv * self.dv]
        rms = np.sqrt((o.reshape(self.n, self.hv, -1) ** 2).mean(-1) + self.eps)
        scale = np.abs(self.norm).max() * np.abs(oracle.silu(self.z.astype(np.float64))).max()
        bound = 2.0**-18 * size / rms * scale + 1e-6 * np.abs(y.reshape(self.n, self.hv, -1)).max()
        assert (np.abs(got - y).reshape(self.n, self.hv, -1) <= bound[..., None]).all()
        assert np.isnan(self.y[:, self.hv * self.dv :]).all()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", ["delta_step", "delta_chunk"])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize(("hk", "hv", "dk", "dv"), [(1, 1, 1, 1), (2, 4, 9, 33), (2, 2, 32, 16)])
def test_delta(hk, hv, dk, dv, n, kernel, order):
    with msl.order(order):
        Delta(np.random.default_rng(n), n, hk, hv, dk, dv).check(kernel)


@pytest.mark.parametrize("n", [31, 32, 33, 70])
@pytest.mark.parametrize("kernel", ["delta_step", "delta_chunk"])
def test_delta_long(n, kernel):
    Delta(np.random.default_rng(n), n, 1, 2, 16, 17).check(kernel)


@pytest.mark.parametrize(("kernel", "dk"), [("delta_step", 256), ("delta_step", 128),
                                        ("delta_chunk", 128)])  # fmt: skip
def test_delta_real_dims(kernel, dk):
    Delta(np.random.default_rng(6), 3, 1, 2, dk, 128).check(kernel)


def test_delta_strong_decay_is_finite():
    """exp of long sums of g underflows to 0, which is right; inf - inf would not be."""
    for kernel in ("delta_step", "delta_chunk"):
        case = Delta(np.random.default_rng(7), 40, 1, 1, 8, 8)
        case.a += 40
        case.check(kernel)


SUBSET = (
    "(test_attend_rows and 6-1-7) or (test_attend_tiles and shape1 and 17) or shape1 and rand7 "
    "or (test_conv and 33-4) or test_delta and 33 and not rev"
)


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
