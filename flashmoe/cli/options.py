"""Options that several subcommands take, and what they share in showing things."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = [
    "Backend",
    "CachePolicy",
    "Context",
    "ExpertsPerToken",
    "Io",
    "Json",
    "KvFormat",
    "Lookahead",
    "Memory",
    "Numeric",
    "PrefillChunk",
    "Quiet",
    "Threads",
    "print_json",
    "stderr",
]

Memory = Annotated[
    str | None,
    typer.Option(
        help="Budget for the whole process, e.g. 8GiB. (default: what is free)", show_default=False
    ),
]
Io = Annotated[
    str,
    typer.Option(help="auto; direct or uring, around the page cache; pread or mmap, through it."),
]
Numeric = Annotated[
    str,
    typer.Option(
        help="exact; fast: activations rounded to 15 bits in quantised products; auto: fast for "
        "quantised models."
    ),
]
KvFormat = Annotated[
    str,
    typer.Option(
        help="Of the attention's keys and values: f32; f16 or bf16, half the memory, rounded."
    ),
]
Lookahead = Annotated[
    str,
    typer.Option(
        help="Experts per token read on a guess for the next layer, or auto: those that pay."
    ),
]
CachePolicy = Annotated[str, typer.Option(help="Who leaves the expert slots: lru, clock or lfu.")]
PrefillChunk = Annotated[
    int | None,
    typer.Option(
        help="Tokens per forward while reading the prompt. (default: 512, less if memory is tight)",
        show_default=False,
    ),
]
Threads = Annotated[
    int | None, typer.Option(help="Compute threads. (default: fast cores)", show_default=False)
]
Context = Annotated[
    int | None,
    typer.Option(
        help="Tokens a session can hold. (default: the model's, at most 4096)", show_default=False
    ),
]
ExpertsPerToken = Annotated[
    int | None,
    typer.Option(
        "--experts-per-token",
        "-k",
        help="Experts per token. (default: as trained)",
        show_default=False,
    ),
]
Backend = Annotated[str, typer.Option(help="auto, cpu or metal.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr but errors.")]


def stderr(quiet: bool = False) -> Console:
    """Return a console on stderr."""
    return Console(file=sys.stderr, quiet=quiet, highlight=False, markup=False, soft_wrap=True)


def lookahead(text: str) -> int | str:
    """Return the number, or "auto"; ValueError for anything else."""
    return text if text == "auto" else int(text)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False, indent=2, default=str))
