"""Write docs/cli.md from the commands themselves: `python tools/make_cli_docs.py`."""

from __future__ import annotations

import inspect
from pathlib import Path

import typer.main

from flashmoe.cli import app


def render() -> str:
    """Return the page."""
    lines = [
        "# The command line",
        "",
        "Made by `python tools/make_cli_docs.py`. Answers go to stdout, all else to stderr; exit",
        "status is 0, 1 (error), 2 (wrong usage) or 130 (interrupted). `python -m flashmoe` is the",
        "same command.",
    ]
    for name, command in typer.main.get_command(app).commands.items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option"]
        usage = [p.metavar if p.required else f"[{p.metavar}]" for p in arguments]
        lines += ["", f"## flashmoe {name} {' '.join(usage)}", "", inspect.cleandoc(command.help)]
        rows = [(p.metavar, p.help) for p in arguments]
        rows += [(", ".join([*p.opts, *p.secondary_opts]), p.help) for p in options]
        lines += ["", "| | |", "|---|---|"]
        lines += [f"| `{flags}` | {text} |" for flags, text in rows if flags != "--help, -h"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    target = Path(__file__).resolve().parent.parent / "docs" / "cli.md"
    target.write_text(render())
