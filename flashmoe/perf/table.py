"""Results of `flashmoe bench` as a table for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["print_table"]


def print_table(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a column per setting."""
    from rich import print as rich_print
    from rich.table import Table

    first = results[0]
    k, trained = first["experts_per_token"], first["trained_experts_per_token"]
    machine = first["machine"]
    title = (
        f"{first['model']}: {first['arch']}, K={k}" + ("" if k == trained else f" of {trained}")
        + f", {first['numeric']}, {first['backend']}, {machine['cpu']}, "
        + f"{machine['n_cpus']} CPUs, commit {machine['commit']}"
    )  # fmt: skip
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("", style="bold")
    for r in results:
        table.add_column(r["setting"] + (" (again)" if r["again"] else ""), justify="right")
    for row in zip(*(_rows(r) for r in results)):
        table.add_row(row[0][0], *(text for _, text in row))
    rich_print(table)
    if len(results) > 1:
        drift = results[-1].get("drift_of_first_setting", 0.0)
        print(f"drift of the first setting from first to last: {100 * drift:+.1f} %")


def _rows(r: Mapping[str, Any]) -> list[tuple[str, str]]:
    from flashmoe.memory import format_bytes

    def speed(s: Mapping[str, float]) -> str:
        return f"{s['median']:.2f} ({s['min']:.2f} - {s['max']:.2f})"

    def percent(x: float | None) -> str:
        return "-" if x is None else f"{100 * x:.1f} %"

    roof, cold = r["roof"] or {}, r["cold"]
    peak = roof.get("gb_per_s")
    return [
        ("decode tok/s", speed(r["decode_tokens_per_second"])),
        ("  cold", f"{cold['decode_tokens_per_second']['median']:.2f}"),
        ("  device ceiling", f"{r['device_ceiling_tokens_per_second']:.2f}"
         if "device_ceiling_tokens_per_second" in r else "-"),
        ("prefill tok/s", speed(r["prefill_tokens_per_second"])),
        ("  cold", f"{cold['prefill_tokens_per_second']['median']:.2f}"),
        ("first token s", speed(r["first_token_seconds"])),
        ("read per token", format_bytes(round(r["bytes_read_per_token"]))),
        ("hit rate", percent(r["hit_rate"])),
        ("device GB/s", f"{r['device_gb_per_s']:.3f} of {peak:.3f}" if peak else
         f"{r['device_gb_per_s']:.3f}"),
        ("  utilisation", percent(r.get("device_utilisation"))),
        ("larger term", r.get("larger_term", "-")),
        ("  share of it", percent(r.get("share_of_larger_term"))),
        ("wait for reads", percent(r["phases_seconds_per_token"]["wait"]
                                   * r["decode_tokens_per_second"]["median"])),
        ("slots", f"{r['n_slots']} of {r['n_experts']}"),
        ("reads", f"{r['io']}, {'direct' if r['io_direct'] else 'buffered'}"),
        ("peak RSS", format_bytes(r["rss_peak_bytes"])),
        ("planned", format_bytes(r["planned_bytes"])),
        ("drift of sentinel", f"{100 * r['drift']:+.1f} %"),
    ]  # fmt: skip
