"""The packed form: the same numbers, the layout promised in docs/format.md, and honest failures."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import checkpoint_files as files
import numpy as np
import pytest
import test_checkpoint as reading
from oracle import quant

from flashmoe.checkpoint import open_checkpoint
from flashmoe.checkpoint.formats import bits_of, role_bytes
from flashmoe.errors import (
    ArgumentError,
    ModelFileError,
    StateError,
    StorageError,
    UnsupportedError,
)
from flashmoe.pack import pack, verify
from flashmoe.pack.quantise import dequantise, pack_codes, quantise, to_float32, unpack_codes


def bf16(rng, *shape, scale=1.0):
    x = (rng.standard_normal(shape) * scale).astype(np.float32)
    return to_float32(quant.f64_to_bf16(x).view(np.uint8).reshape(-1), "bf16").reshape(shape)


# ------------------------------------------------------------------ quantisation


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_quantise_is_the_oracles(bits, group):
    rng = np.random.default_rng(bits * group)
    x = bf16(rng, 6, 256)
    x[1] = 0
    x[2, :group] = 3.25  # one value
    x[3] = np.abs(x[3])
    x[4] = -np.abs(x[4])
    x[5] *= 1e-6
    codes, scales, biases = quantise(x, bits, group)
    q = unpack_codes(codes, bits)
    assert (q == quant.unpack(codes, bits)).all()
    s, b = quant.bf16_to_f64(scales), quant.bf16_to_f64(biases)
    for r in range(6):
        for g in range(256 // group):
            part = slice(g * group, (g + 1) * group)
            want, scale, bias = quant.quantise_group(x[r, part], bits)
            assert (scale, bias) == (s[r, g], b[r, g])
            assert (want == q[r, part]).all()
    w = quant.dequantise(codes, s, b, bits)
    assert (w[1] == 0).all()
    assert (w[2, :group] == 3.25).all()
    as32 = dequantise(codes, s.astype(np.float32), b.astype(np.float32), bits)
    assert np.abs(as32 - w).max() <= 2**-22 * np.abs(w).max()
    # Half a step; at the far edge one more, because moving the near edge onto a code changes the
    # scale by at most 1 / (2 * code), code >= (2^bits - 1) / 2; and rounding the scale to bf16.
    for r in (0, 3, 4):
        step = np.abs(s[r]).repeat(group)
        assert (np.abs(w[r] - x[r]) <= step * (1.5 + (2**bits - 1) * 2**-8)).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_round_trip(bits):
    rng = np.random.default_rng(bits)
    q = rng.integers(0, 1 << bits, (5, 48)).astype(np.uint8)
    assert (unpack_codes(pack_codes(q, bits), bits) == q).all()
    assert (quant.unpack(pack_codes(q, bits), bits) == q).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_quantise_refuses_what_is_not_finite(bad):
    x = np.zeros((3, 64), np.float32)
    x[2, 5] = bad
    with pytest.raises(ModelFileError, match="w: a weight is NaN or infinite"):
        quantise(x, 4, 64, "w")


def test_plain_formats():
    x = np.array([1.5, -2, 65504], np.float32)
    assert (to_float32(x.view(np.uint8), "f32") == x).all()
    assert (to_float32(x.astype(np.float16).view(np.uint8), "f16") == x).all()


@pytest.mark.parametrize(
    ("twin", "overrides"),
    [("mlx4", {}), ("mlx4all", {"mlp.gate": 4, "mlp.shared_expert_gate": 4}),
     ("mlx2exp", {"experts": 2})],
)  # fmt: skip
def test_packing_agrees_with_mlx(tmp_path, twin, overrides):
    """Scales and biases are MLX's; few codes differ, by one step."""
    pack(files.GOLDEN / "q35moe_base", tmp_path / "p", overrides=overrides)
    a = open_checkpoint(tmp_path / "p")
    b = open_checkpoint(files.GOLDEN / "q35moe_base" / twin)
    n = differ = 0

    def compare(x_areas, y_areas, bits, rows):
        nonlocal n, differ
        assert (x_areas[1] == y_areas[1]).all()
        assert (x_areas[2] == y_areas[2]).all()
        x, y = (unpack_codes(c.reshape(rows, -1), bits).astype(int) for c in
                (x_areas[0], y_areas[0]))  # fmt: skip
        assert np.abs(x - y).max() <= 1
        n, differ = n + x.size, differ + int((x != y).sum())

    other = {(t.name, t.layer): t for t in b.tensors}
    for t in a.tensors:
        u = other[t.name, t.layer]
        assert bits_of(t.format) == bits_of(u.format)
        if t.group:
            areas = [[files.gather(d.files, p) for p in (v.codes, v.scales, v.biases)]
                     for d, v in ((a, t), (b, u))]  # fmt: skip
            compare(*areas, bits_of(t.format), t.shape[0])
    for e, f in zip(a.experts, b.experts, strict=True):
        at = 0
        for r in (e.gate, e.up, e.down):
            for i in range(len(e.file)):
                areas = [
                    [files.gather(d.files, [reading.Piece(
                        int(v.file[i, at + k]), int(v.offset[i, at + k]), size)])
                     for k, size in enumerate(role_bytes(r))]
                    for d, v in ((a, e), (b, f))
                ]  # fmt: skip
                compare(*areas, bits_of(r.format), r.n_rows)
            at += 3
    assert differ < 0.02 * n


