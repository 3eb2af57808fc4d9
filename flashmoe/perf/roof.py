"""The ceiling: how fast the device gives random records of the very files that the engine reads.

Uses the core's own I/O, and Python threads where the core was built without a probe.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from flashmoe.errors import FlashMoeError, StorageError

__all__ = ["distinct_files", "measure_roof", "probe_with_threads"]

DEPTHS = (1, 2, 4, 8)
_F_NOCACHE = 48
_ALIGN = 4096


def distinct_files(paths: Iterable[str]) -> list[str]:
    """Return the paths without those that are links to a file named before.

    Reading shared files twice would measure the page cache, or the device's own.
    """
    seen, out = set(), []
    for path in paths:
        try:
            stat = os.stat(path)
        except OSError as e:
            raise StorageError(e.errno, e.strerror, path) from e
        if (stat.st_dev, stat.st_ino) not in seen:
            seen.add((stat.st_dev, stat.st_ino))
            out.append(path)
    return out


def measure_roof(
    paths: Iterable[str],
    block_bytes: int,
    *,
    depths: Sequence[int] = DEPTHS,
    seconds: float = 1.0,
    drain_seconds: float = 3.0,
    method: str = "pread",
    seed: int = 1,
) -> dict[str, Any]:
    """Measure random direct reads at every depth and return the best.

    Parameters
    ----------
    paths : iterable of str
        The expert files.
    block_bytes : int
        Size of one read: an expert's record.
    depths : sequence of int
        Reads in flight to try.
    seconds : float
        Per depth.
    drain_seconds : float
        Read before that without counting: cloud disks save up credit while they idle.
    method : str
        A method of the core.
    seed : int
        Order of the blocks.

    Returns
    -------
    dict
        ``gb_per_s``, ``depth``, ``p50_us``, ``p99_us``, ``cpu_seconds`` per GB of the best, ``all``
        (depth to GB/s), ``direct``, ``probe``.  ``gb_per_s`` is None with a ``reason`` when the
        file system takes no direct reads: the page cache is no ceiling.
    """
    files = distinct_files(paths)
    block = -(-block_bytes // _ALIGN) * _ALIGN
    probe, name = _probe()
    found: dict[int, dict[str, Any]] = {}
    try:
        if drain_seconds > 0:
            probe(files, method, True, block, max(depths), drain_seconds, seed + 1000)
        for i, depth in enumerate(depths):
            found[depth] = probe(files, method, True, block, depth, seconds, seed + i)
    except (FlashMoeError, OSError) as e:
        return {"gb_per_s": None, "reason": str(e), "direct": True, "probe": name}
    best = max(found, key=lambda d: float(found[d]["gb_per_s"]))
    r = found[best]
    gb = max(float(r["bytes"]) * 1e-9, 1e-12)
    return {
        "gb_per_s": float(r["gb_per_s"]), "depth": best, "block_bytes": block,
        "p50_us": float(r["p50_us"]), "p99_us": float(r["p99_us"]),
        "cpu_seconds_per_gb": float(r["cpu_seconds"]) / gb,
        "all": {str(d): float(x["gb_per_s"]) for d, x in found.items()},
        "direct": True, "probe": name, "n_files": len(files),
    }  # fmt: skip


Probe = Callable[[Sequence[str], str, bool, int, int, float, int], dict[str, Any]]


def _probe() -> tuple[Probe, str]:
    from flashmoe import _core

    probe = getattr(_core, "io_probe", None)
    if probe is None:
        return probe_with_threads, "threads"

    def core(paths: Sequence[str], method: str, direct: bool, block: int, depth: int,
             seconds: float, seed: int) -> dict[str, Any]:  # fmt: skip
        return dict(probe(list(paths), method, direct, block, depth, seconds, seed))

    return core, "core"


def probe_with_threads(
    paths: Sequence[str],
    method: str,
    direct: bool,
    block_bytes: int,
    depth: int,
    seconds: float,
    seed: int,
) -> dict[str, Any]:
    """Like the core's ``io_probe``, with a Python thread per read in flight; `method` is unused.

    No block is read twice; it ends early when all have been read.
    """
    flags = os.O_RDONLY | (getattr(os, "O_DIRECT", 0) if direct else 0)
    fds: list[int] = []
    try:
        blocks: list[tuple[int, int]] = []
        for path in paths:
            fd = os.open(path, flags)
            fds.append(fd)
            if direct and sys.platform == "darwin":
                import fcntl

                fcntl.fcntl(fd, _F_NOCACHE, 1)
            blocks += [(fd, i * block_bytes) for i in range(os.fstat(fd).st_size // block_bytes)]
        random.Random(seed).shuffle(blocks)
        return _run(blocks, block_bytes, depth, seconds)
    finally:
        for fd in fds:
            os.close(fd)


def _run(blocks: list[tuple[int, int]], block_bytes: int, depth: int,
         seconds: float) -> dict[str, Any]:  # fmt: skip
    todo, lock = iter(blocks), threading.Lock()
    times: list[list[float]] = [[] for _ in range(depth)]
    errors: list[OSError] = []
    began = time.perf_counter()

    def work(mine: list[float]) -> None:
        with mmap.mmap(-1, block_bytes) as buffer:  # page-aligned, as direct reads want
            while not errors and (t0 := time.perf_counter()) - began < seconds:
                with lock:
                    at = next(todo, None)
                if at is None:
                    return
                try:
                    if os.preadv(at[0], [buffer], at[1]) != block_bytes:
                        raise OSError(5, "short read")
                except OSError as e:
                    errors.append(e)
                    return
                mine.append(time.perf_counter() - t0)

    cpu = time.process_time()
    threads = [threading.Thread(target=work, args=(t,)) for t in times]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    if errors:
        raise errors[0]
    wall = max(time.perf_counter() - began, 1e-9)
    every = sorted(x for t in times for x in t) or [0.0]
    n = sum(map(len, times))
    return {
        "gb_per_s": n * block_bytes / wall * 1e-9, "bytes": n * block_bytes, "n_reads": n,
        "seconds": wall, "cpu_seconds": time.process_time() - cpu,
        "p50_us": every[len(every) // 2] * 1e6, "p99_us": every[int(len(every) * 0.99)] * 1e6,
    }  # fmt: skip
