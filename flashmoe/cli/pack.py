"""`flashmoe pack`: write the packed form of a checkpoint."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from flashmoe.cli import options as opt

__all__ = ["pack"]


def pack(
    src: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint directory.")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="Directory to make.")],
    bits: Annotated[
        str,
        typer.Option(help="Bits per weight: 4, 8, or keep; auto is 4 unless quantised already."),
    ] = "auto",
    check: Annotated[
        bool, typer.Option("--verify", help="Read everything back and check it.")
    ] = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write one contiguous, checksummed record per expert; a broken-off run is continued."""
    if bits not in ("auto", "keep") and not bits.isdigit():
        raise typer.BadParameter(f"--bits {bits}: a number, keep or auto")
    from flashmoe import pack as packing

    console = opt.stderr(quiet)
    show = not quiet and sys.stderr.isatty()
    report = packing.pack(
        src,
        dst,
        bits="auto" if bits == "auto" else None if bits == "keep" else int(bits),
        progress=show,
    )
    console.print(str(report))
    result = asdict(report)
    if check:
        verified = packing.verify(dst, progress=show)
        result["verify"] = asdict(verified)
        console.print(str(verified))
    if json:
        opt.print_json(result)
