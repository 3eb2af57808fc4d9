"""The core's timed events as a Chrome trace: open the file in https://ui.perfetto.dev.

Tracks: whole forwards, the phases of the computing thread, and reads, as many lanes as were in
flight at once; a counter shows the reads in flight.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flashmoe.errors import StorageError

__all__ = ["chrome_trace", "repeated_reads", "write_chrome_trace"]

_FORWARD, _COMPUTE, _LANE0 = 1, 2, 100
_READS = ("read", "guess")


def chrome_trace(
    events: NDArray[Any], kinds: Sequence[str], meta: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the object of a Chrome trace file.

    Parameters
    ----------
    events : structured ndarray with kind, layer, id, t0_ns, t1_ns, bytes
    kinds : sequence of str
        Name of each kind.
    meta : dict, optional
        Goes into ``otherData``.
    """
    out: list[dict[str, Any]] = [_name(_FORWARD, "forward", 0), _name(_COMPUTE, "compute", 1)]
    start = int(events["t0_ns"].min()) if len(events) else 0
    free: list[tuple[int, int]] = []  # (end of its last read, lane)
    n_lanes, changes = 0, []  # type: int, list[tuple[int, int]]
    for i in np.argsort(events["t0_ns"], kind="stable"):
        e = events[i]
        kind = kinds[int(e["kind"])]
        t0, t1, layer = int(e["t0_ns"]), int(e["t1_ns"]), int(e["layer"])
        args: dict[str, Any] = {"layer": layer} if layer >= 0 else {}
        if kind in _READS:
            if free and free[0][0] <= t0:
                lane = heapq.heappop(free)[1]
            else:
                lane, n_lanes = n_lanes, n_lanes + 1
                out.append(_name(_LANE0 + lane, f"reads {lane}", 10 + lane))
            heapq.heappush(free, (t1, lane))
            changes += [(t0, 1), (t1, -1)]
            n_bytes = int(e["bytes"])
            args.update(expert=int(e["id"]), bytes=n_bytes)
            if t1 > t0:
                args["MB/s"] = round(n_bytes / (t1 - t0) * 1e3, 1)
            tid, name = _LANE0 + lane, f"{kind} L{layer} E{int(e['id'])}"
        elif kind == "forward":
            tid, name = _FORWARD, f"forward of {int(e['id'])} rows"
            args["rows"] = int(e["id"])
        else:
            tid, name = _COMPUTE, kind if layer < 0 else f"{kind} L{layer}"
        out.append({"ph": "X", "pid": 1, "tid": tid, "name": name, "cat": kind,
                    "ts": (t0 - start) / 1e3, "dur": max(t1 - t0, 0) / 1e3,
                    "args": args})  # fmt: skip
    in_flight = 0
    for t, step in sorted(changes):
        in_flight += step
        out.append({"ph": "C", "pid": 1, "name": "reads in flight", "ts": (t - start) / 1e3,
                    "args": {"reads": in_flight}})  # fmt: skip
    return {"traceEvents": out, "displayTimeUnit": "ms", "otherData": meta or {}}


def _name(tid: int, name: str, order: int) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": tid, "name": "thread_name",
            "args": {"name": name, "sort_index": order}}  # fmt: skip


def write_chrome_trace(path: str | os.PathLike[str], trace: dict[str, Any]) -> None:
    """Write the file; StorageError if the system refuses."""
    try:
        with open(path, "w", encoding="utf-8") as f:
            json.dump(trace, f, separators=(",", ":"))
    except OSError as e:
        raise StorageError(e.errno, e.strerror, str(path)) from e


def repeated_reads(events: NDArray[Any], kinds: Sequence[str], record_bytes: int) -> int:
    """Return how many experts were read more than once within one forward.

    Parameters
    ----------
    events, kinds
        As for :func:`chrome_trace`.
    record_bytes : int
        Size of an expert; a read in parts counts by its bytes.
    """
    names = np.array(kinds)[events["kind"]] if len(events) else np.array([], str)
    ends = np.sort(events["t1_ns"][names == "forward"])
    reads = events[np.isin(names, _READS)]
    total: dict[tuple[int, int, int], int] = {}
    for e, forward in zip(reads, np.searchsorted(ends, reads["t1_ns"])):
        key = (int(forward), int(e["layer"]), int(e["id"]))
        total[key] = total.get(key, 0) + int(e["bytes"])
    return sum(n > 1.5 * record_bytes for n in total.values())
