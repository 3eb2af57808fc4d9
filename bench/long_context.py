"""Measure decode against the length of the context, beside what the bytes of K and V explain.

    python bench/long_context.py MODEL [--contexts 1024,32768] [--kv-format f32,f16] [--steps 16]

The cache is not computed but filled with noise (a saved session that is made up), so 32K tokens
take no minutes; a prompt brings the experts into memory first.  The contexts take turns, two tokens
of each, of which the second counts, in one order and then in the other: a machine's speed drifts by
more than what is measured, and a few percent hang on what ran before.  One JSON line per context:
medians of the seconds per token and in attention, bytes of K and V that a token reads, their rate,
the roof (all threads reading memory: `bench_kernels` before and after, which `make -C bench`
builds), and resident memory beside the plan.  `growth_over_bytes` is the verdict: the time that a
token takes longer than that of the first context beside it, over the time that the roof needs for
the K and V in between; 1 or less is the aim.  `attention_growth_over_bytes` is that of the
attention blocks alone.
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
from flashmoe.system import core_count, resident_bytes

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


def in_turn(core, sessions: list, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the seconds of every token and of its attention, by token and session, and misses."""
    seconds, attention = np.empty((2, len(tokens), len(sessions)))
    misses = 0
    for i, token in enumerate(tokens):
        order = list(enumerate(sessions))
        for j, session in order if i % 2 == 0 else order[::-1]:
            session.step(int(token))  # not counted: caches hold another context's
            core.reset_stats()
            start = time.perf_counter()
            session.step(int(token))
            seconds[i, j] = time.perf_counter() - start
            stats = core.stats()
            attention[i, j] = stats["attention_ns"] * 1e-9
            misses += stats["misses"]
    return seconds, attention, misses


def measure(path: str, kv_format: str, contexts: list[int], steps: int, threads: int):
    """Return a dict per context, and the seconds of tokens and attention, by token and context."""
    core = {"kv_format": kv_format}
    longest = max(contexts) + 2 * steps + 2
    with Runner(path, {}, context=longest, prefill_chunk=16, threads=threads, **core) as r:
        config, size = r.prepared.desc.config, SIZE[kv_format]
        session = r.core.session()
        rng = np.random.default_rng(1)
        prompt = rng.integers(0, r.vocab_size, min(PROMPT, max(contexts))).astype(np.int32)
        done = 0
        while done < len(prompt):
            done += session.prefill(prompt[done:])
        session.close()
        sessions = []
        for n in contexts:
            session = r.core.session()
            session.step(1)
            session.load(filled(session.save(), n, config, kv_format))
            session.step(2)  # allocates what decoding keeps
            sessions.append(session)
        tokens = rng.integers(0, r.vocab_size, steps)
        seconds, attention, misses = in_turn(r.core, sessions, tokens)
        for n, session in zip(contexts, sessions):
            if n != max(contexts):  # the plan is for one session
                session.close()
        width = 2 * config["num_key_value_heads"] * config["head_dim"] * size
        layers = list(config["mixers"]).count(0)
        plan, info = r.plan, r.core.info
        same = {
            "bench": "long_context", "model": plan.model, "kv_format": kv_format,
            "n_threads": info["n_threads"], "cpu_variant": info["cpu_variant"], "steps": steps,
            "misses_per_token": misses / seconds.size, "state_bytes": plan.state_bytes,
            "rss_bytes": resident_bytes(), "planned_bytes": plan.total_bytes,
        }  # fmt: skip
        rows = []
        for j, n in enumerate(contexts):
            kv, att = layers * width * n, float(np.median(attention[:, j]))
            rows.append({**same, "context": n, "kv_bytes": kv,
                         "seconds_per_token": float(np.median(seconds[:, j])),
                         "attention_seconds": att, "kv_gb_per_s": kv / att / 1e9})  # fmt: skip
        return rows, seconds, attention


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
    if args.steps < 2 or args.steps % 2:
        parser.error(f"--steps {args.steps}: an even number, every second round goes the other way")
    contexts = [int(n) for n in args.contexts.split(",")]
    threads = args.threads or core_count()
    for kv_format in args.kv_format.split(","):
        before = read_gb_per_s(args.bench_kernels, threads)
        rows, seconds, attention = measure(args.model, kv_format, contexts, args.steps, threads)
        roof = statistics.mean([before, read_gb_per_s(args.bench_kernels, threads)])
        for j, row in enumerate(rows):
            row["roof_gb_per_s"] = roof
            need = (row["kv_bytes"] - rows[0]["kv_bytes"]) / (roof * 1e9)
            for name, t in (("growth", seconds), ("attention_growth", attention)):
                more = (t[:, j] - t[:, 0]).reshape(-1, 2).mean(axis=1)  # of both orders
                more = float(np.median(more))
                row[name + "_over_bytes"] = more / need if need else None
            print(json.dumps({**row, **identity()}), flush=True)


if __name__ == "__main__":
    main()
