"""Limits that the kernel enforces on a benchmark's child processes: memory, and the disk's speed.

Needs root and cgroups, version 1 or 2.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
GROUP = "flashmoe-bench"
SIZES = {"GiB": 1 << 30, "MiB": 1 << 20}


def size(text: str) -> int:
    """Bytes of "8GiB" or "512MiB"."""
    return int(float(text[:-3]) * SIZES[text[-3:]])


def group(controller: str) -> tuple[Path, bool]:
    """Make the cgroup of a controller; say whether it is one of version 1."""
    v1 = (ROOT / controller).is_dir()
    made = ROOT / controller / GROUP if v1 else ROOT / GROUP
    if not v1:
        (ROOT / "cgroup.subtree_control").write_text("+memory +io")
    made.mkdir(exist_ok=True)
    return made, v1


def memory_group(limit: int) -> Path:
    """Limit the children's memory to so many bytes; return the file that takes their pids."""
    made, v1 = group("memory")
    (made / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(limit))
    return made / ("tasks" if v1 else "cgroup.procs")


def reads_group(disk: str, bytes_per_second: int) -> Path:
    """Hold the children's reads from a disk to a speed; return the file that takes their pids."""
    number = Path(f"/sys/block/{disk}/dev").read_text().strip()
    made, v1 = group("blkio")
    if v1:
        (made / "blkio.throttle.read_bps_device").write_text(f"{number} {bytes_per_second}")
        return made / "tasks"
    (made / "io.max").write_text(f"{number} rbps={bytes_per_second}")
    return made / "cgroup.procs"


def drop_caches() -> None:
    """Have the system forget all pages of files."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def run(command: list[str], groups: list[Path], timeout: float) -> str:
    """Run a command in these cgroups and return what it prints."""

    def enter() -> None:
        for procs in groups:
            procs.write_text(str(os.getpid()))

    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=timeout, preexec_fn=enter, check=True
    )
    return done.stdout
