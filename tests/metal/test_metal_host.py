"""The Metal host's own duties: failures, limits, lifetimes, recording. Kernels are tested elsewhere."""

import ctypes as C
import json
import os
import time

import hostlib as H
import mslc
import numpy as np
import pytest
from conftest import HERE, in_child, run_child

NOMEM, BACKEND, UNSUPPORTED, STATE, ARG = -20, -60, -50, -70, -10


@pytest.fixture
def metal():
    with H.Backend("metal") as b:
        yield b


def counters(b):
    b.lib.fm_metal_counters_get.restype = C.POINTER(H.Counters)
    got = b.lib.fm_metal_counters_get(C.cast(b._handle, H.P)).contents
    return {n: getattr(got, n) for n, _ in H.Counters._fields_}


def norm(b, x, w, y):
    b.rmsnorm(x.ctypes.data, 64, w.ctypes.data, 1e-6, y.ctypes.data, 64, len(x), 64)


def arrays(b, n=3):
    rng = np.random.default_rng(0)
    x = b.array(rng.standard_normal((n, 64)).astype("f4"))
    return x, b.array(np.ones(64, "f4")), b.empty((n, 64))


def expected(x):
    return x / np.sqrt((x.astype("f8") ** 2).mean(1, keepdims=True) + 1e-6)


def test_struct_sizes():
    """ctypes mirrors agree with the compiler."""
    names = ["Mat", "MatmulItem", "Span", "RopeArgs", "Kv", "AttnArgs", "AttentionArgs", "ConvArgs",
             "DeltaArgs", "DeltaBatch", "RouteArgs", "ExpertJob", "ExpertArgs", "CombineArgs",
             "ExpertLater", "Caps", "Opts", "Vtable"]  # fmt: skip
    want = {"Mat": "fm_mat", "MatmulItem": "fm_matmul_item", "Span": "fm_span", "Kv": "fm_kv",
            "RopeArgs": "fm_rope_args", "AttnArgs": "fm_attn_args", "ConvArgs": "fm_conv_args",
            "AttentionArgs": "fm_attention_args", "DeltaArgs": "fm_delta_args",
            "DeltaBatch": "fm_delta_batch", "RouteArgs": "fm_route_args",
            "ExpertJob": "fm_expert_job", "ExpertArgs": "fm_expert_args", "Caps": "fm_caps",
            "ExpertLater": "fm_expert_later",
            "CombineArgs": "fm_combine_args", "Opts": "fm_backend_opts",
            "Vtable": "fm_backend_vtable"}  # fmt: skip
    checks = "".join(
        f'_Static_assert(sizeof({want[n]}) == {C.sizeof(getattr(H, n))}, "{n}");\n' for n in names
    )
    path = mslc.CACHE / "sizes.c"
    mslc.CACHE.mkdir(parents=True, exist_ok=True)
    path.write_text('#include "backend/backend.h"\n' + checks)
    mslc.run_tool([mslc.CC, "-I", mslc.REPO / "csrc", "-fsyntax-only", path], "struct sizes")


def test_ops_share_a_command_buffer(metal):
    """Recording costs one command buffer per sync, whatever the number of ops."""
    x, w, y = arrays(metal)
    metal.begin()
    for _ in range(50):
        norm(metal, x, w, y)
    assert counters(metal)["command_buffers"] == 0
    metal.sync()
    got = counters(metal)
    assert (got["command_buffers"], got["encoders"], got["dispatches"]) == (1, 1, 50)
    metal.flush()
    metal.sync()
    assert counters(metal)["command_buffers"] == 1, "nothing recorded: nothing committed"


def test_flush_starts_work_and_keeps_order(metal):
    x, w, y = arrays(metal)
    z = metal.empty(y.shape)
    metal.begin()
    norm(metal, x, w, y)
    metal.flush()
    norm(metal, y, w, z)
    metal.flush()
    metal.sync()
    assert np.allclose(z, expected(expected(x)), rtol=1e-5)
    assert counters(metal)["command_buffers"] == 2


