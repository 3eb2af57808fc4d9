"""Opening, closing, leaving early, interrupts, forks and threads: no crash, no hang, no leak.

The public face of these is in ``test_engine_api.py``; here they strike the core and the processes.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from engines import core_desc, core_engine, ids_of, run

from flashmoe import Engine, _core
from flashmoe.errors import Cancelled, FlashMoeError, StateError

NAME = "q3moe"
SLOW = {"slots": None, "io_method": "fault", "io_fault": "delay=1000us"}
TESTS = Path(__file__).resolve().parent


def in_python(code: str, *args: str, timeout: float = 60, **kw) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter that dies of warnings and reports crashes."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"},
        **kw,
    )


# ---- closing ----


def test_close_twice_and_use_after_close():
    engine = _core.Engine(core_desc(NAME), {"context": 64})
    session = engine.session()
    session.prefill(ids_of(NAME, "p24"))
    session.close()
    session.close()
    for call in (
        lambda: session.step(1),
        lambda: session.prefill(ids_of(NAME, "p1")),
        session.logits,
        lambda: session.rewind(0),
        session.checkpoint,
        session.save,
        lambda: session.load(b""),
        session.cancel,
        lambda: session.pos,
        lambda: session.context,
        lambda: engine.forward([session], [ids_of(NAME, "p1")]),
    ):
        with pytest.raises(StateError, match="session is closed"):
            call()
    engine.close()
    engine.close()
    for call in (
        engine.session,
        engine.stats,
        engine.reset_stats,
        lambda: engine.set_slots(8),
        lambda: engine.forward([], []),
        lambda: engine.info,
    ):
        with pytest.raises(StateError, match="engine is closed"):
            call()


def test_sessions_outlive_the_engine():
    """As handles: they answer StateError, and freeing them later is fine, in any order."""
    with core_engine(NAME) as engine:
        sessions = [engine.session() for _ in range(4)]
        for s in sessions:
            s.prefill(ids_of(NAME, "p24"))
        sessions[1].close()
    first = sessions[0]
    for call in (lambda: first.step(1), first.save, lambda: first.rewind(0)):
        with pytest.raises(StateError, match="engine is closed"):
            call()
    assert first.pos == 24
    sessions[2].close()
    del engine
    gc.collect()
    with pytest.raises(StateError):
        sessions[3].step(1)
    sessions.clear()
    gc.collect()


def test_a_session_keeps_its_engine():
    engine = _core.Engine(core_desc(NAME), {"context": 64})
    session = engine.session()
    del engine
    gc.collect()
    session.prefill(ids_of(NAME, "p24"))
    assert session.pos == 24


def test_a_failed_open_leaves_nothing(tmp_path):
    """Errors at every stage of opening: descriptors and threads are as before."""
    before = footprint()
    good = core_desc(NAME)
    gone = {**core_desc(NAME), "files": [(str(tmp_path / "gone"), good["files"][0][1])]}
    for desc, opts in [
        (gone, {}),
        ({**core_desc(NAME), "arch": "nosuch"}, {}),
        (core_desc(NAME), {"n_slots": 1}),
        (core_desc(NAME), {"io_method": "nosuch"}),
        (core_desc(NAME), {"backend": "nosuch"}),
        (core_desc(NAME), {"context": 0}),
        (core_desc(NAME), {"io_method": "fault", "io_fault": "melt@1"}),
    ]:
        with pytest.raises(FlashMoeError):
            _core.Engine(desc, {"context": 64, **opts})
    with core_engine(NAME) as engine:
        for _ in range(20):
            with pytest.raises(FlashMoeError):
                engine.session(context=1 << 60)
    assert footprint() == before


def footprint() -> tuple[int, int]:
    """Open descriptors and threads of this process; -1 where the system does not tell."""
    fds, tasks = Path("/proc/self/fd"), Path("/proc/self/task")
    return (
        len(list(fds.iterdir())) if fds.exists() else -1,
        len(list(tasks.iterdir())) if tasks.exists() else threading.active_count(),
    )


def resident() -> int:
    """Resident bytes now; 0 where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def test_fifty_times_open_and_closed():
    """Neither memory nor threads nor descriptors grow."""

    def once():
        with core_engine(NAME, slots=None) as engine:
            session = engine.session()
            session.prefill(ids_of(NAME, "p24"))
            session.step(1)

    for _ in range(10):
        once()
    gc.collect()
    before, held = footprint(), resident()
    for _ in range(50):
        once()
    gc.collect()
    assert footprint() == before
    assert resident() - held < 2 << 20, "each engine takes more than 1 MiB"


