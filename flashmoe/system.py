"""What the operating system says about this process and its machine.  Knows nothing of models."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

__all__ = ["available_bytes", "core_count", "cpu_count", "resident_bytes"]


def cpu_count() -> int:
    """Return how many CPUs this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def core_count(root: Path = Path("/"), cpus: Iterable[int] | None = None) -> int:
    """Return how many threads should compute: one per physical performance core.

    The second thread of a core shares its vector units, and an efficiency core holds up the others,
    who wait for the last one in every product.  No more than this process may run on (`cpus`; its
    affinity by default) and than a control group's quota pays for.  `root` stands for ``/`` in
    tests.
    """
    if sys.platform == "darwin" and root == Path("/"):
        for name in ("hw.perflevel0.physicalcpu", "hw.physicalcpu"):
            n = _command("sysctl", "-n", name)
            if n.isdigit() and int(n) > 0:
                return int(n)
        return cpu_count()
    if cpus is None:
        can = hasattr(os, "sched_getaffinity")
        cpus = os.sched_getaffinity(0) if can else range(os.cpu_count() or 1)
    allowed = set(cpus)
    devices = root / "sys/devices"
    fast = _cpu_list(_read(devices / "cpu_core/cpus")) & allowed or allowed  # Intel: not its "atom"
    power = {i: _number(devices / f"system/cpu/cpu{i}/cpu_capacity") or 0 for i in fast}  # Arm
    top = max(power.values(), default=0)
    cores = set()
    for i in fast:
        topology = devices / f"system/cpu/cpu{i}/topology"
        package, core = (_number(topology / n) for n in ("physical_package_id", "core_id"))
        if power[i] == top:
            cores.add((package, core) if core is not None else (None, -1 - i))
    quota = _quota_cpus(root)
    return max(1, min(len(cores), quota) if quota else len(cores))


def _cpu_list(text: str) -> set[int]:
    """Return the numbers of ``"0-3,8"``."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found.update(range(int(first), int(last if last.isdigit() else first) + 1))
    return found


def _quota_cpus(root: Path) -> int:
    """Return the CPUs' worth of time that control groups allow, rounded up; 0 is no limit."""
    base = root / "sys/fs/cgroup"
    words = _read(base / "cpu.max").split() or [
        _read(base / f"cpu/cpu.cfs_{name}_us").strip() for name in ("quota", "period")
    ]
    if len(words) == 2 and all(w.isdigit() and int(w) > 0 for w in words):
        return -(-int(words[0]) // int(words[1]))
    return 0


def resident_bytes() -> int:
    """Return the resident set of this process [bytes]."""
    if sys.platform == "darwin":
        out = _command("ps", "-o", "rss=", "-p", str(os.getpid()))
        return int(out or 0) * 1024
    status = _read(Path("/proc/self/status"))
    match = re.search(r"^VmRSS:\s+(\d+) kB", status, re.M)
    return int(match[1]) * 1024 if match else 0


def available_bytes(root: Path = Path("/")) -> tuple[int, str]:
    """Return the memory that can be taken now [bytes] and where the number comes from.

    The least of the machine's free memory and what control groups (v1 and v2, every level) leave.
    `root` stands for ``/`` in tests.
    """
    if sys.platform == "darwin" and root == Path("/"):
        return _available_darwin()
    match = re.search(r"^MemAvailable:\s+(\d+) kB", _read(root / "proc/meminfo"), re.M)
    best = (int(match[1]) * 1024, "MemAvailable") if match else (1 << 30, "assumption")
    for free, source in _cgroup_free(root):
        best = min(best, (free, source))
    return best


def _cgroup_free(root: Path) -> list[tuple[int, str]]:
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        here = base / path.lstrip("/")
        # A container often sees its own group as the root while the path names the host's.
        levels = [here, *here.parents]
        for level in levels[: levels.index(base) + 1] if base in levels else [base]:
            limit, usage = _number(level / names[0]), _number(level / names[1])
            if limit is None or usage is None or limit >= 1 << 60:
                continue
            stat = re.search(rf"^{names[2]} (\d+)", _read(level / "memory.stat"), re.M)
            reclaimable = int(stat[1]) if stat else 0
            found.append((max(limit - usage + reclaimable, 0), "cgroup limit"))
    return found


def _available_darwin() -> tuple[int, str]:
    text = _command("vm_stat")
    page = re.search(r"page size of (\d+) bytes", text)
    names = ("free", "inactive", "speculative", "purgeable")
    pages = [re.search(rf"Pages {name}:\s+(\d+)", text) for name in names]
    if page is None:
        return int(_command("sysctl", "-n", "hw.memsize") or 2 << 30) // 2, "half of hw.memsize"
    return sum(int(m[1]) for m in pages if m) * int(page[1]), "vm_stat"


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _command(*args: str) -> str:
    try:
        return subprocess.run(args, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
