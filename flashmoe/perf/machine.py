"""What a measurement must name: commit, processor, system, date; and memory of this process."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flashmoe.system import cpu_count

__all__ = ["cpu_name", "drop_page_cache", "identity", "peak_rss_bytes", "reset_peak_rss"]


def identity() -> dict[str, Any]:
    """Return commit, version, CPU, memory, system and date as plain data."""
    from flashmoe import __version__, _core

    return {
        "version": __version__,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "cpu": cpu_name(),
        "cpu_variant": _core.cpu_variant(),
        "n_cpus": cpu_count(),
        "ram_bytes": _ram_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    if sys.platform == "darwin":
        return _command("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
    with contextlib.suppress(OSError):
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        if match:
            return match[1]
    return platform.processor() or platform.machine()


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def _commit() -> str | None:
    """Return the commit of the checkout this package lies in, None outside one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    commit = _command("git", "-C", str(root), "rev-parse", "--short=10", "HEAD")
    if not commit:
        return None
    changed = _command("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no",
                       "--", "csrc", "flashmoe")  # fmt: skip
    return commit + ("-dirty" if changed else "")


def _command(*args: str) -> str:
    try:
        return subprocess.run(args, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def drop_page_cache(paths: Iterable[str | os.PathLike[str]]) -> bool:
    """Ask the system to forget cached pages of files; return whether it can be asked.

    Pages that another process has mapped or changed stay.
    """
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in paths:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
    return True


def reset_peak_rss() -> bool:
    """Let the peak begin anew; return whether this system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_bytes() -> int:
    """Return the largest resident set of this process [bytes], since `reset_peak_rss` if it can."""
    with contextlib.suppress(OSError):
        match = re.search(r"^VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
        if match:
            return int(match[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