def test_public_engine_fifty_times(noise_model):
    def once():
        with Engine(noise_model, memory="1GiB", context=64, threads=2) as engine:
            engine.generate([1, 2, 3], max_tokens=2, ignore_eos=True)

    for _ in range(5):
        once()
    gc.collect()
    before, held = footprint(), resident()
    for _ in range(20):
        once()
    gc.collect()
    assert footprint() == before
    assert resident() - held < 4 << 20


# ---- threads ----


def test_four_threads_are_serialised_and_right():
    ids = ids_of(NAME, "p64")
    with core_engine(NAME) as engine:
        want = [run(engine, ids[i : i + 20], chunk=4)[0] for i in range(4)]
    results: dict[int, np.ndarray] = {}
    with core_engine(NAME, slots=None) as engine:

        def work(i):
            for _ in range(5):
                results[i] = run(engine, ids[i : i + 20], chunk=4)[0]
                engine.stats()
                engine.info  # noqa: B018

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert engine.stats()["n_forwards"] == 4 * 5 * 5
    for i in range(4):
        np.testing.assert_array_equal(results[i], want[i])


@pytest.mark.parametrize("what", ["session", "engine"])
def test_closing_waits_for_calls_of_other_threads(what):
    """Three threads in prefill, one in stats; close from a fifth: each ends with StateError."""
    ids = ids_of(NAME, "p24")
    for delay in (0.0, 0.01, 0.05):
        with core_engine(NAME, **SLOW, context=100_000) as engine:
            sessions = [engine.session() for _ in range(2)]
            ended = []

            def work(call, ended=ended):
                try:
                    while True:
                        call()
                except FlashMoeError as e:
                    ended.append(type(e))

            calls = [lambda s=s: s.prefill(ids) for s in (sessions[0], sessions[0], sessions[1])]
            threads = [threading.Thread(target=work, args=(c,)) for c in [*calls, engine.stats]]
            for t in threads:
                t.start()
            time.sleep(delay)
            for closing in sessions if what == "session" else [engine]:
                closing.close()
            if what == "session":
                time.sleep(0.02)
                engine.close()
            for t in threads:
                t.join()
            assert ended == [StateError] * 4


def test_cancel_is_not_kept_waiting_by_other_calls():
    """A thread waits for the engine inside the core; Python and with it `cancel` go on."""
    ids = ids_of(NAME, "p24")
    with core_engine(NAME, **{**SLOW, "io_fault": "delay=30000us", "io_workers": 1}) as engine:
        session, errors = engine.session(), []

        def work():
            try:
                session.prefill(ids)
            except Cancelled as e:
                errors.append(e)

        running = threading.Thread(target=work)
        running.start()
        time.sleep(0.05)
        waiting = threading.Thread(target=engine.stats)
        waiting.start()
        t0 = time.monotonic()
        session.cancel()
        waiting.join()
        running.join()
        assert time.monotonic() - t0 < 1
        assert len(errors) == 1


# ---- leaving in the middle ----


def test_exception_in_the_consumer_of_stream(noise_model):
    with Engine(noise_model, memory="1GiB", context=64, threads=1) as engine:
        want = engine.generate([1, 2, 3], max_tokens=6, temperature=0, ignore_eos=True).token_ids
        for _ in range(20):
            with pytest.raises(ZeroDivisionError):
                for i, _piece in enumerate(engine.stream([1, 2, 3], max_tokens=6, ignore_eos=True)):
                    1 / (2 - i)
        gc.collect()
        again = engine.generate([1, 2, 3], max_tokens=6, temperature=0, ignore_eos=True)
        assert again.token_ids == want
        assert len(engine.owner._sessions) == 0


