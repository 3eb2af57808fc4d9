"""The tensors of a checkpoint directory: all shards put together, still under their own names."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from flashmoe.checkpoint.safetensors_file import Tensor, read_header
from flashmoe.config import load_json, nearest
from flashmoe.errors import ModelFileError, StorageError

__all__ = ["TensorTable", "read_tensors"]

INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(slots=True)
class TensorTable:
    """Every tensor of the checkpoint by name, and the files they lie in."""

    directory: Path
    files: list[tuple[str, int]] = field(default_factory=list)  # absolute path, size [bytes]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def file_of(self, t: Tensor) -> str:
        """Return the path of the file that holds `t`."""
        return self.files[t.file][0]

    def add(self, path: Path) -> None:
        """Add one safetensors file; a name that another file has already is an error."""
        h = read_header(path, len(self.files))
        twice = h.tensors.keys() & self.tensors.keys()
        if twice:
            name = min(twice)
            raise ModelFileError(
                f"{path}: tensor {name!r} is also in {self.file_of(self.tensors[name])}"
            )
        self.files.append((str(path.absolute()), h.size))
        self.tensors.update(h.tensors)
        self.metadata.update(h.metadata)


def read_tensors(directory: Path) -> TensorTable:
    """Read the headers of all weight files of a directory.

    Uses ``model.safetensors.index.json`` if it is there (every listed shard and tensor must
    exist), else ``model*.safetensors``.  Tensors of a listed shard that the index does not name
    are taken as well, as the reference loaders do.

    Raises
    ------
    ModelFileError
        No weights, a missing shard, a tensor missing from its shard, or one in two shards.
    """
    table = TensorTable(directory)
    index = directory / INDEX
    if not index.is_file():
        names = sorted(p.name for p in directory.glob("model*.safetensors"))
        if not names:
            raise ModelFileError(f"{directory}: no model*.safetensors and no {INDEX}")
        _check_complete(directory, names)
        for name in names:
            table.add(directory / name)
        return table
    weight_map = load_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index}: weight_map is missing, empty or not an object")
    shards: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise ModelFileError(f"{index}: tensor {tensor!r} is in {shard!r}, not a file name")
        shards.setdefault(shard, []).append(tensor)
    for shard in sorted(shards):
        path = directory / shard
        try:
            there = path.is_file()
        except (OSError, ValueError):
            there = False
        if not there:
            raise ModelFileError(
                f"{path}: missing; {INDEX} puts {len(shards[shard])} tensors in it"
                f"{nearest(shard, (p.name for p in directory.glob('*.safetensors')))}"
            )
        before = len(table.files)
        table.add(path)
        for tensor in shards[shard]:
            t = table.tensors.get(tensor)
            if t is None or t.file != before:
                raise ModelFileError(f"{path}: tensor {tensor!r} is missing; {INDEX} puts it here")
    return table


def _check_complete(directory: Path, names: list[str]) -> None:
    """Without an index, ``-00001-of-00004`` in a name still tells how many shards there are."""
    have = set(names)
    for name in names:
        m = _SHARD.fullmatch(name)
        if m is None:
            continue
        for i in range(1, int(m[3]) + 1):
            want = f"{m[1]}-{i:05d}-of-{m[3]}.safetensors"
            if want not in have:
                raise ModelFileError(f"{directory / want}: missing; {name} says {m[3]} shards")


def is_directory(path: Path) -> bool:
    """Tell whether `path` is a directory; a path the system cannot even look at is an error."""
    try:
        return path.is_dir()
    except (OSError, ValueError) as e:
        raise StorageError(getattr(e, "errno", None), str(e), str(path)) from e