# ------------------------------------------------------------------ what is written


def equal_numbers(a, b):
    """Compare two descriptions by decoded numbers, format and flags."""
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert (x.name, x.layer, x.shape, x.add_one, x.format, x.group) == (
            y.name, y.layer, y.shape, y.add_one, y.format, y.group
        )  # fmt: skip
        for p, q in ((x.codes, y.codes), (x.scales, y.scales), (x.biases, y.biases)):
            assert bool(p) == bool(q)
            if p:
                assert (files.gather(a.files, p) == files.gather(b.files, q)).all()
    for e, f in zip(a.experts, b.experts, strict=True):
        assert (e.gate, e.up, e.down) == (f.gate, f.up, f.down)
        for x, y in zip(reading.decode_experts(a, e), reading.decode_experts(b, f), strict=True):
            assert (x == y).all()
    for x, y in zip(a.extra, sorted(b.extra, key=lambda t: t.name), strict=True):
        assert (x.name, x.dtype, x.shape) == (y.name, y.dtype, y.shape)
        assert (files.gather(a.files, [x.piece]) == files.gather(b.files, [y.piece])).all()
    assert (a.config, a.eos_token_ids, a.arch) == (b.config, b.eos_token_ids, b.arch)


@pytest.mark.parametrize("name", [*files.MODELS, *files.TWINS])
def test_packed_as_stored_keeps_every_number(tmp_path, name):
    report = pack(files.GOLDEN / name, tmp_path / "p", bits=None)
    equal_numbers(open_checkpoint(files.GOLDEN / name), open_checkpoint(tmp_path / "p"))
    assert verify(tmp_path / "p").n_bytes > 0
    assert not report.kept
    assert not (tmp_path / "p.partial").exists()
    assert str(tmp_path / "p") in str(report)


@pytest.mark.parametrize("name", ["q35moe_base", "q3next", "q3moe_nonorm", "glm4moe"])
def test_packing_a_packed_one(tmp_path, name):
    pack(files.GOLDEN / name, tmp_path / "a")
    pack(tmp_path / "a", tmp_path / "b")
    a, b = open_checkpoint(tmp_path / "a"), open_checkpoint(tmp_path / "b")
    equal_numbers(a, b)
    for f in sorted((tmp_path / "a").glob("*.safetensors")):
        assert f.read_bytes() == (tmp_path / "b" / f.name).read_bytes()


