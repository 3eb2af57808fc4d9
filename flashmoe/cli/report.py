"""What a generation reports about itself: one line for people, one object for machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from flashmoe.generation import Piece
from flashmoe.memory import MemoryPlan, format_bytes

__all__ = ["hit_rate", "plan_to_json", "summary", "to_json"]


def hit_rate(stats: Mapping[str, Any]) -> float | None:
    """Return the share of routed experts found in memory, None if none was asked for."""
    hits, misses = int(stats.get("hits", 0)), int(stats.get("misses", 0))
    return hits / (hits + misses) if hits + misses else None


def summary(plan: MemoryPlan, pieces: Sequence[Piece], stats: Mapping[str, Any]) -> str:
    """Return one line: speeds, experts per token, format, bytes read, hit rate."""
    last = pieces[-1]
    parts = []
    if last.usage is not None and last.timings is not None:
        t = last.timings
        parts.append(f"prompt {t.prefill_tokens} tokens, {t.prefill_tokens_per_second:.1f} tok/s")
        parts.append(
            f"output {last.usage.completion_tokens} tokens, {t.decode_tokens_per_second:.1f} tok/s"
        )
    k, trained = plan.experts_per_token, plan.trained_experts_per_token
    if trained:
        parts.append(f"K={k}" + ("" if k == trained else f" (trained {trained})"))
    parts.append(plan.arch)
    if plan.numeric != "exact":
        parts.append(f"numeric {plan.numeric}")
    if plan.kv_format != "f32":
        parts.append(f"KV {plan.kv_format}")
    parts.append(f"read {format_bytes(int(stats.get('bytes_read', 0)))}")
    rate = hit_rate(stats)
    if rate is not None:
        parts.append(f"hit rate {100 * rate:.0f} %")
    parts.append(str(last.finish_reason))
    return " | ".join(parts)


def plan_to_json(plan: MemoryPlan) -> dict[str, Any]:
    """Return the plan's fields and sums."""
    return {**asdict(plan), "slots_bytes": plan.slots_bytes, "total_bytes": plan.total_bytes}


def to_json(plan: MemoryPlan, pieces: Sequence[Piece], stats: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything about a generation as plain data."""
    last = pieces[-1]
    logprobs = [asdict(p) for piece in pieces for p in piece.logprobs]
    timings = last.timings
    return {
        "model": plan.model,
        "text": "".join(piece.text for piece in pieces),
        "token_ids": [i for piece in pieces for i in piece.token_ids],
        "finish_reason": last.finish_reason,
        "stopped_by": last.stopped_by,
        "usage": {**asdict(last.usage), "total_tokens": last.usage.total_tokens}
        if last.usage
        else None,
        "timings": {
            **asdict(timings),
            "prefill_tokens_per_second": timings.prefill_tokens_per_second,
            "decode_tokens_per_second": timings.decode_tokens_per_second,
        }
        if timings
        else None,
        "logprobs": logprobs or None,
        "experts_per_token": plan.experts_per_token,
        "trained_experts_per_token": plan.trained_experts_per_token,
        "numeric": plan.numeric,
        "kv_format": plan.kv_format,
        "plan": plan_to_json(plan),
        "stats": dict(stats),
    }
