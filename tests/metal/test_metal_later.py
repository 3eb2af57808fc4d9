"""One recording that stops for the host: events, experts named while it runs, failures in between.

The same experts as one plain call and as two later ones, whose jobs the host sets while the device
waits: every bit must agree, in every mode of the stand-in.
"""

import ctypes as C

import hostlib as H
import numpy as np
import pytest
from conftest import HERE, assert_clean, in_child, run_child, run_tests
from oracle_metal import Matrix
from test_metal_backend import expert_case, put, rand
from test_metal_host import BACKEND, STATE, counters

ARG, SLOTS, PART_BYTES = -10, 1, 640
HIDDEN, WIDTH = 96, 64


@pytest.fixture
def metal():
    with H.Backend("metal") as b:
        yield b
    assert H.MAC or b.lib.fake_metal_live() == 0, "objects of the stand-in are still alive"


def told(b):
    value = C.c_uint64()
    b.tell(C.byref(value))
    return value.value


def held(b):
    value = C.c_uint64()
    b.hold(C.byref(value))
    return value.value


def wait_for(b, value):
    getattr(b, "await")(value)


def make_jobs(mats, rows_of, places):
    jobs = (H.ExpertJob * len(mats))()
    for job, mat, rows, at in zip(jobs, mats, rows_of, places):
        job.gate, job.up, job.down = mat
        job.rows, job.n, job.out0 = rows.ctypes.data, len(rows), at
    return jobs


def least_aligned(mats):
    """A matrix like all of these, whose addresses are as badly aligned as the worst of each."""
    out = H.Mat.from_buffer_copy(mats[0])
    for area in ("codes", "scales", "biases"):
        low = 0
        for m in mats:
            low |= (getattr(m, area) or 0) % 64
        setattr(out, area, 4096 + low if getattr(out, area) else None)
    return out


class Case:
    """Experts in slots, scratch, and what was recorded for them later."""

    def __init__(self, b, ws, x, rows_of, aligned=False):
        self.b, self.rows_of, self.n_part = b, rows_of, sum(map(len, rows_of))
        step = 0 if aligned else 3
        self.mats = [[put(b, w, step * i, SLOTS) for w in e] for i, e in enumerate(ws)]
        self.places = np.cumsum([0] + [len(r) for r in rows_of])[:-1]
        self.jobs = make_jobs(self.mats, rows_of, self.places)
        self.x = b.array(x)
        self.gate, self.up = b.empty((self.n_part, WIDTH)), b.empty((self.n_part, WIDTH))
        self.out = b.empty((self.n_part, HIDDEN))

    def plain(self):
        self.out[:] = np.nan
        a = H.ExpertArgs(*map(H.address, [self.x]), len(self.x), C.cast(self.jobs, H.P),
                         len(self.jobs), *map(H.address, (self.gate, self.up, self.out)))  # fmt: skip
        self.b.experts(C.byref(a))
        self.b.sync()
        return self.out.copy()

    def later(self):
        """Arguments for experts_later, with a table of their own."""
        table = self.b.empty((self.n_part, PART_BYTES), "u1")
        like = [least_aligned([m[i] for m in self.mats]) for i in range(3)]
        return H.ExpertLater(H.address(self.x), len(self.x), *like,
                             *map(H.address, (self.gate, self.up, self.out)),
                             len(self.jobs), self.n_part, H.address(table))  # fmt: skip

    def set(self, later, which):
        some = (H.ExpertJob * max(1, len(which)))(*[self.jobs[i] for i in which])
        self.b.set_jobs(C.byref(later), C.cast(some, H.P), len(which))


def make(b, fmt, counts, aligned=False, **kw):
    rng = np.random.default_rng(sum(counts))
    rows_of = [rng.integers(0, 40, n).astype(np.int32) for n in counts]
    ws, x = expert_case(rng, fmt, HIDDEN, WIDTH, len(counts), rows_of, **kw)
    return Case(b, ws, x, rows_of, aligned)


def run_twice(case, first, second):
    """Two "layers" in one recording, the jobs of the second in the other order; their outputs."""
    b, stages = case.b, (case.later(), case.later())
    copy = b.empty(case.out.shape)
    b.begin()
    points = []
    for layer in range(2):
        a = told(b)
        holds = []
        for s in stages:
            holds.append(held(b))
            b.experts_later(C.byref(s))
        if layer == 0:  # y += x of one row: a plain op between
            copy[:] = 0
            b.add_gated(H.address(case.out), None, H.address(copy), *case.out.shape)
        points.append((a, holds))
    end = told(b)
    b.flush()
    for (a, holds), order in zip(points, ((first, second), (second, first))):
        wait_for(b, a)
        for s, hold, which in zip(stages, holds, order):
            case.set(s, which)
            b.post(hold)
    wait_for(b, end)
    b.sync()
    return copy.copy(), case.out.copy()


