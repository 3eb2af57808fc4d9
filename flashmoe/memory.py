"""What fits where: the memory plan, computed and shown before anything is loaded.

The budget is for the whole process: what it holds already, the trunk, one session's state, scratch
and expert slots.  Either the slots are the expert cache (direct reads) or the OS page cache is
(buffered reads, few slots); never both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flashmoe.errors import ArgumentError, OutOfMemory
from flashmoe.system import available_bytes, resident_bytes

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["MemoryPlan", "format_bytes", "parse_bytes", "plan_memory"]

MARGIN_BYTES = 32 << 20
"""For what grows after planning: thread stacks, Python objects, the allocator's slack."""
PREFILL_CHUNK = 512
PREFILL_CHUNK_MIN = 16
PREFILL_CHUNK_MAX = 4096
DIRECT = ("direct", "uring")
"""Values of ``io=`` that read around the page cache."""

_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "kib": 1 << 10,
    "m": 10**6, "mb": 10**6, "mib": 1 << 20,
    "g": 10**9, "gb": 10**9, "gib": 1 << 30,
    "t": 10**12, "tb": 10**12, "tib": 1 << 40,
}  # fmt: skip


def parse_bytes(value: int | str) -> int:
    """Return a number of bytes from ``8589934592``, ``"8GiB"``, ``"8 GB"`` or ``"500MB"``.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", value.lower())
        if match is None or match[2] not in _UNITS:
            raise ArgumentError(
                f"memory={value!r} is not a size; write bytes, or a number with MB, MiB, GB or GiB"
            )
        n_bytes = int(float(match[1]) * _UNITS[match[2]])
    elif isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentError(f"memory={value!r} is not a size; write bytes or '8GiB'")
    else:
        n_bytes = value
    if n_bytes <= 0:
        raise ArgumentError(f"memory={value!r} must be more than 0 bytes")
    return n_bytes


def format_bytes(n_bytes: int) -> str:
    """Return ``"3.42 GiB"``; exact below 1 KiB.

    >>> format_bytes(3 << 20)
    '3.00 MiB'
    """
    size = float(n_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{int(size)} B" if unit == "B" else f"{size:.2f} {unit}"


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory plan of an engine, and the choices made with it.  Sizes in bytes.

    ``print(plan)`` gives plain text; ``rich.print(plan)`` a table.
    """

    model: str
    arch: str
    backend: str
    numeric: str
    kv_format: str
    n_threads: int
    experts_per_token: int
    trained_experts_per_token: int
    context: int
    prefill_chunk: int
    io: str
    io_direct: bool
    io_reason: str
    budget_bytes: int
    budget_reason: str
    baseline_bytes: int
    trunk_bytes: int
    state_bytes: int
    scratch_bytes: int
    slot_bytes: int
    n_slots: int
    n_slots_min: int
    n_experts: int
    experts_bytes: int

    @property
    def slots_bytes(self) -> int:
        """All expert slots together."""
        return self.n_slots * self.slot_bytes

    @property
    def fixed_bytes(self) -> int:
        """Everything but the slots."""
        return self.baseline_bytes + self.trunk_bytes + self.state_bytes + self.scratch_bytes

    @property
    def total_bytes(self) -> int:
        """What the process may come to hold."""
        return self.fixed_bytes + self.slots_bytes

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (what, size, remark) per line of the table."""
        of = f"{self.n_slots} of {self.n_experts} experts" if self.n_experts else "no experts"
        return [
            ("already used", format_bytes(self.baseline_bytes), "interpreter and libraries"),
            ("trunk", format_bytes(self.trunk_bytes), "resident weights"),
            ("state", format_bytes(self.state_bytes), f"context of {self.context} tokens"
             + (f", K and V in {self.kv_format}" if self.kv_format != "f32" else "")),
            ("scratch", format_bytes(self.scratch_bytes), f"prefill {self.prefill_chunk} rows"),
            ("expert slots", format_bytes(self.slots_bytes), of),
            ("total", format_bytes(self.total_bytes), f"of {format_bytes(self.budget_bytes)}, "
             f"{self.budget_reason}"),
            ("on disk", format_bytes(self.experts_bytes), f"experts; {self.io}: {self.io_reason}"),
        ]  # fmt: skip

    def title(self) -> str:
        """Return one line: model, architecture, experts per token, backend, threads."""
        k, trained = self.experts_per_token, self.trained_experts_per_token
        experts = f"{k} experts per token" + ("" if k == trained else f" (trained with {trained})")
        if not trained:
            experts = "dense"
        backend = self.backend if self.numeric == "exact" else f"{self.backend} ({self.numeric})"
        return f"{self.model}: {self.arch}, {experts}, {backend}, {self.n_threads} threads"

    def __str__(self) -> str:
        lines = [f"  {what:<13}{size:>12}  {remark}" for what, size, remark in self.rows()]
        return "\n".join([self.title(), *lines])

    def __rich__(self) -> Table:
        from rich.table import Table

        table = Table(title=self.title(), title_justify="left", show_header=False, box=None)
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_column(style="dim")
        for row in self.rows():
            table.add_row(*row, style="bold" if row[0] == "total" else None)
        return table


def plan_memory(
    core_plan: Callable[[dict[str, Any]], Mapping[str, int]],
    opts: Mapping[str, Any],
    *,
    memory: int | str | None,
    prefill_chunk: int | None,
    io: str,
    direct_refused: str | None = None,
    identity: Mapping[str, Any],
    available: tuple[int, str] | None = None,
    baseline_bytes: int | None = None,
) -> MemoryPlan:
    """Divide the budget; nothing is allocated.

    Parameters
    ----------
    core_plan : callable
        ``_core.Engine.plan`` for this model: options to sizes.
    opts : mapping
        The core's options but ``n_slots``, ``max_rows``, ``io_method`` and ``io_direct``.
    memory : int, str or None
        Budget [bytes] of the whole process; None takes what is free now, less some head-room.
    prefill_chunk : int or None
        Rows per forward; None takes 512, less if memory is tight, and up to 4096 where experts are
        streamed and the scratch stays small beside the slots.
    io : str
        ``"auto"``, ``"direct"`` or the name of a buffered method.
    direct_refused : str or None
        Why direct reads are out of the question although ``io`` is ``"auto"``.
    identity : mapping
        The fields of :class:`MemoryPlan` that say what is planned for.
    available, baseline_bytes
        Measured when None: free memory with its origin, and what the process holds [bytes].

    Raises
    ------
    OutOfMemory
        The budget does not hold even the smallest plan; the message says what would.
    """
    free_bytes, free_reason = available if available is not None else available_bytes()
    held = baseline_bytes if baseline_bytes is not None else resident_bytes()
    if memory is None:
        head_room = max(256 << 20, free_bytes // 8)
        budget = held + max(free_bytes - head_room, 0)
        reason = f"free now by {free_reason}"
    else:
        budget, reason = parse_bytes(memory), "given as memory="
    baseline = held + MARGIN_BYTES

    context = int(opts["context"])
    chunk = min(PREFILL_CHUNK if prefill_chunk is None else prefill_chunk, context)

    def sizes(rows: int, direct: bool = io in ("auto", *DIRECT)) -> tuple[Mapping[str, int], int]:
        core = core_plan(
            {**opts, "max_rows": rows, "n_slots": 0, "io_method": "pread", "io_direct": direct}
        )
        fixed = baseline + core["trunk_bytes"] + core["state_bytes"] + core["scratch_bytes"]
        return core, fixed

    core, fixed = sizes(chunk)

    def is_resident(core: Mapping[str, int], fixed: int) -> bool:
        return fixed + core["n_experts_total"] * core["slot_bytes"] <= budget

    def scratch_share(core: Mapping[str, int], fixed: int) -> float:
        """Scratch as a part of what it and the slots share."""
        return core["scratch_bytes"] / max(budget - (fixed - core["scratch_bytes"]), 1)

    def is_tight() -> bool:
        if fixed + core["n_slots_min"] * core["slot_bytes"] > budget:
            return True
        return not is_resident(core, fixed) and scratch_share(core, fixed) > 1 / 4

    while prefill_chunk is None and chunk > PREFILL_CHUNK_MIN and is_tight():
        chunk = max(chunk // 2, PREFILL_CHUNK_MIN)
        core, fixed = sizes(chunk)
    # A chunk reads nearly every expert once, so a long prompt wants few chunks: grow while it is
    # cheap beside the slots, and only where experts are read at all.
    while prefill_chunk is None and PREFILL_CHUNK <= chunk < min(PREFILL_CHUNK_MAX, context):
        larger = min(2 * chunk, PREFILL_CHUNK_MAX, context)
        core_larger, fixed_larger = sizes(larger)
        if is_resident(core, fixed) or scratch_share(core_larger, fixed_larger) > 1 / 16:
            break
        chunk, core, fixed = larger, core_larger, fixed_larger

    slot, n_experts, n_min = core["slot_bytes"], core["n_experts_total"], core["n_slots_min"]
    if fixed + n_min * slot > budget:
        _refuse(identity, core, budget, reason, baseline, chunk, prefill_chunk)
    n_fit = (budget - fixed) // slot if slot else 0
    experts_bytes = n_experts * core["expert_record_bytes_max"]
    method, direct, io_reason = _choose_io(
        io, n_experts <= n_fit, experts_bytes, free_bytes, direct_refused
    )
    if not direct:  # slots for buffered reads are a little smaller
        core, fixed = sizes(chunk, direct=False)
        slot = core["slot_bytes"]
    if n_experts <= n_fit:
        n_slots = n_experts
    elif direct:
        n_slots = n_fit
    else:
        n_slots = n_min  # the page cache is the cache; a second one would only take its memory
    return MemoryPlan(
        **identity,
        context=context,
        prefill_chunk=chunk,
        io=method,
        io_direct=direct,
        io_reason=io_reason,
        budget_bytes=budget,
        budget_reason=reason,
        baseline_bytes=baseline,
        trunk_bytes=core["trunk_bytes"],
        state_bytes=core["state_bytes"],
        scratch_bytes=core["scratch_bytes"],
        slot_bytes=slot,
        n_slots=max(n_slots, n_min),
        n_slots_min=n_min,
        n_experts=n_experts,
        experts_bytes=experts_bytes,
    )


def _choose_io(
    io: str, resident: bool, experts_bytes: int, free_bytes: int, refused: str | None
) -> tuple[str, bool, str]:
    """Return method, whether direct, and the reason in words."""
    if io in DIRECT:
        return io, True, "asked for"
    if io != "auto":
        return io, False, "asked for"
    if refused is not None:
        return "pread", False, f"buffered, direct reads refused ({refused})"
    if resident:
        return "pread", False, "buffered, all experts stay in memory once read"
    if experts_bytes > free_bytes:
        return "direct", True, f"they exceed the {format_bytes(free_bytes)} free"
    return "pread", False, "buffered, the page cache holds them"


def _refuse(
    identity: Mapping[str, Any],
    core: Mapping[str, int],
    budget: int,
    reason: str,
    baseline: int,
    chunk: int,
    asked_chunk: int | None,
) -> None:
    smallest = baseline + core["trunk_bytes"] + core["state_bytes"] + core["scratch_bytes"]
    smallest += core["n_slots_min"] * core["slot_bytes"]
    mib = (smallest >> 20) + 5  # what the process holds wavers; the advice must work
    hint = "" if asked_chunk is None else f", or a prefill_chunk below {chunk}"
    raise OutOfMemory(
        f"{identity['model']}: the budget is {format_bytes(budget)} ({reason}), the smallest that "
        f"works is {mib}MiB: {format_bytes(baseline)} already used, trunk "
        f"{format_bytes(core['trunk_bytes'])}, state {format_bytes(core['state_bytes'])}, scratch "
        f"{format_bytes(core['scratch_bytes'])}, {core['n_slots_min']} expert slots of "
        f"{format_bytes(core['slot_bytes'])}; give memory='{mib}MiB' or a smaller context{hint}"
    )
