"""The governor with made-up readings: when it shrinks, when it grows, what it reads."""

from __future__ import annotations

import pytest

from flashmoe import Engine
from flashmoe.governor import Governor, Limits, Pressure, decide, governor_of, read_pressure, tick

MIB = 1 << 20
LIMITS = Limits(low_bytes=100 * MIB, high_bytes=200 * MIB, calm_readings=3, period_seconds=2.0)


def choose(free, n_slots=800, *, stalled=0.0, level=1, n_calm=0, n_min=8, n_max=800):
    return decide(
        Pressure(free * MIB, 0, level), stalled, n_slots,
        n_min=n_min, n_max=n_max, slot_bytes=MIB, n_calm=n_calm, limits=LIMITS,
    )  # fmt: skip


def test_quiet_between_the_marks():
    assert choose(150) == (800, 0)
    assert choose(150, 400, n_calm=2) == (400, 0)


def test_gives_back_what_is_missing_and_at_least_an_eighth():
    assert choose(99) == (700, 0)
    assert choose(0, 200) == (100, 0)
    assert choose(0, 100, n_min=40) == (40, 0)


def test_stalls_count_unless_memory_is_plentiful():
    assert choose(150, stalled=0.2) == (700, 0)
    assert choose(90, stalled=0.2) == (600, 0)  # both: critical
    assert choose(5000, stalled=0.2)[0] == 800


def test_levels_of_macos():
    assert choose(5000, level=2) == (700, 0)
    assert choose(5000, level=4) == (600, 0)


def test_grows_after_calm_in_steps_that_leave_enough():
    assert choose(1000, 400, n_calm=0) == (400, 1)
    assert choose(1000, 400, n_calm=1) == (400, 2)
    assert choose(1000, 400, n_calm=2) == (500, 3)
    assert choose(230, 400, n_calm=2) == (430, 3)
    assert choose(200, 400, n_calm=2) == (400, 3)
    assert choose(1000, 790, n_calm=9) == (800, 10)
    assert choose(1000, 400, n_calm=9, stalled=0.05) == (400, 0)


def test_shrinking_then_growing_ends_where_it_began():
    """What was given back is free again: the plan's head-room suffices to take it all."""
    limits, slots, elsewhere, n_calm, seen = Limits(), 800, 0, 0, []
    for step in range(60):
        elsewhere = 500 if 5 <= step < 15 else 0
        free = 256 + (800 - slots) - elsewhere  # MiB
        slots, n_calm = decide(
            Pressure(max(free, 0) * MIB), 0.0, slots,
            n_min=8, n_max=800, slot_bytes=MIB, n_calm=n_calm, limits=limits,
        )  # fmt: skip
        seen.append(slots)
    assert seen[4] == 800
    assert min(seen) < 500
    assert seen[-1] == 800


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def governed(readings, resize=None):
    calls, clock = [], Clock()

    def count(n):
        calls.append(n)
        return n if resize is None else resize(n)

    governor = Governor(
        count, n_slots=800, n_min=8, slot_bytes=MIB, limits=LIMITS,
        read=lambda: readings.pop(0), clock=clock,
    )  # fmt: skip
    return governor, clock, calls


def test_reads_only_when_due():
    readings = [Pressure(500 * MIB), Pressure(0)]
    governor, clock, calls = governed(readings)
    for _ in range(5):
        assert governor.tick() is None
    assert len(readings) == 1
    clock.now += 1.9
    governor.tick()
    assert len(readings) == 1
    clock.now += 0.2
    assert governor.tick() == 700
    assert calls == [700]
    assert (governor.n_slots, governor.n_shrunk, governor.n_grown) == (700, 1, 0)


def test_stalls_are_a_share_of_the_time_between_readings():
    readings = [Pressure(150 * MIB, n) for n in (5_000_000, 5_100_000, 5_600_000)]
    governor, clock, calls = governed(readings)
    governor.tick()  # the first reading has nothing to compare with
    clock.now += 2
    governor.tick()  # 0.1 s in 2 s
    assert calls == []
    clock.now += 2
    governor.tick()  # 0.5 s in 2 s
    assert calls == [700]


def test_believes_what_the_core_says():
    governor, _, _ = governed([Pressure(0)], resize=lambda n: n + 5)
    assert governor.tick() == 705
    assert governor.n_slots == 705


def write(root, path, text):
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


PSI = "some avg10=1.00 avg60=0.00 avg300=0.00 total={}\nfull avg10=0 avg60=0 avg300=0 total=7\n"


def test_reads_the_groups_pressure_before_the_machines(tmp_path):
    write(tmp_path, "proc/meminfo", "MemAvailable:  2048 kB\n")
    assert read_pressure(tmp_path) == Pressure(2 * MIB, None)
    write(tmp_path, "proc/pressure/memory", PSI.format(123))
    assert read_pressure(tmp_path) == Pressure(2 * MIB, 123)
    write(tmp_path, "proc/self/cgroup", "0::/box\n")
    assert read_pressure(tmp_path).stalled_us == 123
    write(tmp_path, "sys/fs/cgroup/box/memory.pressure", PSI.format(456))
    write(tmp_path, "sys/fs/cgroup/box/memory.max", str(3 * MIB))
    write(tmp_path, "sys/fs/cgroup/box/memory.current", str(2 * MIB))
    assert read_pressure(tmp_path) == Pressure(MIB, 456)


def test_this_machine_can_be_read():
    assert read_pressure().available_bytes > 0


def test_tick_of_an_engine(fake, noise_model, monkeypatch):
    import flashmoe.governor

    with Engine(noise_model, memory="600MiB", io="direct") as engine:
        plan = engine.plan
        assert plan.n_slots_min < plan.n_slots < plan.n_experts
        monkeypatch.setattr(flashmoe.governor, "read_pressure", lambda: Pressure(0))
        governor = governor_of(engine)
        governor._read = lambda: Pressure(0)
        engine.__dict__["governor"] = governor
        now = tick(engine)
        assert now == governor.n_slots < plan.n_slots
        assert engine.owner.core.slots == now
        assert tick(engine) is None  # not due


def test_an_engine_without_slots_to_give_has_none(fake, noise_model):
    fake(sizes={**fake().Engine.sizes, "n_experts_total": 4})
    with Engine(noise_model) as engine:
        assert governor_of(engine) is None
        assert tick(engine) is None
        assert engine.__dict__["governor"] is None


def test_the_owner_is_asked_if_it_can_limit(fake, noise_model):
    with Engine(noise_model, memory="600MiB", io="direct") as engine:
        asked = []
        engine.owner.limit_slots = lambda n: asked.append(n) or n
        governor = governor_of(engine)
        governor._read = lambda: Pressure(0)
        governor.tick()
        assert asked == [governor.n_slots]


@pytest.mark.parametrize("free", [0, 1, 99, 100, 150, 200, 10_000])
@pytest.mark.parametrize("level", [1, 2, 4])
def test_never_leaves_its_bounds(free, level):
    for n_slots in (8, 9, 100, 800):
        for stalled in (0.0, 0.05, 0.9):
            n, _ = choose(free, n_slots, stalled=stalled, level=level, n_calm=5)
            assert 8 <= n <= 800
