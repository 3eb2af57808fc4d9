"""Pictures of measurements; needs matplotlib, which ``flashmoe-engine[plot]`` brings."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from flashmoe.errors import StorageError, UnsupportedError
from flashmoe.perf.runner import PHASES

__all__ = ["check_plotting", "plot_bench", "plot_heat_map", "plot_hit_rates"]

# Waiting for reads stands out; the rest are muted and told apart by hue.
_COLOURS = {
    "embed": "#bab0ac", "attention": "#4e79a7", "delta": "#76b7b2", "router": "#b07aa1",
    "experts": "#59a14f", "wait": "#e15759", "shared": "#8cd17d", "mlp": "#9c755f",
    "head": "#f1ce63", "other": "#d7d7d7",
}  # fmt: skip
_DPI = 130


def check_plotting() -> None:
    """Raise UnsupportedError if pictures cannot be drawn here."""
    _figure(1)


def _figure(n_columns: int, width: float = 6.4, height: float = 4.4) -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as e:
        raise UnsupportedError(
            "pictures need matplotlib, which is not installed: pip install 'flashmoe-engine[plot]'"
        ) from e
    figure = Figure(figsize=(width * n_columns, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, n_columns, squeeze=False)[0]


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    try:
        figure.savefig(path, dpi=_DPI)
    except OSError as e:
        raise StorageError(e.errno, e.strerror, str(path)) from e
    except ValueError as e:  # an ending that names no picture format
        raise UnsupportedError(f"{path}: {e}") from e


def plot_bench(results: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw where a token's time goes per setting, and speed against memory if there are budgets.

    Parameters
    ----------
    results : sequence of mapping
        What :func:`flashmoe.perf.bench.bench` yields, or lines of a results file.
    path : path-like
        ``.png``, ``.svg`` or ``.pdf``.
    """
    shown = [r for r in results if not r.get("again")]
    budgets = {r["budget_bytes"] for r in shown if r.get("memory")}
    figure, axes = _figure(2 if len(budgets) > 1 else 1)
    _phases(axes[0], shown)
    if len(budgets) > 1:
        _speed_by_memory(axes[1], [r for r in shown if r.get("memory")])
    first = shown[0]
    k, trained = first["experts_per_token"], first["trained_experts_per_token"]
    machine = first.get("machine", {})
    figure.suptitle(
        f"{first['model']}: {first['arch']}, K={k}" + ("" if k == trained else f" of {trained}")
        + f", {first['numeric']}\n{machine.get('cpu', '')}, commit {machine.get('commit')}, "
        + machine.get("date", ""),
        fontsize=9,
    )  # fmt: skip
    _save(figure, path)


def _phases(ax: Any, results: Sequence[Mapping[str, Any]]) -> None:
    labels = [r["setting"] for r in results]
    at = list(range(len(results)))
    bottom = [0.0] * len(results)
    for phase in (*PHASES, "other"):
        ms = [1e3 * r["phases_seconds_per_token"].get(phase, 0.0) for r in results]
        if max(ms) <= 0:
            continue
        ax.bar(at, ms, bottom=bottom, color=_COLOURS[phase], width=0.6,
               label="wait for reads" if phase == "wait" else phase)  # fmt: skip
        bottom = [b + m for b, m in zip(bottom, ms)]
    for x, top, r in zip(at, bottom, results):
        speed = r["decode_tokens_per_second"]["median"]
        ax.annotate(f"{speed:.2f} tok/s", (x, top), ha="center", va="bottom", fontsize=8)
    ax.set_xticks(at, labels, fontsize=8, rotation=20 if max(map(len, labels)) > 12 else 0)
    ax.set_ylabel("ms per decoded token")
    ax.set_ylim(0, 1.12 * max(bottom) or 1)
    ax.margins(x=0.15)
    ax.legend(fontsize=7, reverse=True, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def _speed_by_memory(ax: Any, results: Sequence[Mapping[str, Any]]) -> None:
    series: dict[str, list[Mapping[str, Any]]] = {}
    for r in results:
        name = ", ".join(p for p in r["setting"].split(", ") if p != r["memory"]) or "measured"
        series.setdefault(name, []).append(r)
    for name, rows in series.items():
        rows = sorted(rows, key=lambda r: float(r["budget_bytes"]))
        x = [r["budget_bytes"] / 2**30 for r in rows]
        mid = [r["decode_tokens_per_second"]["median"] for r in rows]
        low = [m - r["decode_tokens_per_second"]["min"] for m, r in zip(mid, rows)]
        high = [r["decode_tokens_per_second"]["max"] - m for m, r in zip(mid, rows)]
        ax.errorbar(x, mid, [low, high], marker="o", capsize=3, label=name)
    with_roof = sorted(
        (r["budget_bytes"] / 2**30, r["device_ceiling_tokens_per_second"])
        for r in results
        if r.get("device_ceiling_tokens_per_second")
    )
    if with_roof:
        ax.plot(*zip(*with_roof), color="#888888", ls="--", lw=1, label="device ceiling")
    top = max(r["decode_tokens_per_second"]["max"] for r in results)
    ax.set_ylim(0, 1.6 * top)
    ax.set_xlabel("memory budget, GiB")
    ax.set_ylabel("decoded tokens per second")
    ax.legend(fontsize=8, frameon=False)
    ax.spines[["top", "right"]].set_visible(False)


def plot_heat_map(counts: Any, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw how often each expert was picked.

    Parameters
    ----------
    counts : ndarray of shape (n_layers, n_experts)
    path : path-like
    title : str
    """
    import numpy as np

    figure, (as_is, ranked) = _figure(2, 6.8)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    for ax, values, x in (
        (as_is, share, "expert"),
        (ranked, -np.sort(-share, axis=1), "expert, most used of its layer first"),
    ):
        image = ax.imshow(100 * values, aspect="auto", interpolation="nearest", cmap="magma")
        ax.set_xlabel(x)
        ax.set_ylabel("layer")
    figure.colorbar(image, ax=[as_is, ranked], label="share of the layer's picks, %")
    figure.suptitle(title, fontsize=9)
    _save(figure, path)


def plot_hit_rates(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw the hit rates that :func:`flashmoe.perf.trace.replay` found against the cache's size."""
    figure, (ax,) = _figure(1)
    for policy in dict.fromkeys(r["policy"] for r in rows):
        mine = sorted((r["n_slots"], r["hit_rate"]) for r in rows if r["policy"] == policy)
        bound = policy == "belady"
        ax.plot(*zip(*mine), marker="o", ms=3, label="Belady (bound)" if bound else policy,
                ls="--" if bound else "-", color="#888888" if bound else None)  # fmt: skip
    ax.set_xlabel("expert slots")
    ax.set_ylabel("hit rate")
    ax.set_ylim(0, 1)
    ax.legend(frameon=False, fontsize=8)
    ax.spines[["top", "right"]].set_visible(False)
    _save(figure, path)
