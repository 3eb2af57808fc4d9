"""The measuring loop of `flashmoe bench`.

A setting is opened cold, run with a new prompt each time, and compared with the device's ceiling
measured right after it.  What guards against the usual traps: prompts never repeat, the tokens fed
while decoding are random unless asked otherwise (a model that repeats itself would ask for the same
experts), a sentinel run before and after shows drift, the first setting is measured again at the
end, and every result names K, format, machine and commit.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

from flashmoe.perf.machine import (
    drop_page_cache,
    identity,
    peak_rss_bytes,
    reset_peak_rss,
)
from flashmoe.perf.predict import ceiling
from flashmoe.perf.roof import measure_roof
from flashmoe.perf.runner import PHASES, Measured, Runner, random_ids
from flashmoe.perf.terms import measure_terms, terms_context
from flashmoe.prepare import prepare

__all__ = ["Setting", "Work", "bench", "open_runner", "settings_of", "spread"]

SENTINEL_TOKENS = 16
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Work:
    """What every setting has to do."""

    prompt_tokens: int = 512
    gen_tokens: int = 64
    repeat: int = 5
    feed: str = "random"  # tokens while decoding: "random" or "greedy"
    seed: int = 1
    roof: bool = True
    roof_seconds: float = 1.0  # per depth
    terms: bool = False  # reads and compute, each alone


@dataclass(frozen=True, slots=True)
class Setting:
    """How an engine is opened; None leaves a choice to the engine."""

    memory: str | None = None
    io: str = "auto"
    threads: int | None = None
    experts_per_token: int | None = None
    prefill_chunk: int | None = None
    core: Mapping[str, Any] = field(default_factory=dict)  # of prepare, or of the core itself

    def label(self) -> str:
        """Return what is set, in a few words."""
        parts = [self.memory] if self.memory else []
        parts += [self.io] if self.io != "auto" else []
        parts += [f"{self.threads} threads"] if self.threads is not None else []
        parts += [f"{k.replace('_', ' ')} {v}" for k, v in self.core.items() if v is not None]
        return ", ".join(parts) or "default"


def settings_of(
    memory: Sequence[str | None] = (None,),
    io: Sequence[str] = ("auto",),
    threads: Sequence[int | None] = (None,),
    lookahead: Sequence[int | str | None] = (None,),
    cache_policy: Sequence[str | None] = (None,),
    numeric: Sequence[str | None] = (None,),
    core: Mapping[str, Any] | None = None,
    **same: Any,
) -> list[Setting]:
    """Return every combination, the first of each list first; `core` is common to all."""
    return [
        Setting(
            m, i, t, core={"lookahead": n, "cache_policy": p, "numeric": x, **(core or {})}, **same
        )
        for x, p, n, t, i, m in itertools.product(
            numeric, cache_policy, lookahead, threads, io, memory
        )
    ]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return min, median, max, and (max - min) / median.

    >>> spread([1.0, 3.0, 2.0])
    {'min': 1.0, 'median': 2.0, 'max': 3.0, 'spread': 1.0}
    """
    low, middle, high = min(values), statistics.median(values), max(values)
    return {"min": low, "median": middle, "max": high,
            "spread": (high - low) / middle if middle else 0.0}  # fmt: skip


def bench(
    model: str | None, settings: Sequence[Setting], work: Work, say: Say = lambda text: None
) -> Iterator[dict[str, Any]]:
    """Measure every setting and yield a result each, plain data; the format is in bench/README.md.

    With several settings the first is measured again at the end; that result has
    ``"again": true`` and its drift against the first time.
    """
    machine = identity()
    first: dict[str, Any] | None = None
    runs = [(s, False) for s in settings]
    if len(settings) > 1:
        runs.append((settings[0], True))
    for setting, again in runs:
        say(f"{setting.label()}{' again' if again else ''}")
        result = _measure_setting(model, setting, work, say)
        result.update(machine=machine, again=again)
        if again and first is not None:
            was, now = (r["decode_tokens_per_second"]["median"] for r in (first, result))
            result["drift_of_first_setting"] = now / was - 1 if was else 0.0
        first = first or result
        yield result


