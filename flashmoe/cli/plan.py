"""`flashmoe plan`: what a model will do on a machine, from bytes alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashmoe.cli import options as opt

if TYPE_CHECKING:
    from flashmoe.perf.predict import Prediction

__all__ = ["plan"]


def plan(
    model: Annotated[
        str, typer.Option(help="A known model (397b, 122b, 35b, ...) or a checkpoint directory.")
    ],
    ssd: Annotated[float, typer.Option(help="Random direct reads of the device [GB/s].")],
    ram: Annotated[float, typer.Option(help="For the whole process [GiB].")],
    bits: Annotated[
        float | None,
        typer.Option(
            help="Of the routed experts: 2, 3, 4, 8, 16, or effective bits per weight. "
            "(default: 4, or the checkpoint's)",
            show_default=False,
        ),
    ] = None,
    experts_per_token: opt.ExpertsPerToken = None,
    mem_bw: Annotated[
        float | None,
        typer.Option(
            "--mem-bw",
            "--gpu-bw",
            help="Weights through the CPU or GPU [GB/s]. (default: not limiting)",
            show_default=False,
        ),
    ] = None,
    gflops: Annotated[
        float | None,
        typer.Option(
            help="Of matrix products over many rows. (default: not limiting)", show_default=False
        ),
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens the state is sized for.")] = 4096,
    kv_format: opt.KvFormat = "f32",
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 512,
    chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens per forward.")] = 512,
    zipf: Annotated[
        float, typer.Option(min=0, help="Exponent of the experts' popularity; 0 is uniform.")
    ] = 0.0,
    trace: Annotated[
        str | None,
        typer.Option(
            metavar="NPZ", help="Take the hit rate from a recorded routing.", show_default=False
        ),
    ] = None,
    policy: Annotated[str, typer.Option(help="Of the cache, with --trace.")] = "lru",
    json: opt.Json = False,
) -> None:
    """Predict decode and prefill speed; the formula is printed with the numbers."""
    from flashmoe.perf.geometry import geometry
    from flashmoe.perf.predict import FORMULA, Hardware, predict

    g = geometry(model, bits=bits).with_kv(kv_format)
    hw = Hardware(ssd, int(ram * 2**30), mem_bw, gflops)
    same: dict[str, Any] = {
        "k": experts_per_token, "context": context, "prompt_tokens": prompt_tokens,
        "prefill_chunk": chunk, "zipf": zipf,
        **_engine_plan(model, ram, context, chunk, kv_format),
    }  # fmt: skip
    p = predict(g, hw, **same)
    if trace is not None:
        p = predict(g, hw, **same, **_from_trace(trace, policy, p))
    if json:
        opt.print_json({**p.as_dict(), "ssd_gb_per_s": ssd, "ram_bytes": hw.ram_bytes,
                        "mem_gb_per_s": mem_bw, "gflops": gflops,
                        "kv_format": kv_format})  # fmt: skip
        return
    _show(p, hw)
    print("\n" + FORMULA)


def _engine_plan(
    model: str, ram: float, context: int, chunk: int, kv_format: str
) -> dict[str, Any]:
    """Return the engine's own slots and sizes for a checkpoint that is there."""
    path = Path(model).expanduser()
    if not path.is_dir():
        return {}
    from flashmoe.prepare import prepare

    made = prepare(str(path), memory=int(ram * 2**30), io="direct", context=context,
                   prefill_chunk=chunk, kv_format=kv_format).plan  # fmt: skip
    return {"n_slots": made.n_slots, "scratch": made.scratch_bytes,
            "overhead": made.baseline_bytes}  # fmt: skip


def _from_trace(path: str, policy: str, p: Prediction) -> dict[str, Any]:
    from flashmoe.errors import ArgumentError
    from flashmoe.perf.trace import load_trace, replay

    recorded = load_trace(path)
    if recorded.n_keys != p.n_experts or recorded.ids.shape[2] != p.experts_per_token:
        raise ArgumentError(
            f"{path}: a routing of {recorded.n_keys} experts, {recorded.ids.shape[2]} per token; "
            f"{p.model} has {p.n_experts}, {p.experts_per_token} per token"
        )
    part = "decode" if len(recorded.ids) > recorded.n_prompt else "prompt"
    (row,) = replay(recorded, [p.n_slots], [policy], part)
    return {"hit_rate": row["hit_rate"], "hit_model": f"{policy} on {path} ({part})"}


def _show(p: Prediction, hw: Any) -> None:
    from rich import print as rich_print
    from rich.table import Table

    from flashmoe.memory import format_bytes as size

    k, trained = p.experts_per_token, p.trained_experts_per_token
    table = Table(
        title=f"{p.model}, {p.bits:g} bits, {k} experts per token"
        + ("" if k == trained else f" (trained with {trained})"),
        title_justify="left", show_header=False, box=None,
    )  # fmt: skip
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    compute = p.moe_seconds + p.rest_seconds
    below = p.n_experts and p.n_slots < p.n_slots_floor
    rows = [
        ("trunk", size(p.trunk_bytes), "resident weights"),
        ("state", size(p.state_bytes), f"context of {p.context} tokens"),
        ("scratch, overhead", size(p.scratch_bytes + p.overhead_bytes), "assumed, or the engine's"),
        ("expert slots", size(p.n_slots * p.expert_bytes),
         f"{p.n_slots} of {p.n_experts}, {p.expert_bytes} bytes each"
         + (f"; fewer than one token's {p.n_slots_floor}" if below else "")),
        ("experts on disk", size(p.experts_bytes), ""),
        ("hit rate", f"{100 * p.hit_rate:.1f} %", p.hit_model),
        ("routed per token", f"{p.routed_bytes_per_token} B", "cold"),
        ("read per token", f"{p.read_bytes_per_token:.0f} B", "what the cache misses"),
        ("reads", f"{1e3 * p.io_seconds:.1f} ms", f"at {hw.ssd_gb_per_s:g} GB/s"),
        ("compute", f"{1e3 * compute:.1f} ms" if compute else "-",
         f"experts {1e3 * p.moe_seconds:.1f} ms, at {hw.mem_gb_per_s:g} GB/s"
         if hw.mem_gb_per_s else "not limiting: no --mem-bw"),
        ("decode, ceiling", f"{p.decode_ceiling:.2f} tok/s", "everything overlaps"),
        ("decode, expected", f"{p.decode_expected:.2f} tok/s", "reads overlap the experts only"),
        ("prefill", f"{p.prefill_tokens_per_second:.1f} tok/s",
         f"{p.prompt_tokens} tokens in {p.prefill_seconds:.1f} s, cold, "
         f"{size(round(p.prefill_read_bytes))} read, chunks of {p.prefill_chunk}"
         + ("" if hw.gflops else "; compute not limiting: no --gflops")),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    rich_print(table)