@pytest.mark.parametrize("aligned", [False, True], ids=["any", "aligned"])
@pytest.mark.parametrize("fmt", ["affine3", "affine4", "f32", "bf16"])
@pytest.mark.parametrize("counts", [[1] * 6, [1, 4, 2], [9, 1, 33, 5]], ids=str)
def test_later_equals_plain(metal, fmt, counts, aligned):
    """Few rows, many rows, both at once; jobs split over two stages in one command buffer."""
    case = make(metal, fmt, counts, aligned)
    want = case.plain()
    before = counters(metal)
    n = len(counts)
    got = run_twice(case, [n - 1, *range(0, n - 1, 2)], list(range(1, n - 1, 2)))
    assert np.array_equal(want, got[0])
    assert np.array_equal(want, got[1])
    after = counters(metal)
    assert after["command_buffers"] - before["command_buffers"] == 1
    assert (after["events"] - before["events"], after["awaits"] - before["awaits"]) == (7, 3)


@pytest.mark.parametrize("n", [1, 9])
def test_later_of_three_formats(metal, n):
    """gate and up that cannot share a pass: SwiGLU is a dispatch of its own for all rows."""
    rng = np.random.default_rng(n)
    ws = [[Matrix(rng, WIDTH, HIDDEN, "affine3", 32), Matrix(rng, WIDTH, HIDDEN, "affine6", 32),
           Matrix(rng, HIDDEN, WIDTH, "affine5", 64)] for _ in range(3)]  # fmt: skip
    rows = [np.arange(n, dtype=np.int32), np.array([n - 1], np.int32), np.arange(n, dtype=np.int32)]
    case = Case(metal, ws, rand(rng, n, HIDDEN), rows)
    want = case.plain()
    assert all(np.array_equal(want, g) for g in run_twice(case, [2, 0], [1]))


def test_combine_and_marks_read_late(metal):
    """combine's lists are filled after recording; marks say which rows are not finite."""
    case = make(metal, "affine4", [1, 2])
    y, marks = metal.array(np.ones((2, HIDDEN), "f4")), metal.array(np.full(3, 7, "u4"), skip=64)
    start, index = metal.array(np.zeros(3, "i4")), metal.array(np.zeros(3, "i4"))
    weight = metal.array(np.zeros(3, "f4"))
    later = case.later()
    case.out[:] = 0
    hold = held(metal)
    metal.experts_later(C.byref(later))
    metal.combine(C.byref(H.CombineArgs(H.address(y), 2, HIDDEN, *map(H.address, (case.out, start,
                                        index, weight)), 3)))  # fmt: skip
    metal.mark_nonfinite(H.address(case.out), 3, HIDDEN, H.address(marks))
    metal.flush()
    case.x[case.rows_of[1][1]] = np.inf  # part 2 alone reads this row
    assert case.rows_of[1][1] not in (case.rows_of[0][0], case.rows_of[1][0])
    case.set(later, [0, 1])
    start[:], index[:], weight[:] = [0, 1, 2], [1, 0, 0], [0.5, 2, 0]
    metal.post(hold)
    metal.sync()
    assert marks.tolist() == [0, 0, 1]
    assert np.allclose(y, 1 + case.out[[1, 0]] * np.array([[0.5], [2]]), rtol=1e-6)


def test_no_jobs_until_they_are_set(metal):
    """A recording that the host gives up runs to its end and computes no expert."""
    case = make(metal, "affine4", [1, 5])
    case.out[:] = 3
    a = told(metal)
    last = [held(metal) for _ in range(2)][1]
    later = case.later()
    metal.experts_later(C.byref(later))
    metal.flush()
    wait_for(metal, a)
    metal.post(last)  # the first hold is over too
    metal.post(last)
    metal.sync()
    assert (case.out == 3).all()


