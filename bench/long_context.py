"""Measure decode against the length of the context, beside what the bytes of K and V explain.

    python bench/long_context.py MODEL [--contexts 1024,32768] [--kv-format f32,f16] [--steps 16]

The cache is not computed but filled with noise (a saved session that is made up), so 32K tokens
take no minutes; a prompt brings the experts into memory first.  One JSON line per setting: seconds
per token and in attention, bytes of K and V that a token reads, their rate, the roof (all threads
reading memory: `bench_kernels` after each, which `make -C bench` builds), and resident memory
beside the plan.  `growth_over_bytes` is the verdict: the time that a token takes longer than at the
first context, over the time that the roof needs for the K and V in between; 1 or less is the aim.
"""

from __future__ import annotations

import argparse
import json
import statistics
import struct
import subprocess
import time
from pathlib import Path

import numpy as np

from flashmoe.perf.machine import identity
from flashmoe.perf.runner import Runner
from flashmoe.system import resident_bytes

HEADER = struct.Struct("<8s9q")  # save_header of csrc/model/state.c
POS = 3
SIZE = {"f32": 4, "f16": 2, "bf16": 2}  # bytes of a number of K or V
BENCH = Path(__file__).resolve().parent.parent / "build" / "bench" / "bench_kernels"
PROMPT = 512  # of random tokens: asks for nearly every expert


def filled(saved: bytes, n: int, config: dict, kv_format: str) -> bytes:
    """Return a saved session of one token as one of `n`, the keys and values noise."""
    head, size = list(HEADER.unpack_from(saved)), SIZE[kv_format]
    rows = list(config["mixers"]).count(0) * 2 * config["num_key_value_heads"]
    one = config["head_dim"] * size
    linear = saved[HEADER.size + rows * head[POS] * one :]
    head[POS] = n
    noise = np.random.default_rng(0).standard_normal(1 << 20).astype(np.float32)
    if kv_format == "f16":
        noise = noise.astype(np.float16)
    elif kv_format == "bf16":  # the upper half of a float
        noise = (noise.view(np.uint32) >> 16).astype(np.uint16)
    total = rows * n * one
    return HEADER.pack(*head) + (noise.tobytes() * (total // noise.nbytes + 1))[:total] + linear


def read_gb_per_s(program: Path, threads: int) -> float:
    """Return what all threads together read from memory, GB/s."""
    command = [program, "--only", "peaks", "--runs", "5", "--threads", str(threads)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return float(json.loads(out.splitlines()[0])["read_gbps"])


def measure(path: str, kv_format: str, n: int, steps: int, threads: int | None) -> dict:
    """Return the numbers of one setting."""
    core = {"kv_format": kv_format}
    with Runner(path, {}, context=n + steps + 2, prefill_chunk=16, threads=threads, **core) as r:
        config, size = r.prepared.desc.config, SIZE[kv_format]
        session = r.core.session()
        rng = np.random.default_rng(1)
        prompt = rng.integers(0, r.vocab_size, min(PROMPT, n)).astype(np.int32)
        done = 0
        while done < len(prompt):
            done += session.prefill(prompt[done:])
        session.close()
        session = r.core.session()
        session.step(1)
        session.load(filled(session.save(), n, config, kv_format))
        session.step(2)  # allocates what decoding keeps
        r.core.reset_stats()
        start = time.perf_counter()
        for token in rng.integers(0, r.vocab_size, steps):
            session.step(int(token))
        seconds = (time.perf_counter() - start) / steps
        stats = r.core.stats()
        attention = stats["attention_ns"] * 1e-9 / steps
        width = 2 * config["num_key_value_heads"] * config["head_dim"] * size
        kv = list(config["mixers"]).count(0) * width * n
        plan, info = r.plan, r.core.info
        return {
            "bench": "long_context", "model": plan.model, "kv_format": kv_format, "context": n,
            "n_threads": info["n_threads"], "cpu_variant": info["cpu_variant"],
            "seconds_per_token": seconds, "attention_seconds": attention, "kv_bytes": kv,
            "misses_per_token": stats["misses"] / steps,
            "kv_gb_per_s": kv / attention / 1e9, "state_bytes": plan.state_bytes,
            "rss_bytes": resident_bytes(), "planned_bytes": plan.total_bytes,
        }  # fmt: skip


def main() -> None:
    """Run every setting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--contexts", default="1024,8192,32768")
    parser.add_argument("--kv-format", default="f32,f16,bf16")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--bench-kernels", type=Path, default=BENCH)
    args = parser.parse_args()
    if not args.bench_kernels.exists():
        parser.error(f"{args.bench_kernels} measures the roof and is not built: make -C bench")
    for kv_format in args.kv_format.split(","):
        base, roofs = None, []
        for n in map(int, args.contexts.split(",")):
            got = measure(args.model, kv_format, n, args.steps, args.threads)
            roofs.append(read_gb_per_s(args.bench_kernels, got["n_threads"]))
            base = base or got
            grown = got["kv_bytes"] - base["kv_bytes"]
            more = got["seconds_per_token"] - base["seconds_per_token"]
            got["roof_gb_per_s"] = statistics.median(roofs)
            got["growth_kv_gb_per_s"] = grown / more / 1e9 if grown and more > 0 else None
            got["growth_over_bytes"] = (
                more / (grown / statistics.median(roofs) / 1e9) if grown else None
            )
            print(json.dumps({**got, **identity()}), flush=True)


if __name__ == "__main__":
    main()
