"""Fail closed: what breaks is named by file, tensor and numbers, and the session goes on.

Reads fail by script (``csrc/io/io_fault.c``: kind@N strikes the Nth read of experts) or because the
files really are damaged, short, gone, or hold NaN.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from engines import GOLDEN, core_engine, golden, greedy, ids_of, run, worst

from flashmoe import _core
from flashmoe.checkpoint import open_checkpoint
from flashmoe.checkpoint.description import Piece
from flashmoe.errors import (
    ArgumentError,
    FlashMoeError,
    ModelFileError,
    StorageError,
    UnsupportedError,
)
from flashmoe.pack import pack

HF, MLX = "q3moe", "q35moe_base/mlx4"
PROMPT = "p24"


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The same models in three forms: path of each."""
    packed = tmp_path_factory.mktemp("packed") / "q3moe"
    pack(GOLDEN / HF, packed, bits=None)
    return {"hf": GOLDEN / HF, "mlx": GOLDEN / MLX, "packed": packed}


@pytest.fixture(params=["hf", "mlx", "packed"])
def form(request, forms):
    return request.param, forms[request.param]


def name_of(kind: str) -> str:
    return MLX if kind == "mlx" else HF


def faulty(path, script, **opts):
    return core_engine(
        open_checkpoint(path).to_core(), slots=None, io_method="fault", io_fault=script, **opts
    )


def skip_without(method: str) -> None:
    """Skip where the system has no such way to read."""
    try:
        with core_engine(HF, io_method=method):
            pass
    except UnsupportedError as e:
        pytest.skip(f"no method {method} here: {e}")


# ---- reads that fail ----