def test_default_recipe(tmp_path):
    report = pack(files.GOLDEN / "q35moe_base", tmp_path / "p")
    d = open_checkpoint(tmp_path / "p")
    gates = {"mlp.gate", "mlp.shared_expert_gate"}
    for t in d.tensors:
        if len(t.shape) == 1 or t.name == "linear_attn.conv1d":
            assert bits_of(t.format) == 0
        else:
            assert bits_of(t.format) == (8 if t.name in gates else 4), t.name
    assert {r.format for e in d.experts for r in (e.gate, e.up, e.down)} == {"affine4"}
    assert report.recipe["bits"] == 4
    assert d.recipe["bits"] == 4
    assert d.recipe["origin"]["kind"] == "hf"
    assert pack(files.GOLDEN / "q35moe_base/mlx4", tmp_path / "m").recipe["bits"] is None


def test_odd_columns_are_kept_as_stored(tmp_path):
    report = pack(files.GOLDEN / "q35moe_odd", tmp_path / "p")
    d = open_checkpoint(tmp_path / "p")
    assert all(not bits_of(t.format) for t in d.tensors if t.shape[-1] % 64)
    assert "layers.0.experts.gate" in report.kept
    assert json.loads((tmp_path / "p/flashmoe.json").read_text())["recipe"]["kept"] == list(
        report.kept
    )


def test_overrides_and_mixed_roles(tmp_path):
    pack(files.GOLDEN / "q35moe_base", tmp_path / "p", bits=4, group=32,
         overrides={"experts.down": 6, "experts.up": None, "lm_head": 8, "embed_tokens": None})
    d = open_checkpoint(tmp_path / "p")
    assert (d.experts[0].gate.format, d.experts[0].up.format, d.experts[0].down.format) == (
        "affine4", "bf16", "affine6"
    )  # fmt: skip
    by_name = {t.name: t for t in d.tensors}
    assert by_name["lm_head"].format == "affine8"
    assert by_name["lm_head"].group == 32
    assert by_name["embed_tokens"].format == "bf16"
    verify(tmp_path / "p")


def test_layout_on_disk(tmp_path):
    pack(files.GOLDEN / "q35moe_base", tmp_path / "p")
    d = open_checkpoint(tmp_path / "p")
    for e in d.experts:
        path = tmp_path / f"p/experts-{e.layer:05d}.safetensors"
        raw = path.read_bytes()
        assert d.files[e.file[0, 0]] == (str(path), len(raw))
        assert set(e.file.reshape(-1).tolist()) == {int(e.file[0, 0])}
        sizes = [n for r in (e.gate, e.up, e.down) for n in role_bytes(r)]
        assert (np.diff(e.offset, axis=1) == sizes[:-1]).all()  # no gaps, codes scales biases
        assert (e.offset[:, 0] % 4096 == 0).all()
        stride = int(e.offset[1, 0] - e.offset[0, 0])
        assert stride == -(-sum(sizes) // 4096) * 4096
        for i in range(2):
            start = int(e.offset[i, 0])
            record = raw[start : start + sum(sizes)]
            assert quant.crc32c(record) == e.crc32c[i]
            assert not any(raw[start + sum(sizes) : start + stride])
        assert raw[8] == ord("{")
    assert (tmp_path / "p/config.json").read_bytes() == (
        files.GOLDEN / "q35moe_base/config.json"
    ).read_bytes()


def test_any_safetensors_tool_opens_it(tmp_path):
    numpy_safetensors = pytest.importorskip("safetensors.numpy")
    pack(files.GOLDEN / "q3moe/mlx4", tmp_path / "p")
    experts = numpy_safetensors.load_file(tmp_path / "p/experts-00000.safetensors")["experts"]
    assert experts.dtype == np.uint8
    assert experts.shape[0] == 8
    from safetensors import safe_open

    with safe_open(tmp_path / "p/trunk.safetensors", "numpy") as f:
        assert f.get_slice("embed_tokens.weight").get_shape() == [256, 8]


def test_small_files_come_along(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    for name in ("tokenizer.json", "tokenizer_config.json", "LICENSE", "README.md",
                 "chat_template.jinja", "generation_config.json"):  # fmt: skip
        (d / name).write_text("{}")
    (d / "training_args.bin").write_text("no")
    (d / "figures").mkdir()
    pack(d, tmp_path / "p")
    got = {p.name for p in (tmp_path / "p").iterdir()}
    assert {"tokenizer.json", "LICENSE", "README.md", "chat_template.jinja"} <= got
    assert not {"training_args.bin", "figures", "journal.json"} & got


def test_progress(tmp_path):
    calls = []
    report = pack(files.GOLDEN / "q3moe", tmp_path / "p", progress=lambda *a: calls.append(a))
    assert calls[0] == (0, report.source_bytes)
    assert calls[-1] == (report.source_bytes, report.source_bytes)
    assert calls == sorted(calls)
    pack(files.GOLDEN / "q3moe", tmp_path / "q", progress=True)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"bits": 7}, "bits: 7"),
        ({"bits": "4"}, "bits"),
        ({"bits": True}, "bits"),
        ({"group": 48}, "group 48"),
        ({"overrides": {"lm_haed": 4}}, "'lm_head'"),
        ({"overrides": {"lm_head": 9}}, "lm_head: 9"),
    ],
)
def test_bad_arguments(tmp_path, kwargs, words):
    with pytest.raises(ArgumentError, match=words):
        pack(files.GOLDEN / "q3moe", tmp_path / "p", **kwargs)
    assert not list(tmp_path.iterdir())


