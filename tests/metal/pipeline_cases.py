"""Whole models, one recording per forward against a submission per step: run by test_metal_pipeline.

Equal means bit for bit.  Small models have 4 layers or more; "plain" is FLASHMOE_PIPELINE=0.
"""

from __future__ import annotations

import ctypes as C
import os
import shutil
import threading
import time
from contextlib import contextmanager

import metal_core_plugin
import numpy as np
import pytest
from engines import GOLDEN, core_desc, core_engine, golden_names, greedy, ids_of, n_experts, prompts
from test_faults import poison

from flashmoe.checkpoint import open_checkpoint
from flashmoe.checkpoint.description import Piece
from flashmoe.errors import ArgumentError, Cancelled, FlashMoeError, ModelFileError, StorageError

FEW = ["q35moe_base/mlx4", "q35moe_odd", "glm4moe_groups", "q3moe"]
NAMES = [n for n in golden_names() if core_desc(n)["experts"]]
NAMES = NAMES if os.environ.get("PIPELINE_ALL") else [n for n in FEW if n in NAMES]
BASE, HF = FEW[0], FEW[3]
FORMS = pytest.mark.parametrize("plain", [False, True], ids=["pipelined", "plain"])
lib = C.CDLL(metal_core_plugin.path)


def command_buffers() -> int:
    at = (C.c_long * 2)()
    lib.fake_metal_counts(at)
    return at[0]


@contextmanager
def opened(model, *, plain=False, **opts):
    """core_engine with the pipeline on or off."""
    os.environ["FLASHMOE_PIPELINE"] = "0" if plain else "1"
    try:
        with core_engine(model, **opts) as engine:
            yield engine
    finally:
        os.environ.pop("FLASHMOE_PIPELINE", None)


def story(engine, name, most=12):
    """Decode, small chunks, ragged batches, going back and loading; all logits and router choices."""
    out = []

    def feed(sessions, *ids):
        got = engine.forward(
            sessions, [np.asarray(i, np.int32) for i in ids], all_logits=True, trace_router=True
        )
        out.extend([got["logits"], got["router"]])

    ids = np.resize(ids_of(name, prompts(name)[-1]), most)
    a, b, c = (engine.session() for _ in range(3))
    feed([a], ids[:3])
    feed([b], ids[:7])
    feed([a, b, c], ids[3:4], ids[7:9], ids[:1])
    feed([c, a], ids[1:6], ids[4:6])
    saved = b.save()
    for i in range(3):
        feed([b], ids[9 + i : 10 + i])
    b.load(saved)
    feed([b, c], ids[9:10], ids[6:7])
    out.append(greedy(a, 3)[1])
    return out


def same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", NAMES)
def test_same_bits(name):
    """K slots (decode alone is pipelined), a few more, a layer's, all; with and without guesses."""
    desc = core_desc(name)
    total, layer = n_experts(desc), len(desc["experts"][0]["file"])
    with opened(name, plain=True) as engine:
        want = story(engine, name)
        k = engine.info["experts_per_token"]
    for slots, lookahead in ((k, 0), (2 * k + 1, k), (layer, 0), (total - 1, 1), (total, 0)):
        with opened(name, slots=slots, lookahead=lookahead) as engine:
            same(story(engine, name), want)
            assert engine.set_slots(k) == k, "something is still pinned"


@pytest.mark.parametrize(("slots", "lookahead"), [("all", 0), (None, 0), (20, 3)])
def test_one_command_buffer_per_token(slots, lookahead):
    with opened(BASE, slots=slots, lookahead=lookahead) as engine:
        session = engine.session()
        for token in range(4):
            before = command_buffers()
            session.step(token)
            assert command_buffers() - before == 1
        stats = engine.stats()
        assert (stats["guessed"] > 0) == (lookahead > 0)
    with opened(BASE, slots=slots, plain=True) as engine:
        before = command_buffers()
        engine.session().step(1)
        assert command_buffers() - before > 8


def test_a_batch_is_one_command_buffer_too():
    """16 rows of 5 sequences; more rows, hidden states or too few slots: the plain way."""
    with opened(BASE, max_rows=32) as engine:
        sessions = [engine.session() for _ in range(5)]
        ids = [np.arange(n, dtype=np.int32) for n in (1, 9, 1, 4, 1)]
        before = command_buffers()
        engine.forward(sessions, ids)
        assert command_buffers() - before == 1
        for more in ({"trace_hidden": True}, {}):
            before = command_buffers()
            engine.forward(sessions[:1], [np.arange(1 if more else 17, dtype=np.int32)], **more)
            assert command_buffers() - before > 4


@pytest.mark.parametrize("wish", ["2", "yes", "01"])
def test_a_wish_that_is_none(wish, monkeypatch):
    monkeypatch.setenv("FLASHMOE_PIPELINE", wish)
    with (
        pytest.raises(ArgumentError, match=f"FLASHMOE_PIPELINE is '{wish}', must be 0 or 1"),
        core_engine(BASE),
    ):
        pass


# ---- reads that fail, calls that are cancelled


