"""How many threads compute by default, on machines that are only described."""

from __future__ import annotations

import pytest

from flashmoe.system import core_count, cpu_count


def machine(root, cores, files=()):
    """Write /sys for CPUs given as (package, core)."""
    for i, (package, core) in enumerate(cores):
        topology = root / f"sys/devices/system/cpu/cpu{i}/topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{package}\n")
        (topology / "core_id").write_text(f"{core}\n")
    for name, text in dict(files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


SMT = [(0, 0), (0, 1), (0, 0), (0, 1)]
HYBRID = {"sys/devices/cpu_core/cpus": "0-3\n", "sys/devices/cpu_atom/cpus": "4-7\n"}
ARM = {
    f"sys/devices/system/cpu/cpu{i}/cpu_capacity": f"{c}\n"
    for i, c in enumerate([1024] * 2 + [446] * 6)
}


@pytest.mark.parametrize(
    ("cores", "files", "cpus", "want"),
    [
        (SMT, {}, range(4), 2),
        (SMT, {}, [0, 2], 1),  # both threads of one core
        ([(0, 0), (1, 0)], {}, range(2), 2),  # two sockets
        (SMT + [(0, 8 + i) for i in range(4)], HYBRID, range(8), 2),
        (SMT + [(0, 8 + i) for i in range(4)], HYBRID, range(4, 8), 4),  # only the small ones are ours
        ([(0, i) for i in range(8)], ARM, range(8), 2),
        ([(0, i) for i in range(8)], {"sys/fs/cgroup/cpu.max": "250000 100000\n"}, range(8), 3),
        ([(0, i) for i in range(8)], {"sys/fs/cgroup/cpu.max": "max 100000\n"}, range(8), 8),
        (
            [(0, i) for i in range(8)],
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            range(8),
            8,
        ),
        (
            [(0, i) for i in range(8)],
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "150000\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            range(8),
            2,
        ),
        ([], {}, range(6), 6),  # nothing known: every CPU a core
        ([], {"sys/fs/cgroup/cpu.max": "nonsense"}, range(1), 1),
    ],
)  # fmt: skip
def test_threads_are_physical_performance_cores(tmp_path, cores, files, cpus, want):
    assert core_count(machine(tmp_path, cores, files), cpus) == want


def test_this_machine():
    assert 1 <= core_count() <= cpu_count()
