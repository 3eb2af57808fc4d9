"""`flashmoe doctor`: what this installation and machine can do."""

from __future__ import annotations

import mmap
import os
import platform
import random
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe import __version__
from flashmoe.cli import options as opt

__all__ = ["doctor"]

_FILE_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_N_READERS = 4


def doctor(
    folder: Annotated[
        str | None,
        typer.Argument(metavar="DIR", help="Measure reads here; a temporary file is written."),
    ] = None,
    json: opt.Json = False,
) -> None:
    """Show versions, CPU variant, I/O methods, free memory, read speed and environment."""
    facts = _facts(Path(folder) if folder else Path(tempfile.gettempdir()))
    if json:
        opt.print_json(facts)
        return
    from rich import print as rich_print
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value))
        if name != "environment":
            table.add_row(name.replace("_", " "), str(value))
    for variable, entry in facts["environment"].items():
        table.add_row(variable, f"{entry['value'] or 'not set'} ({entry['meaning']})")
    rich_print(table)


def _facts(folder: Path) -> dict[str, Any]:
    from flashmoe import _core
    from flashmoe.memory import format_bytes
    from flashmoe.models import default_model
    from flashmoe.prepare import BACKENDS
    from flashmoe.system import available_bytes, cpu_count

    free, source = available_bytes()
    return {
        "flashmoe": f"{__version__} (core {_core.version})",
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {cpu_count()} CPUs for this process",
        "cpu_variants": _core.cpu_variants(),
        "cpu_variant": _core.cpu_variant(),
        "backends": list(BACKENDS),
        "io_methods": [m for m in _core.io_methods() if m != "fault"],
        "formats": _core.quant_formats(),
        "free_memory": f"{format_bytes(free)} ({source})",
        "read_speed": _read_speed(folder),
        "default_model": str(default_model()),
        "environment": {
            name: {"value": value, "meaning": meaning} for name, meaning, value in _core.env_table()
        },
    }


def _read_speed(folder: Path) -> str:
    """Return GB/s of random 1 MiB reads by 4 threads around the page cache, in words."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="flashmoe-doctor-") as f:
            block = os.urandom(_READ_BYTES)
            for _ in range(_FILE_BYTES // _READ_BYTES):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            return f"{_measure(f.name):.2f} GB/s in {folder} (random 1 MiB reads, direct)"
    except OSError as e:
        return f"not measured in {folder}: {e.strerror}"


def _measure(path: str) -> float:
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    try:
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, 48, 1)  # F_NOCACHE
        offsets = list(range(0, _FILE_BYTES, _READ_BYTES))
        random.Random(0).shuffle(offsets)

        def read(part: list[int]) -> int:
            with mmap.mmap(-1, _READ_BYTES) as buffer:  # page-aligned, as direct reads want
                return sum(os.preadv(fd, [buffer], offset) for offset in part)

        started = time.perf_counter()
        with ThreadPoolExecutor(_N_READERS) as pool:
            n_bytes = sum(pool.map(read, [offsets[i::_N_READERS] for i in range(_N_READERS)]))
        return n_bytes / (time.perf_counter() - started) / 1e9
    finally:
        os.close(fd)