@pytest.mark.parametrize("lookahead", [0, 3])
@pytest.mark.parametrize("script", ["eio@1", "eof@3", "eio@6", "eio@14"])
def test_failed_reads(script, lookahead):
    """At every stage of a layer: the plain form's error; the device ends; then the right bits."""
    ids = ids_of(BASE, "p24")[:6]
    opts = {"slots": None, "io_method": "fault", "io_fault": script, "lookahead": lookahead}
    results = []
    for plain in (True, False):
        with opened(BASE, plain=plain, io_workers=1, **opts) as engine:
            session, said = engine.session(), []
            for token in ids:
                try:
                    session.step(int(token))
                except StorageError as e:
                    said.append((session.pos, str(e)))
                    session.step(int(token))  # K slots: a leaked pin would leave too few
            results.append((said, session.logits(), session.save()))
            assert engine.set_slots(engine.info["n_slots"]) == engine.info["experts_per_token"]
    (plain_said, *plain), (said, *pipelined) = results
    assert len(said) == len(plain_said) == 1
    if lookahead == 0:  # guesses take their turns at other times
        assert said == plain_said
    same(plain[:1], pipelined[:1])
    assert plain[1] == pipelined[1]


def test_failed_late_read(monkeypatch):
    """The device has been let into a layer's first stage and is slow; what the stage needs later fails
    meanwhile. The host may not touch the stage's jobs before the device is past them: judged by TSan."""
    monkeypatch.setenv("FAKE_METAL_SLOW_MS", "60")
    fault = {"io_method": "fault", "io_fault": "delay=5000,eio@14", "io_workers": 1}
    with opened(BASE, slots=None, **fault) as engine:
        session = engine.session()
        with pytest.raises(StorageError):
            session.step(int(ids_of(BASE, "p24")[0]))
        session.step(int(ids_of(BASE, "p24")[0]))
        assert engine.set_slots(engine.info["n_slots"]) == engine.info["experts_per_token"]


def test_a_disk_that_fails_and_fails():
    """Some reads of every token: whatever stage they hit, retries come to the right bits."""
    ids = ids_of(HF, "p24")[:8]
    with opened(HF, plain=True) as engine:
        want = engine.session()
        want.prefill(ids[:1])
        for token in ids[1:]:
            want.step(int(token))
        want = want.logits()
    slow = {"io_method": "fault", "io_fault": "eio%41,reorder", "io_workers": 2}
    for slots in (None, 20):
        with opened(HF, slots=slots, **slow) as engine:
            session, failed = engine.session(), 0
            for token in ids:
                for _ in range(50):
                    try:
                        session.step(int(token))
                        break
                    except StorageError:
                        failed += 1
                else:
                    pytest.fail("a step never went through")
            same([session.logits()], [want])
            assert failed > 3 or slots


def test_cancel():
    """From another thread while the device holds for a slow read; then the session goes on."""
    ids = ids_of(HF, "p24")[:4]
    with opened(HF, plain=True) as engine:
        session = engine.session()
        for token in ids:
            session.step(int(token))
        want = session.logits()
    slow = {"io_method": "fault", "io_fault": "delay=20000us", "io_workers": 1}
    with opened(HF, slots=None, **slow) as engine:
        session = engine.session()
        session.cancel()
        with pytest.raises(Cancelled):
            session.step(int(ids[0]))
        for i, token in enumerate(ids):
            thread = threading.Thread(target=lambda: (time.sleep(0.03), session.cancel()))
            thread.start()
            with pytest.raises(Cancelled):
                for _ in range(50):  # the first, unless it was over before the thread came
                    session.step(int(token))
                    session.rewind(i)
            thread.join()
            assert session.pos == i
            session.step(int(token))
        same([session.logits()], [want])
        assert engine.set_slots(engine.info["n_slots"]) == engine.info["experts_per_token"]


@FORMS
@pytest.mark.parametrize("layer", [0, -1])
def test_an_expert_that_is_not_finite(plain, layer, tmp_path):
    """One NaN in each expert of a layer: file and tensor are named, nothing stays pinned."""
    shutil.copytree(GOLDEN / HF, tmp_path / "m")
    desc = open_checkpoint(tmp_path / "m")
    x = desc.experts[layer]
    for i in range(len(x.file)):
        piece = Piece(int(x.file[i, 2]), int(x.offset[i, 2]), 4)
        poison(desc, piece, x.down.format, np.nan, 3)
    with opened(desc.to_core(), plain=plain, slots=None) as engine:
        session = engine.session()
        for _ in range(2):
            with pytest.raises(ModelFileError, match=rf"layer {x.layer} expert \d+ .*NaN or infin"):
                session.step(3)
            assert session.pos == 0
        assert engine.set_slots(engine.info["n_slots"]) == engine.info["experts_per_token"]


# ---- a device that fails


@pytest.mark.parametrize("at", [0, 5, 30, 60, 100])
def test_failing_device(at, monkeypatch):
    """Before, between and after the host's turns: its message, no token; the engine still closes."""
    monkeypatch.setenv("FAKE_METAL_FAIL_AT", str(at))
    with opened(BASE, slots=None) as engine:
        session = engine.session()
        session.step(1)
        monkeypatch.setenv("FAKE_METAL_FAIL", "2")  # the second of this queue
        with pytest.raises(FlashMoeError, match="a command buffer failed: planted failure"):
            session.step(2)
        assert session.pos == 1
        with pytest.raises(FlashMoeError, match="the device failed before; reopen"):
            session.step(2)


def test_engines_of_both_forms_side_by_side():
    """Each has its own queue and events."""
    with opened(BASE) as one, opened(BASE, plain=True) as two:
        a, b = one.session(), two.session()
        for token in (5, 9, 2):
            a.step(token)
            b.step(token)
            same([a.logits()], [b.logits()])
