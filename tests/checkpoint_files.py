"""Help for tests about checkpoints: read and write safetensors files without the package."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).resolve().parent / "golden"
MODELS = sorted(json.loads((GOLDEN / "MANIFEST.json").read_text())["models"])
TWINS = sorted(str(p.parent.relative_to(GOLDEN)) for p in GOLDEN.glob("*/*/config.json"))


@dataclass
class Stored:
    """A tensor as it lies in a file."""

    dtype: str
    shape: list[int]
    data: bytes


def read(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file."""
    raw = path.read_bytes()
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + n])
    header.pop("__metadata__", None)
    return {
        k: Stored(t["dtype"], t["shape"], raw[8 + n + t["data_offsets"][0] :][: t["data_offsets"][1]
                  - t["data_offsets"][0]])
        for k, t in header.items()
    }  # fmt: skip


def header_of(tensors: dict[str, Stored]) -> dict[str, Any]:
    """Return the header object of a file of these tensors, in order."""
    out, at = {}, 0
    for k, t in tensors.items():
        out[k] = {"dtype": t.dtype, "shape": t.shape, "data_offsets": [at, at + len(t.data)]}
        at += len(t.data)
    return out


def write(path: Path, tensors: dict[str, Stored], header: Any = None) -> None:
    """Write tensors; `header` replaces the right header object (or is its bytes)."""
    if header is None:
        header = header_of(tensors)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    body = b"".join(t.data for t in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


def write_shards(directory: Path, tensors: dict[str, Stored], n: int) -> None:
    """Write tensors round-robin into `n` shards with an index."""
    names = [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    parts: list[dict[str, Stored]] = [{} for _ in range(n)]
    for i, (k, t) in enumerate(tensors.items()):
        parts[i % n][k] = t
    for name, part in zip(names, parts, strict=True):
        write(directory / name, part)
    weight_map = {k: names[i % n] for i, k in enumerate(tensors)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def copy(name: str, to: Path) -> Path:
    """Copy a golden checkpoint (not its twins) to a new directory."""
    to.mkdir(parents=True)
    for f in (GOLDEN / name).iterdir():
        if f.is_file() and f.name != "golden.npz":
            shutil.copy(f, to / f.name)
    return to


def change_config(d: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Apply `change` to the object in config.json."""
    config = json.loads((d / "config.json").read_text())
    change(config)
    (d / "config.json").write_text(json.dumps(config))


def change_tensors(d: Path, change: Callable[[dict[str, Stored]], None]) -> None:
    """Apply `change` to the tensors of model.safetensors."""
    tensors = read(d / "model.safetensors")
    change(tensors)
    write(d / "model.safetensors", tensors)


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the text level of a config."""
    return config.get("text_config", config)


def cut(t: Stored, start: int, stop: int) -> Stored:
    """Return rows start..stop-1 of a tensor."""
    row = len(t.data) // t.shape[0]
    return Stored(t.dtype, [stop - start, *t.shape[1:]], t.data[start * row : stop * row])


def gather(files: list[tuple[str, int]], pieces: Any) -> np.ndarray:
    """Return the bytes of pieces of a description's files."""
    parts = []
    for p in pieces:
        with open(files[p.file][0], "rb") as f:
            f.seek(p.offset)
            data = f.read(p.n_bytes)
        assert len(data) == p.n_bytes
        parts.append(np.frombuffer(data, np.uint8))
    return np.concatenate(parts)
