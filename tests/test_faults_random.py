"""Random faults, slots, methods and guesses: the right logits or the right exception, nothing else."""

from __future__ import annotations

import random
import threading

import engines
import numpy as np
import pytest
from engines import core_engine, ids_of

from flashmoe import _core
from flashmoe.errors import Cancelled, ModelFileError, StorageError

MODEL = "q35moe_base/mlx4"
WATCHDOG_SECONDS = 60


def script(rng: random.Random) -> tuple[str, set[type]]:
    """Return a fault script and the exceptions it may cause; harmless faults cause none."""
    items, may = [], set()
    if rng.random() < 0.5:
        items.append(f"short%{rng.randint(2, 9)}")
    if rng.random() < 0.3:
        items.append(f"delay={rng.randint(1, 300)}us")
    if rng.random() < 0.5:
        items += ["reorder", f"seed={rng.randint(1, 10**6)}"]
    if rng.random() < 0.6:
        items.append(f"eio@{rng.randint(1, 900)}")
        may.add(StorageError)
    if rng.random() < 0.2:
        items.append(f"eof@{rng.randint(1, 900)}")
        may.add(StorageError)
    base = rng.choice([m for m in _core.io_methods() if m != "fault"])
    return f"{base}:{','.join(items or ['seed=1'])}", may


@pytest.fixture(scope="module")
def right():
    """The logits after the prompt and after each of six greedy steps."""
    with core_engine(MODEL, n_threads=1, max_rows=64) as e:
        return run_chunks(e.session(), 64, None)


def one_run(seed: int, right: np.ndarray) -> str:
    """Open, run, and go on after each failure until it works; return what happened."""
    rng = random.Random(seed)
    fault, may = script(rng)
    options = {
        "slots": rng.choice([4, 5, 9, 17, 40, "all"]),
        "n_threads": rng.choice([1, 2]),
        "max_rows": rng.choice([5, 24, 64]),
        "lookahead": rng.choice([0, 2, -1]),
        "cache_policy": rng.choice(_core.cache_policies()),
        "split_bytes": rng.choice([0, 4096]),
        "io_direct": rng.random() < 0.5 and not fault.startswith("mmap"),
    }
    seen = "right"
    with core_engine(MODEL, io_method="fault", io_fault=fault, **options) as e:
        for _ in range(8):
            session = e.session()
            canceller = None
            if rng.random() < 0.2:
                canceller, may = session.cancel, may | {Cancelled}
            try:
                got = run_chunks(session, options["max_rows"], canceller)
            except (StorageError, ModelFileError, Cancelled) as error:
                if type(error) not in may:
                    raise AssertionError(f"seed {seed}: {fault}") from error
                seen = type(error).__name__
            else:
                np.testing.assert_allclose(got, right, atol=2e-5, err_msg=f"seed {seed}: {fault}")
                assert e.stats()["hits"] + e.stats()["misses"] > 0
                return seen
            finally:
                session.close()
    raise AssertionError(f"seed {seed}: {fault}: never worked again")


def run_chunks(session, max_rows: int, canceller) -> np.ndarray:
    ids = ids_of(MODEL, "p24")
    for start in range(0, len(ids), max_rows):
        session.prefill(ids[start : start + max_rows])
    rows = [session.logits()]
    for _ in range(6):
        if canceller is not None:
            threading.Thread(target=canceller).start()
            canceller = None
        session.step(int(rows[-1].argmax()))
        rows.append(session.logits())
    return np.array(rows)


def watched(seeds: range, right: np.ndarray) -> dict[str, int]:
    """Run in a thread, so that a deadlock fails the test instead of hanging it."""
    outcome: dict[str, int] = {}
    failure: list[BaseException] = []

    def work() -> None:
        try:
            for seed in seeds:
                what = one_run(seed, right)
                outcome[what] = outcome.get(what, 0) + 1
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    done = 0
    while thread.is_alive():
        thread.join(WATCHDOG_SECONDS)
        now = sum(outcome.values())
        assert not thread.is_alive() or now > done, f"no run ended in {WATCHDOG_SECONDS} s"
        done = now
    if failure:
        raise failure[0]
    return outcome


def test_random_faults(right):
    n = 15 if engines.STAND_IN else 60
    outcome = watched(range(n), right)
    assert sum(outcome.values()) == n
    assert outcome["right"] >= n // 6
    assert outcome["StorageError"] >= n // 12


@pytest.mark.slow
def test_a_thousand_random_faults(right):
    outcome = watched(range(1000, 2000), right)
    assert sum(outcome.values()) == 1000
    assert min(outcome["right"], outcome["StorageError"], outcome["Cancelled"]) >= 20


@pytest.mark.parametrize("numeric", ["exact", "fast"])
@pytest.mark.parametrize("slots", [4, 17, "all"])
def test_decode_allocates_nothing_after_the_first_token(slots, numeric):
    with core_engine(MODEL, slots=slots, numeric=numeric, lookahead=2, max_rows=64) as e:
        session = e.session()
        session.prefill(ids_of(MODEL, "p24"))
        session.step(1)
        before = _core.internals.n_allocs()
        for token in range(2, 8 if engines.STAND_IN else 40):
            session.step(token)
        assert _core.internals.n_allocs() == before
