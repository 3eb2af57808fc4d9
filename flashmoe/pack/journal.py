"""What a broken-off pack run left behind: finished files with their checksums, and from what.

The journal is replaced atomically after every finished file, so it never claims more than there is.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe._core import crc32c
from flashmoe.config import load_json
from flashmoe.errors import ModelFileError, StateError
from flashmoe.pack.layout import PlannedFile
from flashmoe.pack.source import storage_errors

__all__ = ["Journal", "check_units", "fsync_directory", "locked"]

NAME = "journal.json"


class Journal:
    """The journal of one ``….partial`` directory.

    Parameters
    ----------
    directory : Path
    key : dict
        Everything the output depends on; a run with another key must not continue this one.
    """

    def __init__(self, directory: Path, key: dict[str, Any]) -> None:
        self.directory, self.key = directory, json.loads(json.dumps(key))
        self.done: dict[str, list[int]] = {}

    def load(self) -> None:
        """Read the journal if there is one.

        Raises
        ------
        StateError
            It was begun from other inputs.
        """
        path = self.directory / NAME
        if not path.exists():
            return
        try:
            doc = load_json(path)
            old, done = doc["key"], doc["done"]
            ok = isinstance(old, dict) and isinstance(done, dict)
        except (ModelFileError, KeyError):
            ok = False
        if not ok:
            raise StateError(f"{path}: damaged; delete {self.directory} to begin anew")
        for what in sorted(old.keys() | self.key.keys()):
            if old.get(what) != self.key.get(what):
                raise StateError(
                    f"{self.directory}: begun with another {what} "
                    f"({_difference(old.get(what), self.key.get(what))}); delete the directory, or "
                    "pack with resume=False, to begin anew"
                )
        self.done = done

    def finish(self, name: str, crcs: list[int]) -> None:
        """Record a file as complete; its bytes are on disk already."""
        self.done[name] = crcs
        path = self.directory / NAME
        new = path.with_name(NAME + ".new")
        with storage_errors(str(path)):
            with open(new, "w", encoding="utf-8") as f:
                json.dump({"key": self.key, "done": self.done}, f)
                f.flush()
                os.fsync(f.fileno())
            os.replace(new, path)
            fsync_directory(self.directory)

    def holds(self, planned: PlannedFile) -> list[int] | None:
        """Return the checksums of a file if it is finished and its bytes are still right."""
        crcs = self.done.get(planned.name)
        path = self.directory / planned.name
        if not isinstance(crcs, list) or len(crcs) != len(planned.units) or not path.is_file():
            return None
        with storage_errors(str(path)), open(path, "rb") as f:
            if os.fstat(f.fileno()).st_size != planned.size:
                return None
            if f.read(len(planned.header)) != planned.header:
                return None
            return crcs if check_units(f, planned, crcs) is None else None


def check_units(f: Any, planned: PlannedFile, crcs: list[int]) -> str | None:
    """Return the name of the first unit whose checksum is wrong, or None."""
    buffer = np.empty(8 << 20, np.uint8)
    for unit, want in zip(planned.units, crcs, strict=True):
        f.seek(unit.offset)
        crc, left = 0, unit.n_bytes
        while left:
            n = f.readinto(buffer.data[: min(left, buffer.size)])
            if not n:
                return unit.name
            crc = crc32c(buffer[:n], crc)
            left -= n
        if crc != want:
            return unit.name
    return None


def fsync_directory(directory: Path) -> None:
    """Make renames and new names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold the directory; a second run on it is refused."""
    with storage_errors(str(directory)):
        fd = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise StateError(f"{directory}: another pack run is writing here") from e
        except OSError:
            pass  # a file system without locks: go without
        yield
    finally:
        os.close(fd)


def _difference(old: Any, new: Any) -> str:
    """Say in few words how two keys differ."""
    if isinstance(old, list) and isinstance(new, list):
        for a, b in zip(old, new, strict=False):
            if a != b:
                return f"{a} then, {b} now"
        return f"{len(old)} then, {len(new)} now"
    return f"{old} then, {new} now"