def test_foreign_memory_is_refused(metal):
    x, w, _ = arrays(metal)
    with pytest.raises(H.BackendError, match="rmsnorm y .768 bytes. is not in memory") as e:
        norm(metal, x, w, np.zeros((3, 64), "f4"))
    assert e.value.status == ARG
    small = metal.empty((1, 64))
    last_page = small.ctypes.data + 16384 - 256
    with pytest.raises(H.BackendError, match="not in memory"):  # one row fits, three do not
        metal.rmsnorm(x.ctypes.data, 64, w.ctypes.data, 1e-6, last_page, 64, 3, 64)
    y = metal.empty(x.shape)
    norm(metal, x, w, y)  # and the backend still works
    metal.sync()
    assert np.allclose(y, expected(x), rtol=1e-5)


def test_shapes_the_kernels_lack(metal):
    x = metal.empty((4, 64))
    mat = H.Mat(5, 2, 16, 4, 48, *[x.ctypes.data] * 3, 24, 6)
    item = (H.MatmulItem * 1)(H.MatmulItem(C.pointer(mat), None, x.ctypes.data, 4, False))
    with pytest.raises(H.BackendError, match="48 columns of affine4: must be a multiple of 32"):
        metal.matmul(x.ctypes.data, 64, 1, item, 1)
    attn = H.AttnArgs(1, 1, 512, 1.0, x.ctypes.data, None, 512, 512, x.ctypes.data, 512)
    with pytest.raises(H.BackendError, match="head_dim 512, at most 256") as e:
        metal.attention(C.byref(H.AttentionArgs(attn, None, None, 512, None, None, 0)))
    assert e.value.status == UNSUPPORTED


def test_memory_limits(metal, monkeypatch):
    monkeypatch.setenv("FAKE_METAL_WORKING_SET", str(1 << 20))
    with H.Backend("metal") as b:
        assert b.caps().max_bytes == 1 << 20
        b.empty((1 << 18,), "u1")
        with pytest.raises(H.BackendError, match="recommended working set") as e:
            b.empty((1 << 20,), "u1")
        assert e.value.status == NOMEM
        freed, n, usage = b._arrays.pop()
        b.free(freed, n, usage)
        b.empty((1 << 20,), "u1")  # exactly what is left after the free
    monkeypatch.delenv("FAKE_METAL_WORKING_SET")
    monkeypatch.setenv("FAKE_METAL_MAX_BUFFER", str(4 << 20))
    with H.Backend("metal") as b, pytest.raises(H.BackendError, match="the device allows 4194304"):
        b.empty((5 << 20,), "u1")


def test_no_device(monkeypatch):
    monkeypatch.setenv("FAKE_METAL_NO_DEVICE", "1")
    with pytest.raises(H.BackendError, match="no Metal device") as e:
        H.Backend("metal")
    assert e.value.status == UNSUPPORTED


def test_failed_command_buffer(metal, monkeypatch):
    """The error text reaches the caller; afterwards the backend refuses work, and closes."""
    monkeypatch.setenv("FAKE_METAL_FAIL", "2")
    x, w, y = arrays(metal)
    norm(metal, x, w, y)
    metal.sync()
    norm(metal, x, w, y)
    with pytest.raises(H.BackendError, match="a command buffer failed: planted failure") as e:
        metal.sync()
    assert e.value.status == BACKEND
    with pytest.raises(H.BackendError, match="failed before") as e:
        norm(metal, x, w, y)
    assert e.value.status == STATE


def test_kernel_fault_is_an_error(metal):
    """What the device reports (here: the runner's fault) becomes the message."""
    metal.begin()
    logits, ids, w = metal.empty((1, 64)), metal.empty((1, 65), "i4"), metal.empty((1, 65))
    logits[:] = 0
    a = H.RouteArgs(64, 65, 0, 1, 0.0, 1.0, 1, 1, None)  # k > n_experts: ids run out
    metal.route(C.byref(a), logits.ctypes.data, 1, ids.ctypes.data, w.ctypes.data)
    metal.sync()  # stays in bounds; every id is legal
    assert ((ids >= 0) & (ids < 64)).all()


def test_free_waits_for_the_device(metal):
    x, w, y = arrays(metal)
    norm(metal, x, w, y)
    p, n, usage = metal._arrays.pop()
    metal.free(p, n, usage)  # y: work on it is pending; the stand-in asserts that none is
    assert counters(metal)["waits"] == 1


def settled(b):
    """Live objects of the stand-in once its worker has let go of the last command buffer."""
    for _ in range(200):
        n = b.lib.fake_metal_live()
        time.sleep(0.005)
        if b.lib.fake_metal_live() == n:
            return n
    raise AssertionError("the number of live objects keeps changing")