def test_never_overwrites(tmp_path):
    for make in (lambda p: p.mkdir(), lambda p: p.write_text(""), lambda p: p.symlink_to("x")):
        dst = tmp_path / "p"
        make(dst)
        with pytest.raises(StorageError, match="never overwrites") as e:
            pack(files.GOLDEN / "q3moe", dst)
        assert e.value.errno == errno.EEXIST
        assert [f.name for f in tmp_path.iterdir()] == ["p"]
        dst.rmdir() if dst.is_dir() else dst.unlink()


def test_requantising_is_refused(tmp_path):
    with pytest.raises(UnsupportedError, match="again"):
        pack(files.GOLDEN / "q3moe/mlx4", tmp_path / "p", bits=8)
    with pytest.raises(UnsupportedError, match=r"lm_head is affine4"):
        pack(files.GOLDEN / "q3moe/mlx4", tmp_path / "p", overrides={"lm_head": 2})


def test_disk_is_checked_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1234, 1234))
    with pytest.raises(StorageError, match=r"\d{6,} bytes are still to be written, 1234 are free"):
        pack(files.GOLDEN / "q3moe", tmp_path / "p")
    assert not list(tmp_path.glob("*/*.safetensors"))


def test_nan_in_the_source(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    name = "model.layers.2.mlp.experts.5.up_proj.weight"

    def poison(tensors):
        t = tensors[name]
        t.data = t.data[:100] + b"\xc0\x7f" + t.data[102:]

    files.change_tensors(d, poison)
    with pytest.raises(ModelFileError, match=r"experts\.5\.up_proj.*NaN"):
        pack(d, tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_full_disk_keeps_the_partial(tmp_path, monkeypatch):
    real, left = os.pwrite, [40]

    def pwrite(fd, data, offset):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(StorageError) as e:
        pack(files.GOLDEN / "q3moe", tmp_path / "p")
    assert e.value.errno == errno.ENOSPC
    assert "p.partial" in e.value.filename
    monkeypatch.undo()
    report = pack(files.GOLDEN / "q3moe", tmp_path / "p")
    assert report.resumed
    verify(tmp_path / "p")


def test_source_that_shrinks_while_packing(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")

    def shrink(done, total):
        if done:
            os.truncate(d / "model.safetensors", 30_000)

    with pytest.raises(ModelFileError, match="ends at"):
        pack(d, tmp_path / "p", progress=shrink)


# ------------------------------------------------------------------ resuming

KILLED = """
import os, signal, sys
from flashmoe.pack import pack
calls = 0
def tick(done, total):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
pack(sys.argv[1], sys.argv[2], progress=tick)
"""


@pytest.mark.parametrize("calls", [1, 20, 60])
def test_killed_runs_go_on(tmp_path, root, calls):
    src = files.GOLDEN / "q35moe_base"
    env = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, src, tmp_path / "p", str(calls)], env=env, check=False
    )
    assert done.returncode == -9
    assert not (tmp_path / "p").exists()
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "p.partial").glob("experts-*")}
    report = pack(src, tmp_path / "p")
    assert len(report.resumed) == (calls - 1) // 8  # 8 experts, one call each
    for name in report.resumed:
        assert (tmp_path / "p" / name).stat().st_mtime_ns == finished[name]
    pack(src, tmp_path / "q")
    for f in sorted((tmp_path / "q").iterdir()):
        assert f.read_bytes() == (tmp_path / "p" / f.name).read_bytes()