@pytest.mark.skipif(os.name != "posix", reason="SIGINT as POSIX has it")
def test_keyboard_interrupt_while_generating(noise_model):
    """Python's own KeyboardInterrupt; afterwards the same engine gives the right tokens."""
    result = subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-W", "error", "-c", INTERRUPTED, str(noise_model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(TESTS.parent)},
    )
    try:
        assert result.stdout.readline() == "running\n", result.stderr.read()
        for _ in range(3):
            time.sleep(0.15)
            result.send_signal(signal.SIGINT)
            assert result.stdout.readline() == "interrupted\n", result.stderr.read()
        assert result.stdout.readline() == "same\n", result.stderr.read()
        assert (result.wait(30), result.stderr.read()) == (0, "")
    finally:
        result.kill()
        result.communicate()


INTERRUPTED = """
import signal, sys
from flashmoe import Engine

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

with Engine(sys.argv[1], memory="1GiB", context=4096, threads=1) as engine:
    def few():
        return engine.generate([1, 2, 3], max_tokens=8, temperature=0, ignore_eos=True).token_ids

    want = few()
    for i in range(3):
        try:
            if i == 0:
                print("running", flush=True)
            while True:
                engine.generate([1, 2, 3], max_tokens=4000, ignore_eos=True)
        except KeyboardInterrupt:
            assert few() == want
            print("interrupted", flush=True)
    print("same")
"""


# ---- forks and exits ----

FORK = """
import os, sys, threading
from engines import core_engine, ids_of, run
import numpy as np
from flashmoe.errors import StateError

with core_engine("q3moe", slots=None) as engine:
    ids = ids_of("q3moe", "p24")
    want, session = run(engine, ids)
    background = threading.Thread(target=lambda: [engine.session().prefill(ids) for _ in range(30)])
    if sys.argv[1] == "busy":  # the engine's lock is held by another thread at the fork
        background.start()
    pids = []
    for _ in range(5):
        pid = os.fork()
        if pid == 0:
            refused = 0
            for call in (lambda: session.step(1), session.save, engine.stats, engine.session):
                try:
                    call()
                except StateError as e:
                    refused += "forked child" in str(e)
            session.close()
            engine.close()
            if sys.argv[2] == "exit":
                sys.exit(40 + refused)  # with all destructors
            os._exit(40 + refused)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    assert codes == [44] * 5, codes
    if sys.argv[1] == "busy":
        background.join()
    np.testing.assert_array_equal(run(engine, ids)[0], want)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("state", ["idle", "busy"])
@pytest.mark.parametrize("end", ["exit", "_exit"])
def test_fork(state, end):
    """The child is told and ends clean; the parent goes on with the right numbers."""
    quiet = "import warnings; warnings.simplefilter('ignore', DeprecationWarning)\n"  # 3.12 warns
    result = in_python(quiet + FORK, state, end)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("threads", [0, 2])
def test_exit_with_everything_open(threads):
    """Interpreter exit with engines, sessions and running daemon threads around."""
    code = """
    import sys, threading, time
    from engines import core_desc, ids_of
    from flashmoe import _core
    engine = _core.Engine(core_desc("q3moe"), {"context": 100_000})
    sessions = [engine.session() for _ in range(3)]
    sessions[0].prefill(ids_of("q3moe", "p24"))
    def work(s):
        while True:
            s.prefill(ids_of("q3moe", "p64"))
    for s in sessions[1:1 + int(sys.argv[1])]:
        threading.Thread(target=work, args=(s,), daemon=True).start()
    time.sleep(0.05)
    """
    for _ in range(3):
        result = in_python(code, str(threads))
        assert result.returncode == 0, result.stderr
        said = set(re.findall(r"^flashmoe\.errors\.(\w+)", result.stderr, re.M))
        assert said <= {"Cancelled", "StateError"}
        assert threads or not result.stderr
