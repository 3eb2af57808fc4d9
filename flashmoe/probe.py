"""Which way of reading around the page cache is fastest here: measured on the real files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from flashmoe import _core
from flashmoe.errors import FlashMoeError

if TYPE_CHECKING:
    from flashmoe.checkpoint.description import ModelDescription

__all__ = ["Choice", "choose_direct"]

SECONDS = 0.15
DEPTH = 8
MARGIN = 1.1
"""A method must beat the plain one by this factor, or noise would choose."""
MAX_FILES = 8


@dataclass(frozen=True, slots=True)
class Choice:
    """The value for ``io=`` and the measurement in words."""

    io: str
    reason: str


def expert_paths(desc: ModelDescription) -> list[str]:
    """Return up to ``MAX_FILES`` files that hold experts, evenly over the layers."""
    used = np.unique(np.concatenate([e.file.ravel() for e in desc.experts]))
    picked = used[np.linspace(0, len(used) - 1, min(MAX_FILES, len(used))).astype(int)]
    return [desc.files[i][0] for i in picked]


def choose_direct(desc: ModelDescription, record_bytes: int) -> Choice:
    """Measure the direct methods for some tenths of a second on random records.

    A method that this system refuses is left out; if none works, plain direct reads are named and
    opening the engine will say why they are refused.
    """
    paths = expert_paths(desc)
    block = max(4096, min(record_bytes, 16 << 20))
    speeds: dict[str, float] = {}
    for seed, (io, method) in enumerate((("direct", "pread"), ("uring", "uring"))):
        if method not in _core.io_methods():
            continue
        try:
            speeds[io] = _core.io_probe(
                paths, method, True, block, DEPTH, SECONDS, 1 + 7919 * seed
            )["gb_per_s"]
        except FlashMoeError:
            continue
    if not speeds:
        return Choice("direct", "no direct read could be measured")
    best = "direct" if "direct" in speeds else max(speeds, key=speeds.__getitem__)
    for io, speed in speeds.items():
        if speed > MARGIN * speeds[best]:
            best = io
    measured = ", ".join(f"{io} {speed:.2f} GB/s" for io, speed in speeds.items())
    return Choice(best, f"measured {measured}")