def broken_off(src, dst, after=20):
    """Leave a partial run behind."""
    calls = [0]

    def stop(done, total):
        calls[0] += 1
        if calls[0] == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(src, dst, progress=stop)


def test_damaged_finished_file_is_written_again(tmp_path):
    broken_off(files.GOLDEN / "q3moe", tmp_path / "p")
    path = tmp_path / "p.partial/experts-00000.safetensors"
    raw = bytearray(path.read_bytes())
    raw[5000] ^= 1
    path.write_bytes(raw)
    report = pack(files.GOLDEN / "q3moe", tmp_path / "p")
    assert report.resumed == ("experts-00001.safetensors",)
    verify(tmp_path / "p")


def test_resume_refuses_other_inputs(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    broken_off(d, tmp_path / "p")
    with pytest.raises(StateError, match="another recipe"):
        pack(d, tmp_path / "p", bits=8)
    time.sleep(0.01)
    os.utime(d / "model.safetensors")
    with pytest.raises(StateError, match=r"another source files .*model\.safetensors"):
        pack(d, tmp_path / "p")
    report = pack(d, tmp_path / "p", resume=False)
    assert not report.resumed
    verify(tmp_path / "p")


def test_resume_false_deletes_only_its_own(tmp_path):
    (tmp_path / "p.partial").mkdir()
    (tmp_path / "p.partial/thesis.tex").write_text("mine")
    with pytest.raises(StateError, match=r"thesis\.tex"):
        pack(files.GOLDEN / "q3moe", tmp_path / "p", resume=False)
    assert (tmp_path / "p.partial/thesis.tex").exists()


def test_two_runs_at_once(tmp_path):
    def second(done, total):
        with pytest.raises(StateError, match="another pack run"):
            pack(files.GOLDEN / "q3moe", tmp_path / "p")

    pack(files.GOLDEN / "q3moe", tmp_path / "p", progress=second)


@pytest.mark.parametrize("text", ["", "{", '{"key": 1, "done": {}}', '{"done": {}}'])
def test_damaged_journal(tmp_path, text):
    broken_off(files.GOLDEN / "q3moe", tmp_path / "p")
    (tmp_path / "p.partial/journal.json").write_text(text)
    with pytest.raises(StateError, match="damaged"):
        pack(files.GOLDEN / "q3moe", tmp_path / "p")


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [16, 32, 64, 128])
def test_quantise_is_the_cores(bits, group):
    """The C codec and this one give the same bytes, also for strange rows."""
    internals = pytest.importorskip("flashmoe._core").internals
    rng = np.random.default_rng(bits + group)
    x = rng.standard_normal((64, 256)).astype(np.float32)
    x *= np.exp2(rng.integers(-40, 40, (64, 1))).astype(np.float32)
    x[0], x[1, ::2] = 0, 0
    x[2], x[3] = 7.25, -1e-30
    x[4, 3] = 3e38
    for a, b in zip(quantise(x, bits, group), internals.encode(x, f"affine{bits}", group), strict=True):
        assert (a.view(np.uint8).reshape(-1) == b.reshape(-1)).all()
