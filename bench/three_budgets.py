"""Decode out of core in memory cgroups, against the larger of its two terms, for several budgets.

    python bench/three_budgets.py models/35b [--budgets 4GiB,6GiB,7.5GiB] [--hold 1.0] [--disk vda]

Each budget is a `flashmoe bench --io direct --terms` of its own in a memory cgroup 0.5 GiB larger
(needs root).  `--hold` keeps reads to so many GB/s, for a disk that saves up credit and then is
faster for a while than it can sustain; it may be several, `--hold 1.0,0` (0: as it is), which take
turns.  One JSON line per run: bench's, with `held_gb_per_s` and `limit_bytes`; then one with what
each reached.
"""

from __future__ import annotations

import argparse
import json
import sys

from limits import drop_caches, memory_group, reads_group, run, size

AS_IT_IS = 1 << 40  # bytes a second: no limit


def one(args: argparse.Namespace, budget: str, hold: float) -> dict:
    limit = size(budget) + size("0.5GiB")
    groups = [memory_group(limit), reads_group(args.disk, int(hold * 1e9) if hold else AS_IT_IS)]
    command = [sys.executable, "-m", "flashmoe", "bench", args.model, "--io", "direct", "--json"]
    command += ["--memory", budget, "--terms", "--gen", str(args.gen), "--prompt-tokens", "32"]
    drop_caches()
    line = run([*command, "--repeat", "2", "-q"], groups, args.timeout).splitlines()[0]
    return {**json.loads(line), "held_gb_per_s": hold or None, "limit_bytes": limit}


def short(line: dict) -> dict:
    """What the issue of the matter asks for."""
    decode = line["terms"]["decode"]
    return {
        "memory": line["memory"],
        "held_gb_per_s": line["held_gb_per_s"],
        **{k: decode[k] for k in ("share_of_larger_term", "share_min", "share_max", "rounds")},
        **{k: decode[k] for k in ("seconds", "io_seconds", "compute_seconds")},
        **{k: line[k] for k in ("hit_rate", "bytes_read_per_token", "rss_peak_bytes")},
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("model")
    p.add_argument("--budgets", default="4GiB,6GiB,7.5GiB")
    p.add_argument("--hold", default="0", help="GB/s, several; 0 is the disk as it is")
    p.add_argument("--disk", default="vda", help="block device whose reads are held")
    p.add_argument("--gen", type=int, default=32, help="tokens, in rounds of four")
    p.add_argument("--timeout", type=float, default=1800, help="seconds of one process")
    args = p.parse_args()
    lines = []
    for budget in args.budgets.split(","):
        for hold in map(float, args.hold.split(",")):
            lines.append(one(args, budget, hold))
            print(json.dumps(lines[-1]), flush=True)
    print(json.dumps({"bench": "three_budgets", "budgets": [short(line) for line in lines]}))


if __name__ == "__main__":
    main()
