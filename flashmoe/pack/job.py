"""One pack run: plan, check the disk, write file after file, finish with a rename.

Everything is written to ``DST.partial``; DST appears only when it is complete.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flashmoe
from flashmoe.checkpoint.description import ModelDescription
from flashmoe.checkpoint.packed import DOCUMENT, FORMAT, VERSION
from flashmoe.errors import StateError, StorageError
from flashmoe.pack.journal import NAME as JOURNAL
from flashmoe.pack.journal import Journal, fsync_directory, locked
from flashmoe.pack.layout import ExtraFile, LayerFile, PlannedFile, TrunkFile, pwrite_all
from flashmoe.pack.recipe import Recipe
from flashmoe.pack.source import SourceFiles, storage_errors

__all__ = ["PackReport", "run"]

COPIED = ("config.json", "generation_config.json", "tokenizer*", "*.tiktoken", "vocab.*",
          "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja",
          "LICENSE*", "NOTICE*", "README*", "USE_POLICY*")  # fmt: skip
_SLACK_BYTES = 1 << 20  # directory entries, journal


@dataclass(frozen=True, slots=True)
class PackReport:
    """What a pack run did; ``str()`` is a short text for people."""

    path: Path
    arch: str
    source_bytes: int  # of weights read or found done
    packed_bytes: int  # of the whole directory
    seconds: float
    recipe: dict[str, Any]
    formats: dict[str, int] = field(default_factory=dict)  # format -> number of matrices
    kept: tuple[str, ...] = ()  # left as stored: the group does not divide the columns
    resumed: tuple[str, ...] = ()  # files found finished from an earlier run

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {f}" for f, n in sorted(self.formats.items()))
        text = (
            f"{self.path}: {self.arch}, {self.packed_bytes / 1e9:.3f} GB from "
            f"{self.source_bytes / 1e9:.3f} GB in {self.seconds:.1f} s; matrices: {kinds}"
        )
        if self.kept:
            text += f"; {len(self.kept)} kept as stored (columns not a multiple of the group)"
        if self.resumed:
            text += f"; {len(self.resumed)} files were finished already"
        return text


def run(
    d: ModelDescription, dst: Path, recipe: Recipe, resume: bool, report: Callable[[int, int], None]
) -> PackReport:
    """Write the packed form of `d` to `dst`; see :func:`flashmoe.pack.pack`."""
    started = time.monotonic()
    _refuse_existing(dst)
    partial = dst.with_name(dst.name + ".partial")
    trunk = TrunkFile(d.tensors, recipe, d.origin)
    layers = [LayerFile(e, recipe, d.origin) for e in d.experts]
    extra = [ExtraFile(d.extra)] if d.extra else []
    planned: list[PlannedFile] = [*layers, trunk, *extra]
    journal = Journal(partial, _key(d, recipe))
    if not resume:
        _remove_partial(partial)
    with storage_errors(str(partial)):
        partial.mkdir(parents=True, exist_ok=True)
    with locked(partial):
        journal.load()
        found: dict[str, list[int]] = {}
        for p in planned:
            crcs = journal.holds(p)
            if crcs is not None:
                found[p.name] = crcs
        todo = [p for p in planned if p.name not in found]
        for p in todo:  # half-written: their space is free again
            with storage_errors(str(partial / p.name)):
                (partial / p.name).unlink(missing_ok=True)
        _check_disk(partial, sum(p.size for p in todo))
        crcs_of = _write_files(d, partial, planned, found, journal, report)
        _copy_small(d.path, partial)
        document = _document(d, recipe, planned, trunk, layers, extra, crcs_of)
        _write_bytes(partial / DOCUMENT, json.dumps(document, indent=1).encode())
        with storage_errors(str(partial)):
            (partial / JOURNAL).unlink(missing_ok=True)
            fsync_directory(partial)
            _refuse_existing(dst)
            os.rename(partial, dst)
            fsync_directory(dst.parent)
            size = sum(f.stat().st_size for f in dst.iterdir())
    formats: dict[str, int] = {}
    shapes = [len(t.shape) for t in d.tensors]
    for (fmt, _, _), n in zip(trunk.target, shapes, strict=True):
        if n == 2:
            formats[fmt] = formats.get(fmt, 0) + 1
    for layer in layers:
        for r in layer.roles:
            formats[r.format] = formats.get(r.format, 0) + len(layer.units)
    kept = [*trunk.kept, *(k for layer in layers for k in layer.kept)]
    return PackReport(
        dst, d.arch, sum(p.source_bytes for p in planned), size, time.monotonic() - started,
        recipe.as_json(), formats, tuple(kept), tuple(sorted(found)),
    )  # fmt: skip


def _refuse_existing(dst: Path) -> None:
    if os.path.lexists(dst):
        raise StorageError(errno.EEXIST, "exists already; pack never overwrites", str(dst))


def _remove_partial(partial: Path) -> None:
    """Delete what an earlier run left, if it is certainly ours."""
    if not partial.is_dir():
        return
    ours = ("*.safetensors", DOCUMENT, JOURNAL, JOURNAL + ".new", *COPIED)
    for f in partial.iterdir():
        if f.is_dir() or not any(fnmatch.fnmatch(f.name, p) for p in ours):
            raise StateError(f"{partial}: holds {f.name!r}, which pack did not write; not deleted")
    with locked(partial), storage_errors(str(partial)):
        shutil.rmtree(partial)


def _key(d: ModelDescription, recipe: Recipe) -> dict[str, Any]:
    """Return everything the output depends on."""
    files = []
    for path, size in d.files:
        with storage_errors(path):
            files.append([os.path.basename(path), size, os.stat(path).st_mtime_ns])
    config = hashlib.sha256((d.path / "config.json").read_bytes()).hexdigest()
    return {"format": [FORMAT, VERSION], "writer": flashmoe.__version__, "source": str(d.path),
            "config.json": config, "source files": files, "recipe": recipe.as_json()}  # fmt: skip


def _check_disk(partial: Path, needed: int) -> None:
    """Refuse to begin what cannot be finished."""
    needed += _SLACK_BYTES
    with storage_errors(str(partial)):
        free = shutil.disk_usage(partial).free
    if needed > free:
        raise StorageError(
            errno.ENOSPC, f"{needed} bytes are still to be written, {free} are free", str(partial)
        )


def _write_files(
    d: ModelDescription,
    partial: Path,
    planned: list[PlannedFile],
    found: dict[str, list[int]],
    journal: Journal,
    report: Callable[[int, int], None],
) -> dict[str, list[int]]:
    total = sum(p.source_bytes for p in planned)
    done = sum(p.source_bytes for p in planned if p.name in found)
    crcs_of = dict(found)

    def tick(n: int) -> None:
        nonlocal done
        done += n
        report(done, total)

    report(done, total)
    with SourceFiles(d.files) as source:
        for p in planned:
            if p.name in found:
                continue
            path = partial / p.name
            with storage_errors(str(path)):
                fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
                try:
                    pwrite_all(fd, p.header, 0)
                    crcs = p.write(fd, source, tick)
                    size = os.fstat(fd).st_size
                    assert size == p.size, (p.name, size, p.size)
                    os.fsync(fd)
                finally:
                    os.close(fd)
            journal.finish(p.name, crcs)
            crcs_of[p.name] = crcs
    return crcs_of


def _document(
    d: ModelDescription,
    recipe: Recipe,
    planned: list[PlannedFile],
    trunk: TrunkFile,
    layers: list[LayerFile],
    extra: list[ExtraFile],
    crcs_of: dict[str, list[int]],
) -> dict[str, Any]:
    origin: dict[str, Any] = {
        "kind": d.origin,
        "name": d.path.name,
        "files": [{"name": os.path.basename(p), "bytes": n} for p, n in d.files],
        "left_out": d.skipped,
    }
    if d.origin == "packed":
        origin["origin"] = d.recipe
    return {
        "format": FORMAT,
        "version": VERSION,
        "writer": f"flashmoe {flashmoe.__version__}",
        "arch": d.arch,
        "origin": origin,
        "recipe": {**recipe.as_json(), "kept": [*trunk.kept, *(k for x in layers for k in x.kept)]},
        "files": {p.name: p.size for p in planned},
        "tensors": trunk.entries(crcs_of[trunk.name]),
        "experts": [x.entry(crcs_of[x.name]) for x in layers],
        "extra": {k: v for x in extra for k, v in x.entries(crcs_of[x.name]).items()},
    }


def _copy_small(src: Path, partial: Path) -> None:
    """Copy configuration, tokenizer and licence files as they are."""
    for f in sorted(src.iterdir()):
        if f.is_file() and any(fnmatch.fnmatch(f.name, p) for p in COPIED):
            with storage_errors(str(f)):
                _write_bytes(partial / f.name, f.read_bytes())


def _write_bytes(path: Path, data: bytes) -> None:
    with storage_errors(str(path)), open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