def _measure_setting(model: str | None, setting: Setting, work: Work, say: Say) -> dict[str, Any]:
    reset = reset_peak_rss()
    with open_runner(model, setting, work) as runner:
        plan = runner.plan
        dropped = drop_page_cache(runner.files())
        cold = _run(runner, work, 0)
        say(f"  cold: {_line(cold)}")
        before = _sentinel(runner, work, 0)
        warm = []
        for i in range(1, max(work.repeat, 2)):
            warm.append(_run(runner, work, i))
            say(f"  run {i}: {_line(warm[-1])}")
        after = _sentinel(runner, work, 1)
        rss = peak_rss_bytes()
        terms = None
        if work.terms:
            terms = measure_terms(runner, work.prompt_tokens, work.gen_tokens, seed=work.seed)
            for what, t in terms.items():
                say(f"  {what}: {t['seconds']:.4f} s; I/O alone {t['io_seconds']:.4f}, compute "
                    f"{t['compute_seconds']:.4f}: {100 * t['share_of_larger_term']:.1f} % of the "
                    f"larger, device {t['io_gb_per_s']:.2f} GB/s alone")  # fmt: skip
        info, files = runner.core.info, runner.expert_files()
        opts = {k: v for k, v in runner.opts.items() if isinstance(v, (int, float, str, bool))}
        open_seconds = runner.open_seconds
        record = -(-plan.experts_bytes // max(plan.n_experts, 1))
        n_moe = len(runner.prepared.desc.experts)
    roof = None
    if work.roof and files:
        method = info["io_method"] if plan.io_direct else "pread"
        roof = measure_roof(files, record, seconds=work.roof_seconds, method=method,
                            drain_seconds=3 * work.roof_seconds, seed=work.seed)  # fmt: skip
        say("  device: " + (f"{roof['gb_per_s']:.3f} GB/s at {roof['depth']} reads in flight"
                            if roof["gb_per_s"] else roof["reason"]))  # fmt: skip
    cached = "page cache dropped before" if dropped else "page cache as it was"
    direct = "direct reads, no page cache" if plan.io_direct else f"buffered reads, {cached}"
    result: dict[str, Any] = {
        "bench": "flashmoe", "model": plan.model, "arch": plan.arch,
        "experts_per_token": plan.experts_per_token,
        "trained_experts_per_token": plan.trained_experts_per_token,
        "numeric": plan.numeric, "kv_format": plan.kv_format, "backend": plan.backend,
        "setting": setting.label(), "memory": setting.memory, "io": info["io_method"],
        "io_direct": plan.io_direct, "n_threads": info["n_threads"], "options": opts,
        "n_slots": info["n_slots"], "n_experts": plan.n_experts,
        "planned_bytes": plan.total_bytes, "budget_bytes": plan.budget_bytes,
        "rss_peak_bytes": rss, "rss_peak_is_of_this_setting": reset,
        "prompt_tokens": work.prompt_tokens, "gen_tokens": work.gen_tokens, "feed": work.feed,
        "seed": work.seed, "open_seconds": open_seconds, "cold_means": direct + ", empty slots",
        "cold": _summary([cold], roof), **_summary(warm, roof), "roof": roof,
        "sentinel_tokens_per_second": [before, after], "terms": terms,
        "drift": after / before - 1 if before else 0.0,
    }  # fmt: skip
    if roof and roof["gb_per_s"] and n_moe:
        routed = n_moe * plan.experts_per_token * record
        hit = result["hit_rate"] or 0.0
        result["routed_bytes_per_token"] = routed
        if hit < 1:
            result["device_ceiling_tokens_per_second"] = ceiling(routed, roof["gb_per_s"], hit)
    return result


def open_runner(model: str | None, setting: Setting, work: Work) -> Runner:
    """Return a runner that has room for the work, the files' cached pages dropped before."""
    from flashmoe.checkpoint import open_checkpoint
    from flashmoe.models import default_model

    # Before the plan: it measures what is free, and what earlier runs cached is not needed.
    drop_page_cache(path for path, _ in open_checkpoint(model or default_model()).files)
    given = {k: v for k, v in setting.core.items() if v is not None}
    planned = {k: v for k, v in given.items() if k in signature(prepare).parameters}
    core = {k: v for k, v in given.items() if k not in planned}
    context = work.prompt_tokens + work.gen_tokens + 1
    if work.terms:
        context = max(context, terms_context(work.prompt_tokens, work.gen_tokens))
    return Runner(
        model, core, memory=setting.memory, io=setting.io, threads=setting.threads,
        experts_per_token=setting.experts_per_token, prefill_chunk=setting.prefill_chunk,
        context=context, **planned,
    )  # fmt: skip


def _run(runner: Runner, work: Work, number: int) -> Measured:
    prompt = random_ids(runner.vocab_size, work.prompt_tokens, work.seed, number, 0)
    feed = None
    if work.feed == "random":
        feed = random_ids(runner.vocab_size, work.gen_tokens, work.seed, number, 1)
    return runner.measure(prompt, work.gen_tokens, feed)


def _sentinel(runner: Runner, work: Work, number: int) -> float:
    """Return tokens per second of a short decode, alike before and after the runs."""
    n = min(SENTINEL_TOKENS, work.gen_tokens)
    prompt = random_ids(runner.vocab_size, min(8, work.prompt_tokens), work.seed, number, 2)
    feed = random_ids(runner.vocab_size, n, work.seed, number, 3)
    return _rate(runner.measure(prompt, n, feed))


def _rate(m: Measured) -> float:
    return m.decode_tokens / m.decode_seconds if m.decode_seconds > 0 else 0.0


def _prefill_rate(m: Measured) -> float:
    return m.prompt_tokens / max(m.first_token_seconds, 1e-9)


def _line(m: Measured) -> str:
    read = m.decode["bytes_read"] / max(m.decode_tokens, 1) / 1e6
    return (f"prompt {_prefill_rate(m):.1f} tok/s, output {_rate(m):.2f} tok/s, "
            f"{read:.1f} MB read per token")  # fmt: skip


def _summary(runs: Sequence[Measured], roof: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return speeds and counters of some runs."""
    n_tokens = sum(m.decode_tokens for m in runs)
    seconds = sum(m.decode_seconds for m in runs)
    total = {k: sum(int(m.decode[k]) for m in runs) for k in runs[0].decode}
    prefill = {k: sum(int(m.prefill[k]) for m in runs) for k in runs[0].prefill}
    asked = total["hits"] + total["misses"]
    every = sorted(t for m in runs for t in m.token_seconds) or [0.0]
    wait = total["wait_ns"] * 1e-9
    ttft = sum(m.first_token_seconds for m in runs)
    out: dict[str, Any] = {
        "decode_tokens_per_second": spread([_rate(m) for m in runs]),
        "prefill_tokens_per_second": spread([_prefill_rate(m) for m in runs]),
        "first_token_seconds": spread([m.first_token_seconds for m in runs]),
        "token_seconds_p50": every[len(every) // 2],
        "token_seconds_p99": every[int(0.99 * len(every))],
        "decode_tokens": n_tokens,
        "bytes_read_per_token": total["bytes_read"] / max(n_tokens, 1),
        "hit_rate": total["hits"] / asked if asked else None,
        "device_gb_per_s": total["bytes_read"] / max(seconds, 1e-9) * 1e-9,
        "prefill_bytes_read": prefill["bytes_read"] / len(runs),
        "prefill_device_gb_per_s": prefill["bytes_read"] / max(ttft, 1e-9) * 1e-9,
        "guessed": total["guessed"], "guess_used": total["guess_used"],
        "guess_wasted_bytes": total["guess_wasted_bytes"],
        "phases_seconds_per_token": _phases(total, n_tokens, seconds),
        "prefill_phases_seconds": _phases(prefill, len(runs), ttft),
    }  # fmt: skip
    if roof and roof["gb_per_s"]:
        peak = roof["gb_per_s"] * 1e9
        out["device_utilisation"] = out["device_gb_per_s"] / roof["gb_per_s"]
        out["prefill_device_utilisation"] = out["prefill_device_gb_per_s"] / roof["gb_per_s"]
        io, compute = total["bytes_read"] / peak, max(seconds - wait, 0.0)
        out["larger_term"] = "I/O" if io > compute else "compute"
        # 1: the slower of device and processor never waits
        out["share_of_larger_term"] = max(io, compute) / max(seconds, 1e-9)
    return out


def _phases(total: Mapping[str, int], n: int, seconds: float) -> dict[str, float]:
    parts = {p: total.get(f"{p}_ns", 0) * 1e-9 / max(n, 1) for p in PHASES}
    parts["other"] = max(seconds / max(n, 1) - sum(parts.values()), 0.0)
    return parts