def test_no_object_leaks(metal):
    """10,000 tokens' worth of command buffers leave nothing behind in the stand-in."""
    x, w, y = arrays(metal, 1)
    live = []
    for i in range(10_001):
        norm(metal, x, w, y)
        metal.find_nonfinite(y.ctypes.data, 1, 64, C.byref(C.c_int64()))
        if i in (100, 10_000):
            live.append(settled(metal))
    assert live[0] == live[1]


def test_pipelines_are_cached(metal):
    x, w, y = arrays(metal)
    norm(metal, x, w, y)
    metal.sync()
    before = settled(metal)
    for _ in range(5):
        norm(metal, x, w, y)
        metal.sync()
    assert settled(metal) == before


def test_encode_cost(metal):
    """Encoding must stay far below a token's time; the number is reported, not judged finely."""
    x, w, y = arrays(metal, 1)
    norm(metal, x, w, y)
    metal.sync()
    start = counters(metal)
    for _ in range(500):
        norm(metal, x, w, y)
    metal.sync()
    got = counters(metal)
    per_op = (got["encode_ns"] - start["encode_ns"]) / 500
    print(f"{per_op:.0f} ns of encoding per op")
    assert per_op < 200_000


def test_upload_ring_grows_and_is_reused(metal):
    """More than one chunk of arguments before a sync; none allocated after the first round."""
    x = metal.empty((600, 64))
    x[:] = 0
    inv = np.ones(32)
    span = (H.Span * 1)(H.Span(0, 600, 0))
    live = []
    for _ in range(4):
        for _ in range(12):
            a = H.RopeArgs(x.ctypes.data, 64, 64, 1, 64, inv.ctypes.data, C.cast(span, H.P), 1)
            metal.rope(C.byref(a))
        metal.sync()
        live.append(settled(metal))
    assert len(set(live)) == 1


def test_embedded_source_is_complete():
    """Every kernel of metal/kernels is in the embedded text, once, without quoted includes."""
    text = H.embed.source()
    for path in sorted(mslc.KERNELS.glob("*.metal")):
        for line in path.read_text().splitlines():
            if line.startswith("kernel void"):
                assert text.count(line) == 1
    assert '#include "' not in text
    assert text.count("#pragma once") == 0
    assert json.dumps(text)  # no control characters that a C string would need escaped


HANG = """
import os, sys
os.environ["FAKE_METAL_HANG"] = "1"
sys.path.insert(0, {here!r})
import hostlib as H, numpy as np
from test_metal_host import arrays, norm
b = H.Backend("metal")
b.lib.fm_metal_timeout_set(1)
x, w, y = arrays(b)
norm(b, x, w, y)
try:
    b.sync()
except H.BackendError as e:
    print(e, flush=True)
os._exit(0)
"""


@in_child
def test_hung_command_buffer():
    status, output = run_child(["-c", HANG.format(here=str(HERE))], None, timeout=60)
    assert status == 0, output
    assert "did not finish within 1 s" in output


MISUSE = """
import sys
sys.path.insert(0, {here!r})
import hostlib as H, numpy as np, ctypes as C
from test_metal_host import arrays, norm
b = H.Backend("metal")
x, w, y = arrays(b)
a = H.RouteArgs(8, 2, 0, 1, 0.0, 1.0, 1, 1, None)
b.route(C.byref(a), x.ctypes.data + 2, 1, y.ctypes.data, y.ctypes.data + 64)
b.sync()
"""


@in_child
def test_stand_in_stops_misuse():
    """A misaligned offset, which Metal's validation would refuse, ends the program here too."""
    status, output = run_child(["-c", MISUSE.format(here=str(HERE))], None)
    assert status != 0, output
    assert "offset is not aligned to 4 bytes" in output


@in_child
@pytest.mark.skipif(H.MAC, reason="how the stand-in compiles")
def test_temporary_files_go_where_they_should(tmp_path):
    """A folder that is not there stops the stand-in and is named: nothing is written elsewhere."""
    code = "import hostlib; hostlib.Backend('metal')"
    status, output = run_child(["-c", code], {**os.environ, "TMPDIR": str(tmp_path / "gone")})
    assert status != 0
    assert f"no file in {tmp_path}/gone/fake-metal-" in output
