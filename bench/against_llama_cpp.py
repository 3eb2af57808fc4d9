"""Compare flashmoe with llama.cpp: alternating runs on the same geometry, bits and memory limit.

    python bench/against_llama_cpp.py ram  --llama-bench BIN --gguf 12.gguf --model models/35b-12
    python bench/against_llama_cpp.py disk --llama-bench BIN --gguf 40.gguf --model models/35b \
        --limit 8GiB --memory 7.5GiB --read-ahead 128:32,8192:4 --disk vda

`ram`: everything is in memory; llama.cpp with and without its repacking; both read a prompt of 512
tokens, then decode 32 after it.  `disk`: both in a memory cgroup (needs root), page cache dropped
before every run, llama.cpp mapping its file at each read-ahead (KiB:tokens to decode); decode and
prefill are separate processes, both cold: flashmoe reads directly into empty slots.  One JSON line
per run, then one with medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from limits import drop_caches, memory_group, run, size


@contextmanager
def read_ahead(disk: str, kib: int):
    """Set the disk's read-ahead; the old value comes back whatever happens."""
    setting = Path(f"/sys/block/{disk}/queue/read_ahead_kb")
    old = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(old)


def llama(
    args, n_prompt: int, n_gen: int, extra: list[str], groups: list[Path]
) -> dict[str, float]:
    command = [args.llama_bench, "-m", args.gguf, "-t", str(args.threads), "-r", "1", "-o", "json"]
    out = json.loads(
        run([*command, "-p", str(n_prompt), "-n", str(n_gen), *extra], groups, args.timeout)
    )
    got = {}
    for row in out:
        got["prefill" if row["n_prompt"] else "decode"] = row["avg_ts"]
        got["version"] = row["build_commit"]
    return got


def ours(args, n_prompt: int, n_gen: int, extra: list[str], groups: list[Path], cold: bool) -> dict:
    command = [sys.executable, "-m", "flashmoe", "bench", args.model, "--json", "-q", "--no-roof"]
    command += [
        "--threads",
        str(args.threads),
        "--repeat",
        "2",
        "--seed",
        str(time.time_ns() % 2**31),
    ]
    command += ["--prompt-tokens", str(n_prompt), "--gen", str(n_gen + 1), *extra]
    line = json.loads(run(command, groups, args.timeout).splitlines()[0])
    part = line["cold"] if cold else line
    got = {
        "prefill": part["prefill_tokens_per_second"]["median"],
        "decode": part["decode_tokens_per_second"]["median"],
    }
    for key in ("rss_peak_bytes", "experts_per_token", "numeric", "commit", "setting"):
        if key in line:
            got[key] = line[key]
    for key in ("bytes_read_per_token", "hit_rate", "device_gb_per_s"):
        if key in part:
            got[key] = part[key]
    return got


def note(lines: list[dict], i: int, who: str, got: dict) -> None:
    lines.append({"run": i, "who": who, **got})
    print(json.dumps(lines[-1]), flush=True)


def ram(args) -> list[dict]:
    lines = []
    for i in range(args.runs):
        for repack in ("1", "0"):
            got = llama(args, 512, 0, ["--repack", repack], [])
            got |= llama(args, 0, 32, ["--repack", repack, "-d", "512"], [])
            note(lines, i, f"llama.cpp repack {repack}", got)
        note(lines, i, "flashmoe", ours(args, 512, 32, [], [], cold=False))
    return lines


def disk(args) -> list[dict]:
    lines = []
    groups = [memory_group(size(args.limit))]
    settings = [tuple(map(int, s.split(":"))) for s in args.read_ahead.split(",")]
    direct = ["--io", "direct", "--memory", args.memory]
    if args.lookahead is not None:
        direct += ["--lookahead", args.lookahead]

    for i in range(args.runs):
        for kib, n_gen in settings:
            with read_ahead(args.disk, kib):
                drop_caches()
                got = llama(args, 0, n_gen, ["--repack", "0"], groups)
                drop_caches()
                got |= llama(args, 512, 0, ["--repack", "0"], groups)
            note(lines, i, f"llama.cpp read-ahead {kib} KiB", got)
        drop_caches()
        got = ours(args, 8, 32, direct, groups, cold=True)
        drop_caches()
        got["prefill"] = ours(args, 512, 2, direct, groups, cold=True)["prefill"]
        note(lines, i, "flashmoe", got)
    return lines


def summary(args, lines: list[dict]) -> dict:
    """Medians of each contender, and ours over theirs."""
    out = {"bench": "against_llama_cpp", "where": args.where, "runs": args.runs, "medians": {}}
    for who in dict.fromkeys(line["who"] for line in lines):
        rows = [line for line in lines if line["who"] == who]
        out["medians"][who] = {
            what: {
                "median": statistics.median(r[what] for r in rows),
                "min": min(r[what] for r in rows),
                "max": max(r[what] for r in rows),
            }
            for what in ("decode", "prefill")
        }
    mine = out["medians"]["flashmoe"]
    out["ratios"] = {
        f"{what} over {who}": mine[what]["median"] / theirs[what]["median"]
        for who, theirs in out["medians"].items()
        if who != "flashmoe"
        for what in ("decode", "prefill")
    }
    return out | {
        "command": " ".join(Path(a).name for a in sys.argv),  # whose folders are one machine's
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.platform(),
        "n_cpus": os.cpu_count(),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    p.add_argument("where", choices=("ram", "disk"))
    p.add_argument("--llama-bench", required=True)
    p.add_argument("--gguf", required=True)
    p.add_argument("--model", required=True)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--timeout", type=float, default=1800, help="seconds of one process")
    p.add_argument("--limit", default="8GiB", help="of the cgroup")
    p.add_argument("--memory", default="7.5GiB", help="flashmoe's budget within it")
    p.add_argument("--lookahead", help="flashmoe's; left out: its default")
    p.add_argument("--read-ahead", default="128:32,8192:4", help="KiB:tokens, several")
    p.add_argument("--disk", default="vda", help="block device whose read-ahead is set")
    args = p.parse_args()
    lines = ram(args) if args.where == "ram" else disk(args)
    print(json.dumps(summary(args, lines)))


if __name__ == "__main__":
    main()
