"""`flashmoe doctor --metal`: every kernel of a backend on its real device, judged by the CPU."""

from __future__ import annotations

from typing import Any

import typer

from flashmoe import __version__
from flashmoe.cli import options as opt

__all__ = ["show_conformance"]


def show_conformance(backend: str, *, small: bool, json: bool) -> None:
    """Run the conformance suite and print it; exit status 1 when a case is wrong.

    Raises
    ------
    UnsupportedError
        The backend is not in this build, or the machine has no such device.
    """
    from flashmoe import _core
    from flashmoe.system import cpu_count

    found = _core.backend_check(backend, small, cpu_count())
    cases = found["cases"]
    report = {"flashmoe": __version__, "backend": backend, **found}
    report["n_wrong"] = sum(bool(c["message"]) for c in cases)
    if json:
        opt.print_json(report)
    else:
        _print(report)
    if report["n_wrong"]:
        raise typer.Exit(1)


def _family(case: dict[str, Any]) -> tuple[str, str]:
    """Return a case's op and, for ops on weights, their format."""
    has_format = case["op"] in ("embed", "matmul", "experts")
    return case["op"], case["sizes"].split()[0] if has_format else ""


def _print(report: dict[str, Any]) -> None:
    from rich import print as rich_print
    from rich.markup import escape
    from rich.table import Table

    from flashmoe.memory import format_bytes

    limits = {"memory": report["max_bytes"], "one buffer": report["max_buffer_bytes"]}
    words = [f"{name} {format_bytes(n)}" for name, n in limits.items() if n]
    rich_print(f"{escape(report['device'])}: {', '.join(words)}; flashmoe {report['flashmoe']}")
    families: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in report["cases"]:
        families.setdefault(_family(case), []).append(case)
    table = Table("op", "weights", "cases", "worst error / bound", "", box=None)
    for (op, weights), cases in families.items():
        n_wrong = sum(bool(c["message"]) for c in cases)
        verdict = f"{n_wrong} WRONG" if n_wrong else "ok"
        worst = max(c["worst"] for c in cases)
        table.add_row(op, weights, str(len(cases)), f"{worst:.3f}", verdict)
    rich_print(table)
    speeds = Table("op", "sizes", "us", "GB/s", box=None)
    for case in report["cases"]:
        if case["gb_per_s"]:
            speeds.add_row(
                case["op"], escape(case["sizes"]), f"{case['us']:.1f}", f"{case['gb_per_s']:.1f}"
            )
    rich_print(speeds)
    for case in report["cases"]:
        if case["message"]:
            rich_print(f"WRONG {case['op']} {escape(case['sizes'])}: {escape(case['message'])}")
    n, n_wrong = len(report["cases"]), report["n_wrong"]
    rich_print(f"{n_wrong} of {n} cases are wrong" if n_wrong else f"all {n} cases are right")
