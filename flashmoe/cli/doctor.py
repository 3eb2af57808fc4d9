"""`flashmoe doctor`: what this installation and machine can do."""

from __future__ import annotations

import os
import platform
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from flashmoe import __version__
from flashmoe.cli import options as opt

__all__ = ["doctor"]

_FILE_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_DEPTH = 8


def doctor(
    folder: Annotated[
        str | None,
        typer.Argument(metavar="DIR", help="Measure reads here; a temporary file is written."),
    ] = None,
    metal: Annotated[
        bool,
        typer.Option("--metal", help="Check every kernel on this GPU instead, and time them."),
    ] = False,
    small: Annotated[
        bool, typer.Option("--small", help="With --metal: small sizes only; speeds mean nothing.")
    ] = False,
    json: opt.Json = False,
) -> None:
    """Show versions, CPU variant, I/O methods, free memory, read speed and environment."""
    if metal:
        from flashmoe.cli.conformance import show_conformance

        show_conformance("metal", small=small, json=json)
        return
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
    from flashmoe.system import available_bytes, cpu_count

    free, source = available_bytes()
    return {
        "flashmoe": f"{__version__} (core {_core.version})",
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {cpu_count()} CPUs for this process",
        "cpu_variants": _core.cpu_variants(),
        "cpu_variant": _core.cpu_variant(),
        "backends": _core.backends(),
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
    """Return GB/s of random 1 MiB reads per direct method, in words."""
    from flashmoe import _core
    from flashmoe.errors import FlashMoeError

    speeds = []
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix="flashmoe-doctor-") as f:
            block = os.urandom(_READ_BYTES)
            for _ in range(_FILE_BYTES // _READ_BYTES):
                f.write(block)
            f.flush()
            os.fsync(f.fileno())
            for method in ("pread", "uring"):
                if method not in _core.io_methods():
                    continue
                try:
                    probe = _core.io_probe([f.name], method, True, _READ_BYTES, _DEPTH)
                    speeds.append(f"{method} {probe['gb_per_s']:.2f} GB/s")
                except FlashMoeError as e:
                    speeds.append(f"{method} refused ({e})")
    except OSError as e:
        return f"not measured in {folder}: {e.strerror}"
    return f"{', '.join(speeds)} (random 1 MiB reads, direct, in {folder})"
