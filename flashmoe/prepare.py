"""From the constructor's arguments to a description, checked options and a memory plan.

Nothing is loaded here, so a plan can be shown, or refused, before it costs anything.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashmoe import _core
from flashmoe.errors import ArgumentError, UnsupportedError
from flashmoe.memory import MemoryPlan, plan_memory
from flashmoe.models import default_model, is_noise
from flashmoe.probe import choose_direct
from flashmoe.system import core_count

if TYPE_CHECKING:
    from flashmoe.checkpoint.description import ModelDescription

__all__ = ["Prepared", "expert_format", "prepare"]

CONTEXT = 4096
NUMERICS = ("exact", "fast")
KV_FORMATS = ("f32", "f16", "bf16")
LOOKAHEAD_AUTO = -1


@dataclass(frozen=True)
class Prepared:
    """A checkpoint ready to be loaded."""

    path: Path
    desc: ModelDescription
    core_desc: dict[str, Any]
    opts: Mapping[str, Any]
    plan: MemoryPlan
    request: Mapping[str, Any]

    def core_opts(self) -> dict[str, Any]:
        """Return the whole option dict of ``_core.Engine``."""
        plan = self.plan
        return {
            **self.opts,
            "n_slots": plan.n_slots,
            "max_rows": plan.prefill_chunk,
            "io_method": "pread" if plan.io == "direct" else plan.io,
            "io_direct": plan.io_direct,
        }

    def without_direct(self, reason: str) -> Prepared:
        """Return the same with a plan for buffered reads."""
        request = {**self.request, "direct_refused": reason}
        plan = plan_memory(lambda o: _core.Engine.plan(self.core_desc, o), self.opts, **request)
        return replace(self, plan=plan, request=request)


def prepare(
    path: str | os.PathLike[str] | None,
    *,
    experts_per_token: int | None = None,
    memory: int | str | None = None,
    io: str = "auto",
    threads: int | None = None,
    context: int | None = None,
    backend: str = "auto",
    prefill_chunk: int | None = None,
    numeric: str = "auto",
    kv_format: str = "f32",
    lookahead: int | str = "auto",
    cache_policy: str = "lru",
) -> Prepared:
    """Read a checkpoint's headers, check the options against it, and plan the memory."""
    from flashmoe.checkpoint import open_checkpoint

    methods = [m for m in _core.io_methods() if m != "fault"]
    _choice("io", io, ("auto", "direct", *methods))
    _choice("backend", backend, ("auto", *_core.backends()))
    _choice("numeric", numeric, ("auto", *NUMERICS))
    _choice("kv_format", kv_format, KV_FORMATS)
    _choice("cache_policy", cache_policy, tuple(_core.cache_policies()))
    n_threads = core_count() if threads is None else _integer("threads", threads, 1, 4096)
    desc = open_checkpoint(default_model() if path is None else Path(path).expanduser())
    directory = Path(desc.path)
    config = desc.config
    trained = int(config["num_experts_per_tok"]) if desc.experts else 0
    k = trained
    if experts_per_token is not None:
        if not trained:
            raise ArgumentError(f"{desc.path}: a dense model has no experts_per_token")
        k = _integer("experts_per_token", experts_per_token, 1, int(config["num_experts"]))
    longest = int(config["max_position_embeddings"])
    n_context = (
        min(longest, CONTEXT) if context is None else _integer("context", context, 1, longest)
    )
    if prefill_chunk is not None:
        prefill_chunk = _integer("prefill_chunk", prefill_chunk, 1, 1 << 20)
    if numeric == "auto":
        numeric = "fast" if "affine" in expert_format(desc) else "exact"
    opts = {
        "context": n_context,
        "experts_per_token": k,
        "n_threads": n_threads,
        "io_workers": 0,
        "backend": "cpu" if backend == "auto" else backend,
        "numeric": numeric,
        "kv_format": kv_format,
        "lookahead": _lookahead(lookahead),
        "cache_policy": cache_policy,
        "verify": True,
    }
    name = directory.name if path is None or Path(path).exists() else str(path)
    if is_noise(directory):
        name += " (untrained: its text is noise)"
    core_desc = desc.to_core()
    request: dict[str, Any] = {
        "memory": memory,
        "prefill_chunk": prefill_chunk,
        "io": io,
        "identity": {
            "model": name or str(directory),
            "arch": f"{desc.arch} {expert_format(desc)}",
            "backend": opts["backend"],
            "numeric": numeric,
            "kv_format": kv_format,
            "n_threads": n_threads,
            "experts_per_token": k,
            "trained_experts_per_token": trained,
        },
    }
    plan = plan_memory(lambda o: _core.Engine.plan(core_desc, o), opts, **request)
    if io == "auto" and plan.io_direct:
        choice = choose_direct(desc, plan.experts_bytes // max(plan.n_experts, 1))
        plan = replace(plan, io=choice.io, io_reason=f"{plan.io_reason}; {choice.reason}")
    return Prepared(directory, desc, core_desc, opts, plan, request)


def expert_format(desc: ModelDescription) -> str:
    """Return the formats of the experts, ``"affine4"`` or ``"affine4/bf16"``; trunk's if dense."""
    found = {r.format for e in desc.experts for r in (e.gate, e.up, e.down)}
    if not found:
        found = {t.format for t in desc.tensors if len(t.shape) == 2}
    return "/".join(sorted(found))


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UnsupportedError(
            f"{name}={value!r} is not in this build; it has: {', '.join(dict.fromkeys(choices))}"
        )


def _lookahead(value: Any) -> int:
    if value == "auto":
        return LOOKAHEAD_AUTO
    if isinstance(value, str):
        raise ArgumentError(f"lookahead={value!r} must be an integer or 'auto'")
    return _integer("lookahead", value, 0, 64)


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentError(f"{name}={value!r} must be an integer")
    if not low <= value <= high:
        raise ArgumentError(f"{name}={value} must be in {low}..{high}")
    return int(value)