@pytest.mark.parametrize("n", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("kind", ["eio", "eof"])
def test_a_failed_read_fails_the_forward_and_no_more(form, kind, n):
    """The Nth read fails: the error names all; nothing moved; the next call gives the right bits."""
    name, path = form
    ids = ids_of(name_of(name), PROMPT)
    with core_engine(open_checkpoint(path).to_core()) as engine:
        want, session = run(engine, ids)
        tokens, steps = greedy(session, 6)
    with faulty(path, f"{kind}@{n}", max_rows=24) as engine:
        session = engine.session()
        with pytest.raises(StorageError) as e:
            engine.forward([session], [ids])
        assert e.value.errno == (errno.EIO if kind == "eio" else None)
        assert Path(e.value.filename).parent == Path(path)
        assert re.search(r"layer \d+ expert \d+", str(e.value)), e.value
        assert os.strerror(errno.EIO) in str(e.value) if kind == "eio" else "early" in str(e.value)
        assert session.pos == 0
        assert engine.stats()["n_failed_reads"] >= 1
        rows, _ = run(engine, ids, session=session)
        np.testing.assert_array_equal(rows, want)
        got_tokens, got = greedy(session, 6)  # K slots: a leaked pin would leave too few
        np.testing.assert_array_equal(got, steps)
        assert got_tokens == tokens


def test_failures_again_and_again_leak_no_pin(forms):
    """Every 41st read fails for long; with K slots a single leaked pin would be the end."""
    with core_engine(HF) as engine:
        _, session = run(engine, ids_of(HF, PROMPT), chunk=1)
        want = session.logits()
    with faulty(forms["hf"], "eio%41", io_workers=2) as engine:
        session = engine.session()
        failed = 0
        for token in ids_of(HF, PROMPT):
            for _ in range(50):
                try:
                    session.step(int(token))
                    break
                except StorageError:
                    failed += 1
            else:
                pytest.fail("a step never went through")
        np.testing.assert_array_equal(session.logits(), want)
        assert failed > 10
        assert engine.set_slots(engine.info["n_slots"]) == engine.info["experts_per_token"]


def test_a_disk_that_is_gone_produces_nothing(form):
    """All reads fail from the Nth on: each call says so, none gives a token."""
    name, path = form
    ids = ids_of(name_of(name), PROMPT)
    with faulty(path, "eio@40+") as engine:
        session = engine.session()
        pos = 0
        for _ in range(8):
            try:
                session.prefill(ids[pos : pos + 1])
                pos += 1
            except StorageError:
                break
        for _ in range(3):
            with pytest.raises(StorageError, match=r"layer \d+ expert \d+"):
                session.prefill(ids)
            assert session.pos == pos


@pytest.mark.parametrize("method", [m for m in _core.io_methods() if m != "fault"])
@pytest.mark.parametrize("script", ["short%1", "short%3", "reorder,seed=5", "delay=300us,reorder"])
def test_late_short_and_reordered_reads_change_nothing(forms, method, script):
    path = forms["packed"]
    ids = ids_of(HF, PROMPT)
    with core_engine(open_checkpoint(path).to_core()) as engine:
        want, session = run(engine, ids)
        tokens, steps = greedy(session, 3)
    skip_without(method)
    with faulty(path, f"{method}:{script}", io_workers=3) as engine:
        session = engine.session()
        np.testing.assert_array_equal(run(engine, ids, session=session)[0], want)
        got_tokens, got = greedy(session, 3)
        np.testing.assert_array_equal(got, steps)
        assert got_tokens == tokens
        assert engine.stats()["n_failed_reads"] == 0


def test_bad_fault_scripts_are_refused(forms):
    for script in ("eio@", "eio@0", "melt@1", "nosuch:eio@1", "delay=x", "eio@1,,"):
        with pytest.raises(ArgumentError, match="fault script"):
            faulty(forms["hf"], script).__enter__()


# ---- records that are damaged ----

CHECKSUM = r"{}: layer (\d+) expert (\d+): checksum ([0-9a-f]{{8}}), recorded ([0-9a-f]{{8}})"


@pytest.mark.parametrize("n", [1, 5, 11])
def test_a_corrupt_read_of_a_packed_record(forms, n):
    """One bit flipped on the way: caught by the checksum, named; read again, it is right."""
    path, ids = forms["packed"], ids_of(HF, PROMPT)
    with faulty(path, f"corrupt@{n}") as engine:
        session = engine.session()
        with pytest.raises(ModelFileError) as e:
            engine.forward([session], [ids])
        found = re.search(CHECKSUM.format(re.escape(str(path)) + r"\S+"), str(e.value))
        assert found, e.value
        assert found[3] != found[4]
        layer, expert = int(found[1]), int(found[2])
        desc = next(x for x in open_checkpoint(path).experts if x.layer == layer)
        assert int(found[4], 16) == desc.crc32c[expert]
        assert session.pos == 0
        np.testing.assert_array_equal(run(engine, ids, session=session)[0], run(engine, ids)[0])
        assert worst(run(engine, ids)[0], golden(HF)[f"{PROMPT}.logits_f64"]) <= 1e-3


def test_a_flipped_bit_on_disk_is_found_wherever_it_is(forms, tmp_path):
    """First, last and middle byte of a record: this expert is refused, the others work."""
    shutil.copytree(forms["packed"], tmp_path / "m")
    desc = open_checkpoint(tmp_path / "m")
    ids = ids_of(HF, PROMPT)
    with core_engine(desc.to_core()) as engine:
        out = engine.forward([engine.session()], [ids], trace_router=True)
    layer, expert = 1, int(out["router"][0, 1, 0])
    x = next(x for x in desc.experts if x.layer == layer)
    first = int(x.offset[expert].min())
    n_bytes = 3 * 64 * 32 * 2
    file = Path(desc.files[x.file[expert, 0]][0])
    for at in (first, first + n_bytes // 2, first + n_bytes - 1):
        flip(file, at)
        with core_engine(desc.to_core(), slots=None) as engine:
            session = engine.session()
            with pytest.raises(ModelFileError, match=f"layer {layer} expert {expert}: checksum"):
                engine.forward([session], [ids])
            assert session.pos == 0
        flip(file, at)
    with core_engine(desc.to_core(), slots=None) as engine:
        engine.forward([engine.session()], [ids])


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)[0] ^ 0x04
        f.seek(at)
        f.write(bytes([byte]))


# ---- files that are gone or short ----


@pytest.fixture
def copies(form, tmp_path):
    """A private copy of a model and its description: (path, description, file of experts)."""
    shutil.copytree(form[1], tmp_path / "m", ignore=shutil.ignore_patterns("mlx*", "golden*"))
    desc = open_checkpoint(tmp_path / "m")
    return tmp_path / "m", desc, Path(desc.files[int(desc.experts[-1].file[0, 0])][0])


def test_a_missing_file(copies):
    _, desc, file = copies
    file.unlink()
    with pytest.raises(StorageError) as e:
        core_engine(desc.to_core()).__enter__()
    assert e.value.errno == errno.ENOENT
    assert e.value.filename == str(file)
    file.mkdir()
    with pytest.raises(FlashMoeError, match=re.escape(str(file))):
        core_engine(desc.to_core()).__enter__()


def test_a_file_that_is_short_before_opening(copies):
    path, desc, file = copies
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(ModelFileError) as e:  # the description is older than the cut
        core_engine(desc.to_core()).__enter__()
    assert str(file) in str(e.value)
    assert f"{size - 1} bytes" in str(e.value)
    assert str(size) in str(e.value)
    with pytest.raises(ModelFileError, match=re.escape(str(file))):
        open_checkpoint(path)
    os.truncate(file, 0)
    for call in (lambda: core_engine(desc.to_core()).__enter__(), lambda: open_checkpoint(path)):
        with pytest.raises(ModelFileError, match=re.escape(str(file))):
            call()


@pytest.mark.parametrize("method", [m for m in _core.io_methods() if m not in ("fault", "mmap")])
def test_a_file_that_is_cut_while_it_is_open(copies, form, method):
    """The read ends early; nothing is made up.  (A mapping would get SIGBUS, see io_mmap.c.)"""
    _, desc, file = copies
    ids = ids_of(name_of(form[0]), PROMPT)
    skip_without(method)
    with core_engine(desc.to_core(), slots=None, io_method=method) as engine:
        session = engine.session()
        session.step(int(ids[0]))
        os.truncate(file, int(desc.experts[-1].offset[:, 0].min()) + 1)
        with pytest.raises(StorageError) as e:
            session.prefill(ids)
        assert e.value.filename == str(file)
        assert re.search(r"layer \d+ expert \d+: file ends early: read of \d+ bytes", str(e.value))
        assert session.pos == 1


# ---- NaN and infinity ----


def poison(desc, piece, quant: str, value: float, at: int) -> None:
    """Overwrite element `at` of a piece stored in a plain format."""
    bits = np.array([value], np.float32)
    raw = bits.tobytes() if quant == "f32" else (bits.view(np.uint32) >> 16).astype("<u2").tobytes()
    with open(desc.files[piece.file][0], "r+b") as f:
        f.seek(piece.offset + at * len(raw))
        f.write(raw)


TRUNK = ["embed_tokens", "self_attn.q_proj", "mlp.gate", "norm", "input_layernorm"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", TRUNK)
def test_nan_in_the_trunk_is_refused_when_opening(copies, tensor, value):
    _, desc, _ = copies
    t = next(t for t in desc.tensors if t.name == tensor)
    affine = t.format.startswith("affine")
    piece, quant = (t.scales[0], t.scale_format) if affine else (t.codes[0], t.format)
    poison(desc, piece, quant, value, 5)
    with pytest.raises(ModelFileError, match="NaN or infin") as e:
        core_engine(desc.to_core()).__enter__()
    assert t.source in str(e.value)
    assert desc.files[piece.file][0] in str(e.value)


@pytest.mark.parametrize("role", ["gate", "up", "down"])
def test_nan_in_an_expert_is_an_error_of_whoever_needs_it(copies, form, role):
    """All experts of a layer hold one NaN each: no token gets through, and the tensor is named."""
    kind, _ = form
    _, desc, _ = copies
    x = desc.experts[1]
    fmt = getattr(x, role)
    segments = {"gate": 0, "up": 1, "down": 2}[role]
    if fmt.format.startswith("affine"):
        n_segments = x.offset.shape[1]
        segments = segments * 3 + 1 if n_segments == 9 else segments
    for i in range(len(x.file)):
        piece = Piece(int(x.file[i, segments]), int(x.offset[i, segments]), 4)
        quant = fmt.scale_format if fmt.format.startswith("affine") else fmt.format
        poison(desc, piece, quant, np.nan, 3)
    opts = {"verify": kind != "packed"}  # else the checksum would find it first
    with core_engine(desc.to_core(), **opts) as engine:
        session = engine.session()
        for _ in range(2):
            with pytest.raises(ModelFileError, match="NaN or infin") as e:
                session.prefill(ids_of(name_of(kind), PROMPT))
            assert re.search(rf"layer {x.layer} expert \d+", str(e.value)), e.value
            assert desc.files[int(x.file[0, segments])][0] in str(e.value)
            assert session.pos == 0
    if kind == "packed":
        with core_engine(desc.to_core()) as engine, pytest.raises(ModelFileError, match="checksum"):
            engine.session().prefill(ids_of(HF, PROMPT))


def test_a_wrong_checksum_in_the_description(forms):
    """What the core is told is what it checks: no record passes that is not the recorded one."""
    d = open_checkpoint(forms["packed"]).to_core()
    for e in d["experts"]:
        e["crc32c"] = e["crc32c"] ^ np.uint32(1)
    with core_engine(d) as engine, pytest.raises(ModelFileError, match="checksum"):
        engine.session().step(1)
    with core_engine(d, verify=False) as engine:
        assert engine.info["verify"] is False
        engine.session().step(1)
