"""Gives expert slots back when the system comes under memory pressure, and takes them again.

`decide` is pure: readings in, a number of slots out.  `read_pressure` is the thin part that asks
the system.  :class:`Governor` puts them together with a clock; its `tick` belongs between tokens
and costs nothing to speak of while nothing is due.
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flashmoe.system import available_bytes

if TYPE_CHECKING:
    from flashmoe.engine import Engine

__all__ = ["Governor", "Limits", "Pressure", "decide", "read_pressure", "tick"]


@dataclass(frozen=True, slots=True)
class Pressure:
    """What the system says now."""

    available_bytes: int  # free for this process, control groups included
    stalled_us: int | None = None  # time in which some task waited for memory, since boot
    level: int = 1  # macOS: 1 normal, 2 warning, 4 critical


@dataclass(frozen=True, slots=True)
class Limits:
    """When to act.  Between `low_bytes` and `high_bytes` of free memory nothing changes."""

    low_bytes: int = 160 << 20
    high_bytes: int = 256 << 20  # not more than the head-room that the memory plan leaves
    stall_high: float = 0.10  # share of the time that some task waited for memory
    stall_low: float = 0.01
    calm_readings: int = 3  # in a row, before slots are taken again
    period_seconds: float = 2.0


def decide(
    now: Pressure,
    stalled: float,
    n_slots: int,
    *,
    n_min: int,
    n_max: int,
    slot_bytes: int,
    n_calm: int,
    limits: Limits,
) -> tuple[int, int]:
    """Return how many slots there should be, and the number of calm readings in a row.

    Parameters
    ----------
    now : Pressure
    stalled : float
        Share of the time since the last reading that some task waited for memory.
    n_slots, n_min, n_max : int
        Slots now, the fewest that work, and the plan's.
    slot_bytes : int
        Size of a slot [bytes].
    n_calm : int
        Calm readings before this one.
    limits : Limits

    Notes
    -----
    Short of memory: give back what is missing to `low_bytes`, at least an eighth (a quarter when
    it is critical).  Stalls alone count only while less than four times `high_bytes` is free:
    they may be another group's.  Slots come back an eighth at a time, and never more than leaves
    `high_bytes` free.
    """
    short = limits.low_bytes - now.available_bytes
    stalls = stalled >= limits.stall_high and now.available_bytes < 4 * limits.high_bytes
    if short > 0 or stalls or now.level >= 2:
        critical = now.level >= 4 or (stalls and short > 0)
        share = -(-n_slots // (4 if critical else 8))
        give = max(share, -(-max(short, 0) // slot_bytes))
        return max(n_slots - give, n_min), 0
    if now.available_bytes < limits.high_bytes or stalled > limits.stall_low:
        return n_slots, 0
    n_calm += 1
    if n_calm < limits.calm_readings or n_slots >= n_max:
        return n_slots, n_calm
    room = (now.available_bytes - limits.high_bytes) // slot_bytes
    return min(n_slots + min(-(-n_max // 8), room), n_max), n_calm


def read_pressure(root: Path = Path("/")) -> Pressure:
    """Ask the system; `root` stands for ``/`` in tests."""
    if sys.platform == "darwin" and root == Path("/"):
        return Pressure(available_bytes(root)[0], None, _darwin_level())
    return Pressure(available_bytes(root)[0], _stalled_us(root))


def _stalled_us(root: Path) -> int | None:
    """Return the total of PSI "some": of this process's control group, else of the machine."""
    for path in (*_group_files(root), root / "proc/pressure/memory"):
        try:
            match = re.search(r"^some .*total=(\d+)", path.read_text(), re.M)
        except OSError:
            continue
        if match:
            return int(match[1])
    return None


def _group_files(root: Path) -> list[Path]:
    try:
        text = (root / "proc/self/cgroup").read_text()
    except OSError:
        return []
    group = re.search(r"^0::(/.*)$", text, re.M)
    base = root / "sys/fs/cgroup"
    # The root group has no such file; the machine's own stands for it.
    return [base / group[1].lstrip("/") / "memory.pressure"] if group and group[1] != "/" else []


