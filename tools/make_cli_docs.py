"""Write docs/cli.md from the commands themselves: `python tools/make_cli_docs.py`."""

from __future__ import annotations

import inspect
from pathlib import Path

import typer.main

from flashmoe.cli import app


def commands(group, prefix: str):
    """Yield (full name, command) of a group and the groups in it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", command


def render() -> str:
    """Return the page."""
    lines = [
        "# The command line",
        "",
        "Made by `python tools/make_cli_docs.py`. Answers go to stdout, all else to stderr; exit",
        "status is 0, 1 (error), 2 (wrong usage) or 130 (interrupted). `python -m flashmoe` is the",
        "same command.",
    ]
    for name, command in commands(typer.main.get_command(app), "flashmoe"):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = [p.metavar if p.required else f"[{p.metavar}]" for p in arguments]
        lines += ["", f"## {' '.join([name, *usage])}", "", inspect.cleandoc(command.help or "")]
        rows = [(p.metavar, p.help) for p in arguments]
        rows += [(", ".join([*p.opts, *p.secondary_opts]), p.help) for p in options]
        rows = [(flags, text) for flags, text in rows if not flags.startswith("--help")]
        lines += ["", "| | |", "|---|---|"] if rows else []
        lines += [f"| `{flags}` | {text} |" for flags, text in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
    target.write_text(render())