def test_refused_jobs(metal):
    """What the recorded kernels would misread; after the error no job is left in the table."""
    case = make(metal, "affine4", [1, 5], aligned=True)
    other = put(metal, Matrix(np.random.default_rng(0), WIDTH, HIDDEN, "affine8", 32), 0, SLOTS)
    crooked = put(metal, Matrix(np.random.default_rng(0), WIDTH, HIDDEN, "affine4", 32), 2, SLOTS)
    later = case.later()
    hold = held(metal)
    metal.experts_later(C.byref(later))
    metal.flush()
    case.out[:] = 3

    def refused(message, **change):
        jobs = (H.ExpertJob * 3)(case.jobs[0], case.jobs[1], case.jobs[0])
        n = change.pop("n_jobs", 2)
        for field, value in change.items():
            setattr(jobs[1], field, value)
        with pytest.raises(H.BackendError, match=message) as e:
            metal.set_jobs(C.byref(later), C.cast(jobs, H.P), n)
        assert e.value.status == ARG

    refused("3 jobs, recorded for 2", n_jobs=3)
    refused("affine8 .64, 96. is unlike the recorded affine4 .64, 96.", up=other)
    refused("is unlike the recorded", gate=crooked)
    refused("is unlike the recorded", down=case.jobs[0].gate)
    n_x = len(case.x)
    refused(f"{n_x + 1} rows of {n_x}, to parts from 1 on of 6", n=n_x + 1)
    refused("5 rows of .*, to parts from 2 on of 6", out0=2)
    outside = H.Mat.from_buffer_copy(case.jobs[0].gate)
    outside.codes = 4096
    refused("is not in memory of the backend", gate=outside)
    metal.post(hold)
    metal.sync()
    assert (case.out == 3).all()
    later.n_jobs = 7
    with pytest.raises(H.BackendError, match="7 jobs with 6 rows together"):
        metal.experts_later(C.byref(later))


# ---- failures while both sides wait for each other


def start_waiting(b):
    """A recording with a tell, an op, a hold and a tell, submitted; returns their values."""
    x = b.array(np.ones((1, 64), "f4"))
    values = [told(b)]
    b.clip(H.address(x), 64, 1.0)
    values += [held(b), told(b)]
    b.flush()
    return values


def test_failed_device_wakes_the_host(metal, monkeypatch):
    monkeypatch.setenv("FAKE_METAL_FAIL", "1")
    monkeypatch.setenv("FAKE_METAL_FAIL_AT", "2")
    a, b, c = start_waiting(metal)
    wait_for(metal, a)  # told before the failure
    metal.post(b)
    with pytest.raises(H.BackendError, match="a command buffer failed: planted failure") as e:
        wait_for(metal, c)
    assert e.value.status == BACKEND
    with pytest.raises(H.BackendError, match="failed before") as e:
        wait_for(metal, c)
    assert e.value.status == STATE


def test_a_value_that_nobody_tells(metal):
    a, b, c = start_waiting(metal)
    metal.post(b)
    wait_for(metal, c)
    with pytest.raises(H.BackendError, match="ended without reaching its event"):
        wait_for(metal, c + 1)


def child(body, **env):
    """Run a script that may end badly: after the imports, `b` is a backend."""
    head = f"""
import os, sys
os.environ.update({env!r})
sys.path.insert(0, {str(HERE)!r})
import hostlib as H, numpy as np
from test_metal_later import *
b = H.Backend("metal")
b.lib.fm_metal_timeout_set(1)
"""
    return run_child(["-c", head + body + "\nos._exit(0)\n"], None, timeout=100)


TRY = """
start = start_waiting(b)
try:
    {call}
except H.BackendError as e:
    print("said:", e, flush=True)
"""


@in_child
@pytest.mark.parametrize(
    ("call", "env", "message"),
    [
        ("wait_for(b, start[2])", {}, "did not reach its event within 1 s"),
        ("wait_for(b, start[2])", {"FAKE_METAL_LATE": "1"}, "did not reach its event within 1 s"),
        ("wait_for(b, start[0])", {"FAKE_METAL_HANG": "1"}, "did not reach its event within 1 s"),
        ("b.sync()", {}, "did not finish within 1 s"),
        ("b.sync()", {"FAKE_METAL_EVENT_MS": "100"}, "failed: timed out waiting for value 1 of an"),
    ],
)
def test_forgotten_turns(call, env, message):
    """A hold that is never posted, a tell that never comes: an error within the time-out."""
    status, output = child(TRY.format(call=call), **env)
    assert status == 0, output
    assert message in output


@in_child
def test_stand_in_stops_falling_values():
    """A signal below the event's value, which Metal leaves undefined, ends the program here."""
    status, output = child("b.lib.fake_metal_fall()")
    assert status != 0
    assert "an event's value goes from 2 to 1" in output


SUBSET = "(later_equals and affine4 and any) or three or combine or no_jobs or refused"


@in_child
@pytest.mark.parametrize(
    "env", [{"FAKE_METAL_LATE": "1"}, {"FAKE_METAL_LATE": "1", "FAKE_METAL_PROTECT": "1"}],
    ids=["late", "protect"],
)  # fmt: skip
def test_strict_modes(env):
    """Late: the device does as little as the host's waits ask for. Protect: undeclared is a crash."""
    status, output = run_tests("", __file__, "-k", SUBSET, env=env)
    assert status == 0, output[-5000:]


@in_child
@pytest.mark.slow
@pytest.mark.parametrize("san", ["address", "undefined", "thread"])
def test_sanitizers(san):
    status, output = run_tests(san, __file__, "-k", SUBSET)
    assert_clean(status, output)
