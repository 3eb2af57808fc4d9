"""The packed form: one contiguous, checksummed record per expert (``docs/format.md``)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from flashmoe.checkpoint import open_checkpoint
from flashmoe.checkpoint.formats import bits_of
from flashmoe.errors import ArgumentError
from flashmoe.pack.job import PackReport, run
from flashmoe.pack.progress import Progress, reporter
from flashmoe.pack.recipe import Recipe
from flashmoe.pack.verify import VerifyReport, verify

__all__ = ["PackReport", "Progress", "VerifyReport", "pack", "verify"]


def pack(
    src: str | Path,
    dst: str | Path,
    *,
    bits: int | Literal["auto"] | None = "auto",
    group: int = 64,
    overrides: Mapping[str, int | None] | None = None,
    progress: Progress | bool | None = None,
    resume: bool = True,
) -> PackReport:
    """Write the packed form of a checkpoint.

    Parameters
    ----------
    src : str or Path
        A checkpoint in any form that :func:`flashmoe.checkpoint.open_checkpoint` takes.
    dst : str or Path
        The directory to make; it must not exist.  Until it is complete the files are in
        ``DST.partial``.
    bits : {2, 3, 4, 5, 6, 8}, None or "auto"
        Bits per weight, rounded to nearest; None keeps every matrix as stored.  "auto" is 4 for
        plain checkpoints and None for quantised ones.  Routers and shared-expert gates get 8.
    group : {16, 32, 64, 128}
        Weights per scale.
    overrides : mapping of str to int or None, optional
        Bits of single matrices by canonical name (``"lm_head"``, ``"experts.down"``, …).
    progress : bool or callable, optional
        True draws a bar on stderr; a callable gets (source bytes done, total).
    resume : bool
        Continue a broken-off run of the same source and recipe; otherwise begin anew.

    Returns
    -------
    PackReport

    Raises
    ------
    StorageError
        `dst` exists, the disk is too small, or reading or writing failed; ``DST.partial`` is kept.
    StateError
        ``DST.partial`` was begun from other inputs, or another run is writing it.
    ModelFileError, UnsupportedError, ArgumentError
        The source is damaged (or holds NaN), or the recipe does not fit it.
    """
    d = open_checkpoint(src)
    target = Path(dst).absolute()
    if target.name in ("", ".."):
        raise ArgumentError(f"{dst}: not a name for a new directory")
    roles = (r for e in d.experts for r in (e.gate, e.up, e.down))
    quantised = any(bits_of(t.format) for t in d.tensors) or any(bits_of(r.format) for r in roles)
    if bits == "auto":
        bits = None if quantised or d.origin == "packed" else 4
    recipe = Recipe.of(bits, group, overrides)
    with reporter(progress, f"packing {target.name}") as report:
        return run(d, target, recipe, resume, report)
