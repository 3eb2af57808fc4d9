"""The public face: generate, stream, chat, logits, sessions, limits, threads, close, fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

import flashmoe
from flashmoe import Engine, SamplingConfig
from flashmoe.errors import (
    ArgumentError,
    Cancelled,
    ModelFileError,
    OutOfMemory,
    StateError,
    StorageError,
    TokenizerError,
    UnsupportedError,
)
from flashmoe.generation import StopMatcher

MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def engine(noise_model):
    with Engine(noise_model, memory="1GiB", context=512, threads=1) as e:
        yield e


@pytest.fixture(scope="module")
def no_tokenizer(noise_model, tmp_path_factory):
    """The same model without tokenizer files."""
    folder = tmp_path_factory.mktemp("bare")
    for name in ("config.json", "model.safetensors"):
        os.symlink(noise_model / name, folder / name)
    return folder


# ---- generation ----


def test_generate_is_a_loop_over_stream(engine):
    options = {"max_tokens": 12, "seed": 5, "logprobs": 3, "ignore_eos": True}
    whole = engine.generate("Hello", **options)
    pieces = list(engine.stream("Hello", **options))
    assert str(whole) == whole.text == "".join(p.text for p in pieces)
    assert whole.token_ids == [i for p in pieces for i in p.token_ids]
    assert len(pieces) == 12
    assert [p.finish_reason for p in pieces] == [None] * 11 + ["length"]
    assert pieces[-1].usage == whole.usage
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (5, 12)
    assert whole.usage.total_tokens == 17
    assert whole.seed == 5
    assert (whole.experts_per_token, whole.trained_experts_per_token) == (2, 2)
    assert whole.timings.prefill_tokens_per_second > 0


def test_greedy_tokens_are_the_arg_max_of_the_scores(engine):
    g = engine.generate("Hello", max_tokens=20, temperature=0, ignore_eos=True, logprobs=2)
    ids = [*engine.tokenizer.encode("Hello"), *g.token_ids]
    rows = engine.logits(ids)[4:-1, : engine.tokenizer.n_vocab].astype(np.float64)
    assert g.token_ids == rows.argmax(axis=1).tolist()
    exact = rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))
    for i, p in enumerate(g.logprobs):
        assert p.token_id == g.token_ids[i]
        assert abs(p.logprob - exact[i, p.token_id]) < 1e-4
        assert p.top[0] == (p.token_id, p.logprob)
        assert len(p.top) == 2


def test_same_seed_same_text(engine):
    texts = [str(engine.generate("Hello", max_tokens=30, seed=s)) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    drawn = engine.generate("Hello", max_tokens=30)
    again = engine.generate("Hello", max_tokens=30, seed=drawn.seed)
    assert again.text == drawn.text


def test_prompt_as_text_ids_and_array(engine):
    ids = engine.tokenizer.encode("Hello")
    options = {"max_tokens": 8, "temperature": 0}
    want = engine.generate("Hello", **options).token_ids
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, dtype=np.uint8)):
        assert engine.generate(prompt, **options).token_ids == want


def test_messages_go_through_the_template(engine):
    text = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert engine.chat_template.render(MESSAGES) == text
    options = {"max_tokens": 8, "temperature": 0}
    want = engine.generate(text, **options).token_ids
    assert engine.chat(MESSAGES, **options).token_ids == want
    assert engine.generate(MESSAGES, **options).token_ids == want
    assert engine.chat(MESSAGES, enable_thinking=False, **options).token_ids == want


def test_end_token_ends(engine, fake, noise_model):
    e = Engine(noise_model)
    e.owner.core.script = [65, 66, 67, 258, 68, 69]
    g = e.generate([1, 2], max_tokens=9, temperature=0)
    assert (g.text, g.finish_reason, g.stopped_by, g.token_ids) == ("BC", "stop", 258, [66, 67])
    g = e.generate([1, 2], max_tokens=4, temperature=0, ignore_eos=True)
    assert (g.text, g.finish_reason, g.stopped_by) == ("BCD", "length", None)
    assert g.token_ids == [66, 67, 258, 68]


@pytest.mark.parametrize(
    ("stop", "text", "by"),
    [
        ("CD", "B", "CD"),
        ("B", "", "B"),
        (["XY", "DE"], "BC", "DE"),
        (["BCDEF", "DEQ"], "", "BCDEF"),
        ("FGHIJ", "BCDEFGHI", None),  # held back, then the tokens run out
        ("é", "BCDEFGHI", None),
    ],
)
def test_stop_strings_may_span_tokens(fake, noise_model, stop, text, by):
    e = Engine(noise_model)
    e.owner.core.script = list(b"ABCDEFGHIJKL")
    options = {"max_tokens": 8, "temperature": 0, "stop": stop}
    g = e.generate([65, 65], **options)
    assert (g.text, g.stopped_by) == (text, by)
    assert g.finish_reason == ("stop" if by else "length")
    assert "".join(p.text for p in e.stream([65, 65], **options)) == text


def test_stop_matcher_in_all_cuts():
    """However the text is cut, what comes out is the text before the first stop string."""
    text, stops = "aabaabaaabab", ["aaab", "bab"]
    want = text[: min(text.find(s) for s in stops)]
    for cut in range(1 << (len(text) - 1)):
        matcher, out, hit, piece = StopMatcher(stops), "", None, ""
        for i, c in enumerate(text):
            piece += c
            if cut >> i & 1 or i == len(text) - 1:
                shown, hit = matcher.feed(piece)
                out, piece = out + shown, ""
                if hit:
                    break
        assert (out, hit) == (want, "aaab")


def test_a_cut_character_is_flushed_at_the_end(fake, noise_model):
    e = Engine(noise_model)
    e.owner.core.script = [65, 0xC3, 0xA9, 0xE6, 0x97, 66]
    pieces = list(e.stream([1], max_tokens=5, temperature=0))
    assert [p.text for p in pieces] == ["A", "", "é", "", "�"]


def test_context_ends_the_text(noise_model):
    with Engine(noise_model, context=16) as e:
        g = e.generate([1] * 10, max_tokens=100, ignore_eos=True)
        assert (g.finish_reason, g.usage.completion_tokens) == ("length", 7)
        assert e.generate([1] * 16, max_tokens=9, ignore_eos=True).usage.completion_tokens == 1
        with pytest.raises(ArgumentError, match="17 tokens, the context holds 16"):
            e.generate([1] * 17)
        with pytest.raises(ArgumentError, match="context of 16"):
            e.logits([1] * 17)


def test_prefill_progress(noise_model):
    with Engine(noise_model, prefill_chunk=4) as e:
        seen = []
        e.generate([1] * 10, max_tokens=1, progress=lambda *a: seen.append(a))
        assert seen == [(4, 10), (8, 10), (10, 10)]


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        ([], "at least one"), ("", "at least one"), ([1.5], "integers"), ([[1]], "list"),
        ([-1], "token id -1 is not in 0..319"), ([320], "token id 320"), (["a"], "integers"),
        ([True, False], "integers"), (np.zeros(3), "integers"),
    ],
)  # fmt: skip
def test_bad_prompts_are_refused(engine, prompt, match):
    with pytest.raises(ArgumentError, match=match):
        engine.generate(prompt)


def test_bad_options_are_refused_before_anything_runs(engine):
    for call in (engine.generate, engine.stream, lambda p, **o: engine.chat(MESSAGES, **o)):
        with pytest.raises(ArgumentError, match=r"'max_token'.*'max_tokens'"):
            call("x", max_token=3)
        with pytest.raises(ArgumentError, match="temperature"):
            call("x", temperature=-1)
    with pytest.raises(ArgumentError, match="need messages"):
        engine.generate("x", tools=[{}])
    with pytest.raises(ArgumentError, match="list of"):
        engine.chat("Hello")


def test_logits_in_chunks_equal_whole(noise_model, engine):
    ids = list(range(0, 250, 3))
    want = engine.logits(ids)
    assert want.shape == (84, 320)
    assert want.dtype == np.float32
    for chunk in (1, 3, 64):
        with Engine(noise_model, prefill_chunk=chunk, threads=1) as e:
            assert np.abs(e.logits(ids) - want).max() <= 1e-3


# ---- without a tokenizer ----


def test_token_ids_work_without_a_tokenizer(no_tokenizer):
    with Engine(no_tokenizer) as e:
        g = e.generate([72, 105], max_tokens=5, ignore_eos=True)
        assert len(g.token_ids) == 5
        assert g.text == ""
        assert 258 in e.eos_token_ids
        for call in (
            lambda: e.generate("Hi"),
            lambda: e.chat(MESSAGES),
            lambda: e.generate([1], stop="x"),
            lambda: e.tokenizer,
        ):
            with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
                call()


def test_tokenizer_larger_than_the_vocabulary_is_refused(noise_model, tmp_path):
    import json

    for file in noise_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 400, "content": "<x>"})
    spec["model"]["vocab"] |= {f"q{i}": i for i in range(259, 400)}
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with Engine(tmp_path) as e, pytest.raises(ModelFileError, match="ids up to 400"):
        e.generate("x")


# ---- sessions ----


def test_session_goes_back_and_forth(engine):
    ids = list(range(40, 100))
    rows = engine.logits(ids)
    with engine.session() as s:
        s.prefill(ids[:50])
        assert (s.pos, s.token_ids, s.context) == (50, ids[:50], 512)
        for i in ids[50:]:
            s.step(i)
        assert np.abs(s.logits() - rows[-1]).max() < 1e-3
        for n in (59, 30, 29, 1):
            s.rewind(n)
            assert s.pos == n
            assert np.abs(s.logits() - rows[n - 1]).max() < 1e-3
        s.rewind(0)
        with pytest.raises(StateError, match="no logits"):
            s.logits()
        s.prefill(ids[:20])
        s.checkpoint()
        s.prefill(ids[20:])
        s.rewind(20)
        s.step(ids[20])
        assert np.abs(s.logits() - rows[20]).max() < 1e-3


def test_session_refuses_what_does_not_fit(engine):
    with engine.session() as s:
        s.prefill([1] * 510)
        with pytest.raises(ArgumentError, match="exceed the context of 512"):
            s.prefill([1] * 3)
        assert s.pos == 510
        s.prefill([1, 1])
        with pytest.raises(ArgumentError, match="full"):
            s.step(1)
        for bad in (-1, 513, 1.5, True):
            with pytest.raises(ArgumentError, match="rewind"):
                s.rewind(bad)
    with pytest.raises(StateError, match="session is closed"):
        s.step(1)
    s.close()


def test_session_save_and_load(engine, tmp_path, noise_model):
    path = tmp_path / "s.bin"
    with engine.session() as s:
        s.prefill(list(b"some tokens"))
        want = s.logits()
        s.save(path)
    with engine.session() as s:
        s.prefill([5])
        s.load(path)
        assert s.token_ids == list(b"some tokens")
        assert np.abs(s.logits() - want).max() < 1e-6
    assert os.listdir(tmp_path) == ["s.bin"]
    with Engine(noise_model, experts_per_token=1) as other, other.session() as s:
        s.prefill([5])
        with pytest.raises(ModelFileError, match="another model"):
            s.load(path)
        assert s.token_ids == [5]
    too_long = pytest.raises(ArgumentError, match="11 tokens, the context holds 8")
    with Engine(noise_model, context=8) as small, small.session() as s, too_long:
        s.load(path)


def test_damaged_session_files_are_refused(engine, tmp_path):
    path = tmp_path / "s.bin"
    with engine.session() as s:
        s.prefill([1, 2, 3])
        s.save(path)
        good = path.read_bytes()
        for bad in (b"", b"x" * 100, good[:-1], good + b"x", good[:20], good[:8] + b"\xff" * 90):
            path.write_bytes(bad)
            with pytest.raises(ModelFileError, match=r"s\.bin"):
                s.load(path)
        for at in range(12, len(good), max(1, len(good) // 97)):
            path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises((ModelFileError, ArgumentError)):
                s.load(path)
        assert s.token_ids == [1, 2, 3]
        with pytest.raises(StorageError):
            s.load(tmp_path / "none")
        with pytest.raises(StorageError):
            s.save(tmp_path / "no" / "where")


# ---- limits ----


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"experts_per_token": 0}, ArgumentError, r"experts_per_token=0 must be in 1\.\.8"),
        ({"experts_per_token": 9}, ArgumentError, r"1\.\.8"),
        ({"experts_per_token": 1.0}, ArgumentError, "integer"),
        ({"context": 0}, ArgumentError, r"1\.\.4096"),
        ({"context": 4097}, ArgumentError, r"1\.\.4096"),
        ({"threads": 0}, ArgumentError, "threads"),
        ({"prefill_chunk": 0}, ArgumentError, "prefill_chunk"),
        ({"memory": "lots"}, ArgumentError, "memory='lots'"),
        ({"memory": "1MiB"}, OutOfMemory, "smallest that works is"),
        ({"io": "tape"}, UnsupportedError, "it has: auto, direct, pread"),
        ({"io": "fault"}, UnsupportedError, "it has"),
        ({"backend": "metal"}, UnsupportedError, "not in this build"),
    ],
)
def test_bad_engine_options_are_refused(noise_model, options, error, match):
    with pytest.raises(error, match=match):
        Engine(noise_model, **options)


def test_plan_is_shown_before_loading(noise_model, fake):
    seen = []
    core = fake()
    original = core.Engine.__init__

    def init(self, *args):
        assert seen, "loaded before the plan was shown"
        original(self, *args)

    core.Engine.__init__ = init
    e = Engine(noise_model, memory="1GiB", on_plan=seen.append)
    assert seen == [e.plan]
    assert e.owner.core.opts["n_slots"] == e.plan.n_slots


def test_direct_falls_back_when_the_file_system_refuses(noise_model, fake, monkeypatch):
    monkeypatch.setattr("flashmoe.memory.available_bytes", lambda: (500 << 20, "test"))
    fake(refuse_direct=True)
    e = Engine(noise_model, memory="400MiB")
    assert (e.plan.io, e.plan.io_direct) == ("pread", False)
    assert "no direct reads" in e.plan.io_reason
    assert e.owner.core.opts["io_direct"] is False
    with pytest.raises(UnsupportedError, match="no direct reads"):
        Engine(noise_model, memory="400MiB", io="direct")


def test_fewer_experts_are_named_everywhere(noise_model):
    with Engine(noise_model, experts_per_token=1) as e:
        g = e.generate("Hi", max_tokens=2)
        for report in (e.stats(), e.info):
            assert report["experts_per_token"] == 1
            assert report["trained_experts_per_token"] == 2
        assert (g.experts_per_token, g.trained_experts_per_token) == (1, 2)
        assert "1 experts per token (trained with 2)" in str(e.plan)


def test_further_sessions_take_memory_from_the_slots(noise_model, fake, monkeypatch):
    monkeypatch.setattr("flashmoe.memory.available_bytes", lambda: (500 << 20, "test"))
    fake()
    e = Engine(noise_model, memory="400MiB")
    n = e.plan.n_slots
    first = e.session()
    assert e.owner.core.slots == n
    second = e.session()
    assert n - 8 <= e.owner.core.slots < n
    second.close()
    assert e.owner.core.slots == n
    more = []
    with pytest.raises(OutOfMemory, match=r"session \d+ needs 8.00 MiB more.* 4 must stay"):
        while True:
            more.append(e.session())
    assert e.owner.core.slots >= 4
    assert len(more) > 3
    first.close()
    e.close()


def test_stats_count_and_reset(engine):
    engine.reset_stats()
    engine.generate("Hello", max_tokens=4, ignore_eos=True)
    stats = engine.stats()
    assert stats["hits"] + stats["misses"] > 0
    assert stats["prefill_tokens"] == 5
    assert stats["decode_tokens"] == 3
    engine.reset_stats()
    assert engine.stats()["decode_tokens"] == 0


def test_config_is_read_only(engine):
    assert engine.config["num_experts"] == 8
    with pytest.raises(TypeError):
        engine.config["num_experts"] = 9


# ---- the end of things ----


def test_close_twice_and_use_after_close(noise_model):
    e = Engine(noise_model)
    session = e.session()
    session.prefill([1])
    stream = e.stream("Hello", max_tokens=50, ignore_eos=True)
    next(stream)
    e.close()
    e.close()
    session.close()
    assert repr(e) == "<flashmoe.Engine: closed>"
    for call in (
        lambda: e.generate("x"),
        lambda: e.stream("x"),
        lambda: e.chat(MESSAGES),
        lambda: e.logits([1]),
        lambda: e.session(),
        lambda: e.stats(),
        lambda: session.step(1),
        lambda: session.logits(),
        lambda: next(stream),
    ):
        with pytest.raises(StateError, match="closed"):
            call()


def test_leaving_a_stream_early_leaves_the_engine_usable(engine):
    want = engine.generate("Hello", max_tokens=5, temperature=0).token_ids
    for error in (RuntimeError, KeyboardInterrupt, GeneratorExit):
        with pytest.raises(error):
            for piece in engine.stream("Hello", max_tokens=500):
                raise error(piece.text)
        assert engine.generate("Hello", max_tokens=5, temperature=0).token_ids == want
    stream = engine.stream("Hello", max_tokens=500)
    next(stream)
    stream.close()
    del stream
    assert len(engine.owner._sessions) == 0


def test_a_failed_read_is_raised_and_the_engine_goes_on(noise_model, fake):
    e = Engine(noise_model)
    want = e.generate("Hello", max_tokens=5, temperature=0).token_ids
    for n_before in (0, 1, 3):
        e.owner.core.faults = [None] * n_before + [StorageError(5, "Input/output error", "x.st")]
        pieces = []
        with pytest.raises(StorageError, match="Input/output") as caught:
            for piece in e.stream("Hello", max_tokens=9, temperature=0, ignore_eos=True):
                pieces.append(piece)
        assert caught.value.filename == "x.st"
        assert len(pieces) == n_before
    assert e.generate("Hello", max_tokens=5, temperature=0).token_ids == want


def test_cancel_from_another_thread(noise_model, fake):
    e = Engine(noise_model)
    e.owner.core.delay = 0.02
    timer = threading.Timer(0.15, e.cancel)
    timer.start()
    started = time.perf_counter()
    g = e.generate("Hello", max_tokens=1000, ignore_eos=True)
    timer.join()
    assert g.finish_reason == "cancelled"
    assert 0 < len(g.token_ids) < 50
    assert time.perf_counter() - started < 5
    e.owner.core.delay = 0
    assert e.generate("Hello", max_tokens=3, ignore_eos=True).finish_reason == "length"


def test_cancel_in_the_real_core(engine):
    with engine.session() as s:
        s.cancel()
        with pytest.raises(Cancelled):
            s.prefill([1, 2, 3])
        assert s.pos == 0
        s.prefill([1, 2, 3])
        s.rewind(0)
        stop = threading.Event()

        def nag():
            while not stop.is_set():
                s.cancel()

        thread = threading.Thread(target=nag)
        thread.start()
        with pytest.raises(Cancelled):
            while True:
                s.prefill([1] * 100)
                s.rewind(0)
        stop.set()
        thread.join()


def test_threads_are_serialised(noise_model):
    with Engine(noise_model, threads=2) as e:
        prompts = [f"prompt {i}" for i in range(8)]
        options = {"max_tokens": 12, "temperature": 0}
        want = [e.generate(p, **options).token_ids for p in prompts]
        got = [None] * 8
        failures = []

        def work(i):
            try:
                if i % 2:
                    got[i] = e.generate(prompts[i], **options).token_ids
                else:
                    pieces = list(e.stream(prompts[i], **options))
                    got[i] = [t for p in pieces for t in p.token_ids]
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not failures
        assert got == want


def test_two_streams_at_once(engine):
    options = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
    want = [str(engine.generate(p, **options)) for p in ("one", "two")]
    pairs = list(zip(engine.stream("one", **options), engine.stream("two", **options)))
    assert ["".join(p.text for p in side) for side in zip(*pairs)] == want


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_is_told_so():
    """Using, closing and garbage in the child neither hang nor disturb the parent."""
    done = run_python("""
        import os, gc
        from flashmoe import Engine, StateError
        engine = Engine(threads=2)
        session = engine.session()
        session.prefill([1, 2])
        before = engine.generate("Hello", max_tokens=4, temperature=0).token_ids
        pid = os.fork()
        if pid == 0:
            for call in (lambda: engine.generate("x"), lambda: session.step(1), engine.session):
                try:
                    call()
                except StateError as e:
                    assert "forked child" in str(e), e
                else:
                    os._exit(1)
            session.close()
            engine.close()
            del session, engine, call
            gc.collect()
            with Engine(threads=2) as own:  # a new one works there
                assert own.generate("Hello", max_tokens=4, temperature=0).token_ids == before
            raise SystemExit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
        assert engine.generate("Hello", max_tokens=4, temperature=0).token_ids == before
        session.step(3)
        engine.close()
        print("fine")
    """)
    assert (done.stdout, done.returncode) == ("fine\n", 0), done.stderr


def test_exit_without_close_is_clean():
    done = run_python("""
        from flashmoe import Engine
        engine = Engine(threads=2)
        session = engine.session()
        stream = engine.stream("Hello", max_tokens=50)
        next(stream)
    """)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)


def test_importing_is_cheap():
    done = run_python("""
        import sys, flashmoe
        heavy = {"numpy", "tokenizers", "jinja2", "rich", "typer", "flashmoe._core"}
        print(sorted(heavy & set(sys.modules)))
    """)
    assert done.stdout == "[]\n", done.stderr


def test_exports():
    for name in flashmoe.__all__:
        assert getattr(flashmoe, name) is not None
    assert dir(flashmoe) == flashmoe.__all__
    with pytest.raises(AttributeError, match="nonsense"):
        flashmoe.nonsense  # noqa: B018
    assert SamplingConfig().max_tokens == 256


def test_numeric_mode_follows_format(tmp_path):
    from make_synthetic import make

    make(tmp_path / "wide", hidden=1024, layers=4, experts=4, top_k=2, width=64, vocab=64)
    make(tmp_path / "narrow", hidden=512, layers=4, experts=4, top_k=2, width=64, vocab=64)
    make(tmp_path / "plain", form="hf", hidden=1024, layers=4, experts=4, top_k=2, width=64, vocab=64)
    modes = {}
    for name in ("wide", "narrow", "plain"):
        with Engine(tmp_path / name) as engine:
            modes[name] = engine.plan.numeric
            assert engine.info["numeric"] == modes[name]
    assert modes == {"wide": "fast", "narrow": "fast", "plain": "exact"}
    with Engine(tmp_path / "wide", numeric="exact") as engine:
        assert engine.plan.numeric == "exact"
