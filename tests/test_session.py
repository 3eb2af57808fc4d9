"""Sequences: few slots, ragged batches, going back, saving, cancelling; one result for all forms.

Equal means bit for bit here, in every CPU variant: the kernels promise that a row's result depends
on no other row, and the blocks that it depends on no slot count.  The one thing that may differ by
rounding is a recurrent layer fed the same tokens in other chunks (``test_arch.py`` bounds it).
"""

from __future__ import annotations

import threading
import time

import checkpoint_files as files
import engines
import numpy as np
import pytest
from engines import (
    GOLDEN,
    core_desc,
    core_engine,
    golden,
    golden_names,
    greedy,
    ids_of,
    n_experts,
    prompts,
    run,
)

from flashmoe import _core
from flashmoe.checkpoint import open_checkpoint
from flashmoe.errors import ArgumentError, Cancelled, ModelFileError, StateError
from flashmoe.pack import pack

MODELS = [n for n in golden_names() if "/" not in n]
MOE = [n for n in golden_names() if core_desc(n)["experts"]]
TWINS = [n for n in golden_names() if "/" in n]
VARIANTS = _core.cpu_variants()


@pytest.fixture(params=VARIANTS)
def variant(request, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CPU", request.param)
    return request.param


def long_ids(name: str) -> np.ndarray:
    return ids_of(name, prompts(name)[-1])


def is_recurrent(name: str) -> bool:
    return any(core_desc(name)["config"]["mixers"])


# ---- failures ----


def test_logits_of_a_failed_step_replace_none(tmp_path, variant):
    """A token at which the head overflows: its logits are refused and the last good ones stay."""
    name, good, spiked = "q35dense", [3, 1, 4], 7
    path = files.copy(name, tmp_path / "model")

    def spike(tensors):  # 5e37 times the normed hidden state, of which a token has all in one place
        key = next(k for k in tensors if k.endswith("embed_tokens.weight"))
        embed = tensors[key]
        assert embed.dtype == "BF16"
        rows = np.frombuffer(embed.data, np.uint16).reshape(embed.shape).copy()
        rows[spiked] = 0
        rows[spiked, 0] = 0x447A  # 1000
        head = np.zeros_like(rows)
        np.fill_diagonal(head, 0x7E16)
        tensors[key] = files.Stored(embed.dtype, embed.shape, rows.tobytes())
        tensors["lm_head.weight"] = files.Stored(embed.dtype, embed.shape, head.tobytes())

    def untie(config):
        config["tie_word_embeddings"] = files.text_of(config)["tie_word_embeddings"] = False

    files.change_tensors(path, spike)
    files.change_config(path, untie)
    with core_engine(open_checkpoint(path).to_core()) as engine:
        _, other = run(engine, [*good, good[0]], chunk=1)
        _, session = run(engine, good, chunk=1)
        want = session.logits()
        for _ in range(2):
            with pytest.raises(ModelFileError, match="logits are not finite"):
                session.step(spiked)
            np.testing.assert_array_equal(session.logits(), want)
        session.step(good[0])
        np.testing.assert_array_equal(session.logits(), other.logits())


# ---- slots ----


@pytest.mark.parametrize("name", MOE)
def test_k_slots_equal_all_resident(name, variant):
    """Prefill in waves and decode with nothing but the K slots of one token, bit for bit."""
    p = "p24"
    with core_engine(name, slots="all") as engine:
        rows, session = run(engine, ids_of(name, p))
        tokens, steps = greedy(session, 8)
    with core_engine(name, slots=None) as engine:
        assert engine.info["n_slots"] == engine.info["experts_per_token"]
        few_rows, session = run(engine, ids_of(name, p))
        few_tokens, few_steps = greedy(session, 8)
        stats = engine.stats()
    np.testing.assert_array_equal(few_rows, rows)
    np.testing.assert_array_equal(few_steps, steps)
    assert few_tokens == tokens == golden(name)[f"{p}.greedy_tokens"][:9].tolist()
    assert stats["n_reads"] >= stats["misses"] > 0


@pytest.mark.parametrize("name", ["q35moe_base", "q3moe"])
def test_any_number_of_slots(name):
    ids = long_ids(name)
    with core_engine(name) as engine:
        want, _ = run(engine, ids)
    k = core_desc(name)["config"]["num_experts_per_tok"]
    for slots in (k, k + 1, 2 * k + 1, n_experts(core_desc(name)) - 1):
        with core_engine(name, slots=slots) as engine:
            np.testing.assert_array_equal(run(engine, ids)[0], want)


def test_slots_shrink_and_grow_between_forwards():
    name = "q35moe_base"
    ids = long_ids(name)
    with core_engine(name) as engine:
        want, _ = run(engine, ids, chunk=30)
    with core_engine(name) as engine:
        k, most = engine.info["experts_per_token"], engine.info["n_slots"]
        session, parts = engine.session(), []
        for i, slots in zip(range(0, len(ids), 30), [most, k, 2 * k, k, most]):
            assert engine.set_slots(slots) == slots
            parts.append(run(engine, ids[i : i + 30], session=session)[0])
        np.testing.assert_array_equal(np.concatenate(parts), want)
        for bad in (0, k - 1, most + 1):
            with pytest.raises(ArgumentError, match=str(bad)):
                engine.set_slots(bad)
        assert engine.info["n_slots"] == most
    with pytest.raises(ArgumentError, match="1 expert slots"):
        core_engine(name, slots=1).__enter__()


# ---- ragged batches ----


@pytest.mark.parametrize("name", MODELS)
def test_ragged_batch_equals_single_runs(name, variant):
    """Five sequences, prefill and decode rows in one forward, then a step of all: bit for bit."""
    ids = long_ids(name)
    before, chunks = [0, 17, 40, 3, 64], [9, 1, 31, 1, 2]
    starts = [0, 5, 20, 50, 70]

    def parts(i):
        s = starts[i]
        old, new = ids[s : s + before[i]], ids[s + before[i] : s + before[i] + chunks[i]]
        return old, new, ids[s + before[i] + chunks[i]][None]

    with core_engine(name) as engine:
        single = []
        for i in range(5):
            old, new, last = parts(i)
            session = engine.session()
            if len(old):
                session.prefill(old)
            rows, _ = run(engine, new, session=session)
            session.step(int(last[0]))
            single.append((rows, session.logits()))
            session.close()
    with core_engine(name, slots=None) as engine:
        sessions = [engine.session() for _ in range(5)]
        for i, session in enumerate(sessions):
            if len(parts(i)[0]):
                session.prefill(parts(i)[0])
        out = engine.forward(sessions, [parts(i)[1] for i in range(5)], all_logits=True)["logits"]
        at = np.cumsum([0, *chunks])
        for i in range(5):
            np.testing.assert_array_equal(out[at[i] : at[i + 1]], single[i][0], str(i))
            np.testing.assert_array_equal(sessions[i].logits(), single[i][0][-1], str(i))
        engine.forward(sessions, [parts(i)[2] for i in range(5)])
        for i in range(5):
            np.testing.assert_array_equal(sessions[i].logits(), single[i][1], str(i))
            assert sessions[i].pos == before[i] + chunks[i] + 1


def test_threads_and_verify_change_nothing():
    name = "q35moe_base"
    with core_engine(name, n_threads=1) as engine:
        want, _ = run(engine, long_ids(name))
    for opts in ({"n_threads": 2}, {"n_threads": 5}, {"verify": False}, {"io_workers": 1}):
        with core_engine(name, slots=None, **opts) as engine:
            np.testing.assert_array_equal(run(engine, long_ids(name))[0], want, str(opts))


def test_a_bad_batch_moves_nobody():
    name = "q35moe_base"
    ids = long_ids(name)
    with core_engine(name, max_rows=32) as engine, core_engine(name) as other:
        a, b = engine.session(), engine.session(context=12)
        a.prefill(ids[:10])
        b.prefill(ids[:10])
        foreign = other.session()
        end = a.logits()
        vocab = engine.info["vocab_size"]
        good = ids[:2]
        bad = np.array([1, vocab], np.int32)
        for sessions, rows, message in [
            ([a, b], [good, bad], f"token id {vocab}"),
            ([a, b], [good, np.array([-1], np.int32)], "token id -1"),
            ([a, b, a], [good, good, good], "consecutive"),
            ([a, b], [good, ids[:3]], "context is full: 10 .* 3 more .* 12"),
            ([a, foreign], [good, good], "another engine"),
            ([a], [ids[:33]], "33 rows, must be 1 to 32"),
            ([], [], "0 rows"),
            ([a], [ids[:0]], "0 rows"),
            ([a, b], [good], "2 sessions and 1 id arrays"),
        ]:
            with pytest.raises(ArgumentError, match=message):
                engine.forward(sessions, rows)
            assert (a.pos, b.pos, foreign.pos) == (10, 10, 0)
        np.testing.assert_array_equal(a.logits(), end)
        for wrong in (np.array([1.5]), np.array([1], np.int64), [1.5]):
            with pytest.raises((TypeError, ArgumentError)):
                a.prefill(wrong)
        with pytest.raises(ArgumentError):
            a.prefill(ids[:0])
        with pytest.raises(ArgumentError, match="one dimension"):
            a.prefill(ids[:4].reshape(2, 2))
        other_a = other.session()
        other_a.prefill(ids[:10])
        want, _ = run(other, ids[10:14], session=other_a)
        np.testing.assert_array_equal(run(engine, ids[10:14], session=a)[0], want)
        b.prefill(ids[:2])
        with pytest.raises(ArgumentError, match="context is full"):
            b.step(1)
        assert b.pos == b.context == 12
        with pytest.raises(ArgumentError, match="-1"):
            engine.session(context=-1)


# ---- back and forth ----


@pytest.mark.parametrize("name", MODELS)
def test_rewind_and_replay(name, variant):
    """To every kind of remembered position; the replay equals the straight run bit for bit."""
    ids = long_ids(name)

    def replay(session, at):
        """Feed from `at` on as the straight run did: chunks of 20, 20, then single tokens."""
        for lo, hi in ((0, 20), (20, 40), (40, 41), (41, 42), (42, 43)):
            if lo >= at:
                session.prefill(ids[lo:hi])
        return session.logits()

    with core_engine(name) as engine:
        session = engine.session()
        end = replay(session, 0)
        assert session.pos == 43
        assert session.rewind(42) == 42  # before the last forward: always remembered
        with pytest.raises(StateError, match="no logits"):
            session.logits()
        np.testing.assert_array_equal(replay(session, 42), end)
        session.close()

        session = engine.session()
        session.prefill(ids[:20])
        session.checkpoint()
        for lo, hi in ((20, 40), (40, 41), (41, 42), (42, 43)):
            session.prefill(ids[lo:hi])
        got = session.rewind(41)
        assert got == (20 if is_recurrent(name) else 41)
        np.testing.assert_array_equal(replay(session, got), end)
        assert session.rewind(20) == 20  # the checkpoint is still there
        np.testing.assert_array_equal(replay(session, 20), end)
        assert session.rewind(19) == (0 if is_recurrent(name) else 19)
        assert session.rewind(0) == 0
        np.testing.assert_array_equal(replay(session, 0), end)
        for bad in (44, -1):
            with pytest.raises(ArgumentError, match=f"rewind to {bad}"):
                session.rewind(bad)
        assert session.pos == 43
        assert session.rewind(43) == 43
        np.testing.assert_array_equal(session.logits(), end)


def test_logits_are_read_in_place():
    """The row that `logits` copies, read-only; who keeps it is told."""
    with core_engine(MODELS[0]) as engine:
        session = engine.session()
        with pytest.raises(StateError, match="no logits"):
            session.read_logits(len)
        session.prefill(np.arange(1, 6, dtype=np.int32))
        want, kept = session.logits(), []

        def look(row):
            assert not row.flags.writeable
            assert not row.flags.owndata
            return np.array(row)

        np.testing.assert_array_equal(session.read_logits(look), want)
        for keep in (kept.append, lambda row: kept.append(row[2:4]), lambda row: kept.append(memoryview(row)), np.asarray):
            with pytest.raises(BufferError, match="was kept"):
                session.read_logits(keep)
            kept.clear()
        with pytest.raises(ZeroDivisionError):
            session.read_logits(lambda row: 1 // 0)
        session.step(3)
        assert int(session.read_logits(np.argmax)) == session.logits().argmax()


@pytest.mark.parametrize("name", MODELS)
def test_save_and_load(name, variant):
    """Into the same engine and into one with other slots, context and chunk: bit for bit."""
    ids = long_ids(name)
    with core_engine(name) as engine:
        session = engine.session()
        session.prefill(ids[:50])
        saved = session.save()
        assert session.save() == saved
        want, _ = run(engine, ids[50:60], session=session)
        session.load(saved)
        assert session.pos == 50
        with pytest.raises(StateError, match="no logits"):
            session.logits()
        np.testing.assert_array_equal(run(engine, ids[50:60], session=session)[0], want)
    with core_engine(name, slots=None, context=61, max_rows=16) as engine:
        session = engine.session()
        session.prefill(ids[60:70])
        session.load(saved)
        np.testing.assert_array_equal(run(engine, ids[50:60], session=session)[0], want)
        assert session.save()[:8] == saved[:8]


def test_load_refuses_what_does_not_fit():
    with core_engine("q35moe_base") as engine:
        session = engine.session()
        session.prefill(ids_of("q35moe_base", "p24"))
        saved, end = session.save(), session.logits()
        for bad in (b"", saved[:7], saved[:71], saved[:-1], saved + b"\0", b"x" + saved[1:]):
            with pytest.raises(ModelFileError, match="saved session"):
                session.load(bad)
        huge = saved[:16] + (1 << 60).to_bytes(8, "little") + saved[24:]
        minus = saved[:16] + (-1).to_bytes(8, "little", signed=True) + saved[24:]
        for bad in (huge, minus):
            with pytest.raises((ModelFileError, ArgumentError), match="saved session"):
                session.load(bad)
        assert session.pos == 24
        np.testing.assert_array_equal(session.logits(), end)
        with pytest.raises(ArgumentError, match="24 positions, this session's context is 23"):
            engine.session(context=23).load(saved)
    for other in ("q3moe", "q35moe_odd", "q3next"):
        with core_engine(other) as engine:
            session = engine.session()
            with pytest.raises(ModelFileError, match="another model"):
                session.load(saved)
            assert session.pos == 0


def test_two_sessions_do_not_touch_each_other():
    name = "q3next"
    ids = long_ids(name)
    with core_engine(name, slots=None) as engine:
        _, lone = run(engine, ids[:30], chunk=1)
        want = lone.logits()
        a, b = engine.session(), engine.session(context=90)
        for i in range(30):
            a.step(int(ids[i]))
            b.step(int(ids[i + 30]))
        np.testing.assert_array_equal(a.logits(), want)
        b.close()
        a.step(5)
        lone.step(5)
        np.testing.assert_array_equal(a.logits(), lone.logits())


# ---- cancelling ----


@pytest.mark.parametrize("name", ["q35moe_base", "q3moe"])
def test_cancel_while_reads_are_slow(name):
    """From another thread, while waiting for the disk: soon, at the old position, still usable."""
    ids = ids_of(name, "p24")
    with core_engine(name) as engine:
        want, _ = run(engine, ids, chunk=12)
    slow = {"io_method": "fault", "io_fault": "delay=50000us", "io_workers": 1}
    with core_engine(name, slots=None, **slow) as engine:
        session = engine.session()
        seconds = []

        def cancel():
            time.sleep(0.2)
            seconds.append(time.monotonic())
            session.cancel()

        thread = threading.Thread(target=cancel)
        thread.start()
        with pytest.raises(Cancelled):
            session.prefill(ids)
        took = time.monotonic() - seconds[0]
        thread.join()
        assert took < 1, "each read takes 0.05 s, the whole prefill many times that"
        assert session.pos == 0
    with core_engine(name, slots=None, io_method="fault", io_fault="delay=2000us") as engine:
        session = engine.session()
        session.prefill(ids[:12])
        session.cancel()  # none is running: the next one ends at once
        with pytest.raises(Cancelled):
            session.prefill(ids[12:])
        assert session.pos == 12
        np.testing.assert_array_equal(run(engine, ids[12:], session=session)[0], want[12:])


# ---- one result for all forms of the same weights ----


def logits_of(path) -> np.ndarray:
    with core_engine(open_checkpoint(path).to_core(), slots=None) as engine:
        vocab = engine.info["vocab_size"]
        n = 12 if engines.STAND_IN else 40
        ids = np.random.default_rng(3).integers(0, vocab, n).astype(np.int32)
        rows, session = run(engine, ids)
        return np.concatenate([rows, greedy(session, 4)[1]])


@pytest.mark.parametrize("name", [n for n in [*MODELS, *TWINS] if core_desc(n)["experts"]])
def test_packed_equals_direct(name, tmp_path):
    """Packed with the formats kept, from Hugging Face and from MLX: bit for bit."""
    pack(GOLDEN / name, tmp_path / "packed", bits=None)
    packed = open_checkpoint(tmp_path / "packed")
    assert packed.origin == "packed"
    assert all(e.crc32c is not None for e in packed.experts)
    np.testing.assert_array_equal(logits_of(tmp_path / "packed"), logits_of(GOLDEN / name))


def test_packing_a_packed_one_changes_nothing(tmp_path):
    pack(GOLDEN / "q3moe", tmp_path / "once", bits=4)
    pack(tmp_path / "once", tmp_path / "twice", bits=None)
    np.testing.assert_array_equal(logits_of(tmp_path / "twice"), logits_of(tmp_path / "once"))


@pytest.mark.parametrize("direct", [False, True])
def test_direct_and_buffered_reads_agree(direct):
    name = "q35moe_base/mlxmix"  # nine unaligned segments per expert
    with core_engine(name) as engine:
        want, _ = run(engine, ids_of(name, "p24"))
    try:
        with core_engine(name, slots=None, io_direct=direct) as engine:
            assert engine.info["io_direct"] is direct
            np.testing.assert_array_equal(run(engine, ids_of(name, "p24"))[0], want)
    except Exception as e:
        if direct and type(e).__name__ == "UnsupportedError":
            pytest.skip(f"no direct reads here: {e}")
        raise