def _darwin_level() -> int:
    level, size = ctypes.c_int(1), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    name = b"kern.memorystatus_vm_pressure_level"
    try:
        libc = ctypes.CDLL(None)
        failed = libc.sysctlbyname(name, ctypes.byref(level), ctypes.byref(size), None, 0)
    except (OSError, AttributeError):
        return 1
    return 1 if failed else level.value


class Governor:
    """Watches the system's memory for one engine.

    Parameters
    ----------
    resize : callable
        Called with a wanted number of slots; returns how many there are now.
    n_slots, n_min : int
        The plan's slots, and the fewest that work.
    slot_bytes : int
    limits : Limits, optional
    read, clock : callable, optional
        For tests.

    Examples
    --------
    >>> governor = Governor(lambda n: n, n_slots=800, n_min=8, slot_bytes=1 << 20,
    ...                     read=lambda: Pressure(available_bytes=60 << 20), clock=lambda: 10.0)
    >>> governor.tick(), governor.n_slots  # 100 MiB short: 100 slots
    (700, 700)
    """

    def __init__(
        self,
        resize: Callable[[int], int],
        *,
        n_slots: int,
        n_min: int,
        slot_bytes: int,
        limits: Limits | None = None,
        read: Callable[[], Pressure] = read_pressure,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or Limits()
        self.n_slots, self.n_max, self.n_min = n_slots, n_slots, n_min
        self.n_shrunk = self.n_grown = 0  # how often
        self._resize, self._slot_bytes = resize, slot_bytes
        self._read, self._clock = read, clock
        self._n_calm = 0
        self._stalled_us: int | None = None
        self._read_at = 0.0
        self._due = 0.0

    def tick(self) -> int | None:
        """Look if it is time to, and resize if need be; return the new number of slots, or None."""
        now = self._clock()
        if now < self._due:
            return None
        self._due = now + self.limits.period_seconds
        return self._look(now)

    def _look(self, at: float) -> int | None:
        pressure = self._read()
        stalled = 0.0
        if pressure.stalled_us is not None:
            if self._stalled_us is not None and at > self._read_at:
                grown = pressure.stalled_us - self._stalled_us
                stalled = max(grown, 0) * 1e-6 / (at - self._read_at)
            self._stalled_us, self._read_at = pressure.stalled_us, at
        want, self._n_calm = decide(
            pressure, stalled, self.n_slots, n_min=self.n_min, n_max=self.n_max,
            slot_bytes=self._slot_bytes, n_calm=self._n_calm, limits=self.limits,
        )  # fmt: skip
        if want == self.n_slots:
            return None
        self.n_shrunk += want < self.n_slots
        self.n_grown += want > self.n_slots
        self.n_slots = self._resize(want)
        return self.n_slots


def governor_of(engine: Engine) -> Governor | None:
    """Return a governor for an engine; None if it has no slots to give.

    It goes through ``engine.owner.limit_slots(n)``, which knows what sessions take.
    """
    plan = engine.plan
    if plan.n_slots <= plan.n_slots_min or not plan.slot_bytes:
        return None
    return Governor(
        engine.owner.limit_slots,
        n_slots=plan.n_slots,
        n_min=plan.n_slots_min,
        slot_bytes=plan.slot_bytes,
    )


_NONE = object()


def tick(engine: Engine) -> int | None:
    """Call between tokens: `Governor.tick` of the engine's own governor, made at the first call.

    The engine keeps it in ``engine.__dict__["governor"]``.
    """
    governor = engine.__dict__.get("governor", _NONE)
    if governor is None:
        return None
    if governor is _NONE:
        governor = engine.__dict__["governor"] = governor_of(engine)
        if governor is None:
            return None
    result: int | None = governor.tick()
    return result
