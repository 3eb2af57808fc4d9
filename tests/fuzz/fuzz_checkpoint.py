"""Mutate checkpoints and see that the readers refuse them politely: only FlashMoeError, no hang.

    python tests/fuzz/fuzz_checkpoint.py [-n 10000] [--seed 0] [--only KIND]

Every case is a golden checkpoint whose weight file is sparse (headers are real, weights are holes)
with one or more mutations of its header, config, index or table.  A failure prints the seed of the
case, which reproduces it alone: ``-n 1 --seed SEED``.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
GOLDEN = TESTS / "golden"
MODELS = ("q35moe_k1", "q3next", "q3moe_nonorm", "mixtral", "olmoe", "glm4moe_groups", "q35dense",
          "q35moe_base/mlx4", "glm4moe/mlx4")  # fmt: skip
LIMIT_S = 5.0

NUMBERS: list[Any] = [0, 1, -1, 2, 3, 7, 64, 255, 1 << 31, (1 << 31) - 1, 1 << 32, 1 << 62,
                      1 << 63, 1 << 64, -(1 << 63), 10**40, 0.5, -0.0, 1e308, 1e-320, 3.0]
ODD: list[Any] = [None, True, False, "", "x", "1", "bfloat16", [], [1], [None], {}, {"a": 1},
                  [[]], "\ud800", "\x00", "a" * 5000]  # fmt: skip
TEXTS = [b"", b"{", b"}", b"[", b"NaN", b"Infinity", b"-", b"1e999", b"\xff", b"\x00", b"\\u0000",
         b'"', b":", b",", b"9" * 5000, b"[" * 2000]  # fmt: skip


class Case:
    """A checkpoint held in memory: JSON documents and sparse weight files."""

    def __init__(self, directory: Path) -> None:
        self.docs: dict[str, Any] = {}
        self.files: dict[str, tuple[dict[str, Any], int]] = {}  # name -> header, bytes of data
        for p in sorted(directory.iterdir()):
            if p.suffix == ".json":
                self.docs[p.name] = json.loads(p.read_text())
            elif p.suffix == ".safetensors":
                with open(p, "rb") as f:
                    n = int.from_bytes(f.read(8), "little")
                    self.files[p.name] = (json.loads(f.read(n)), p.stat().st_size - 8 - n)

    def write(self, directory: Path, rng: random.Random, raw: bool) -> None:
        """Write it; with `raw`, damage bytes of one JSON text as well."""
        texts = {k: json.dumps(v).encode() for k, v in self.docs.items()}
        heads = {k: json.dumps(v[0]).encode() for k, v in self.files.items()}
        pad = {k: b" " * (-(8 + len(h)) % 4096) if "experts-" in k else b"" for k, h in heads.items()}
        if raw:
            where = rng.choice([texts, heads] if heads else [texts])
            name = rng.choice(sorted(where))
            where[name] = damage(where[name], rng)
        for name, text in texts.items():
            (directory / name).write_bytes(text)
        for name, head in heads.items():
            head += pad[name]
            length = len(head)
            if rng.random() < 0.02:
                length = rng.choice([0, 1, length + 1, length - 1, 1 << 31, (1 << 64) - 1])
            size = 8 + len(head) + self.files[name][1]
            if rng.random() < 0.05:
                size = max(0, rng.choice([size - 1, size + 1, size // 2, 8, 0]))
            with open(directory / name, "wb") as f:
                f.write(length.to_bytes(8, "little") + head)
                f.truncate(size)


def damage(text: bytes, rng: random.Random) -> bytes:
    """Change a few bytes."""
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(4)
        if kind == 0 and text:
            at = min(at, len(text) - 1)
            text = text[:at] + bytes([text[at] ^ (1 << rng.randrange(8))]) + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + rng.choice(TEXTS) + text[at:]
        elif kind == 2:
            text = text[:at] + text[at + rng.randint(1, 50) :]
        else:
            text = text[:at]
    return text


def containers(doc: Any) -> list[Any]:
    """Return all lists and objects of a document, up to some thousands."""
    out, todo = [], [doc]
    while todo and len(out) < 4000:
        x = todo.pop()
        if isinstance(x, (dict, list)) and x:
            out.append(x)
            todo.extend(x.values() if isinstance(x, dict) else x[:64])
    return out


def mutate_json(doc: Any, rng: random.Random) -> None:
    """Change one place of a document."""
    places = containers(doc)
    if not places:
        return
    x = rng.choice(places)
    key = rng.choice(sorted(x)) if isinstance(x, dict) else rng.randrange(len(x))
    kind = rng.randrange(7)
    old = x[key]
    if kind == 0:
        x[key] = rng.choice(NUMBERS)
    elif kind == 1:
        x[key] = copy.deepcopy(rng.choice(ODD))
    elif kind == 2 and isinstance(old, int) and not isinstance(old, bool):
        x[key] = old + rng.choice([-64, -1, 1, 64, old])
    elif kind == 3:
        del x[key]
    elif kind == 4 and isinstance(x, dict):
        x[rng.choice(["new", key + "x", key[:-1], key.upper()])] = copy.deepcopy(old)
    elif kind == 5 and isinstance(x, dict):
        other = rng.choice(sorted(x))
        x[key], x[other] = x[other], x[key]
    elif isinstance(old, list) and old:
        old.append(copy.deepcopy(rng.choice(old)))
    else:
        x[key] = [old]


def run_case(seed: int, cases: dict[str, Case], parent: Path, read: Callable[[Path], Any]) -> str:
    """Run one case; return the outcome's name. Anything but FlashMoeError is raised."""
    from flashmoe.errors import FlashMoeError

    rng = random.Random(seed)
    case = copy.deepcopy(cases[rng.choice(sorted(cases))])
    docs = [*case.docs.values(), *(h for h, _ in case.files.values())]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 4])):
        mutate_json(rng.choice(docs), rng)
    with tempfile.TemporaryDirectory(dir=parent) as tmp:
        case.write(Path(tmp), rng, raw=rng.random() < 0.3)
        started = time.monotonic()
        try:
            read(Path(tmp))
            outcome = "accepted"
        except FlashMoeError as e:
            str(e).encode("utf-8", "surrogatepass")
            outcome = type(e).__name__
        took = time.monotonic() - started
        if took > LIMIT_S:
            raise TimeoutError(f"{took:.1f} s")
        return outcome


def describe(directory: Path) -> None:
    """Read a checkpoint and check what a description promises."""
    from flashmoe.checkpoint import open_checkpoint

    d = open_checkpoint(directory)
    core = d.to_core()
    sizes = [n for _, n in core["files"]]
    for t in d.tensors:
        for p in (*t.codes, *t.scales, *t.biases):
            assert 0 <= p.offset <= p.offset + p.n_bytes <= sizes[p.file], t
    for e in d.experts:
        assert (e.offset >= 0).all()
        assert e.file.min() >= 0
        assert e.file.max() < len(sizes)


def load_cases(parent: Path) -> dict[str, Case]:
    """Return the seeds: golden checkpoints, and two of them packed."""
    from flashmoe.pack import pack

    cases = {name: Case(GOLDEN / name) for name in MODELS}
    for name in ("q3next", "q3moe/mlx4"):
        dst = parent / name.replace("/", "-")
        pack(GOLDEN / name, dst)
        cases["packed " + name] = Case(dst)
    return cases


def fuzz(n: int, seed: int = 0, only: str = "", verbose: bool = False) -> Counter[str]:
    """Run `n` cases; return how often each outcome came. Raises AssertionError on a failure."""
    outcomes: Counter[str] = Counter()
    shm = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=shm) as tmp:
        cases = {k: c for k, c in load_cases(Path(tmp)).items() if only in k}
        for i in range(seed, seed + n):
            try:
                outcomes[run_case(i, cases, Path(tmp), describe)] += 1
            except BaseException as e:
                if isinstance(e, KeyboardInterrupt):
                    raise
                raise AssertionError(
                    f"seed {i}: {type(e).__name__}: {e}\n{traceback.format_exc()}"
                ) from e
            if verbose and (i - seed) % 1000 == 999:
                print(i - seed + 1, dict(outcomes), flush=True)
    return outcomes


def main() -> None:
    """Run the command line."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("-n", type=int, default=10_000)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--only", default="", help="part of a case's name")
    a = ap.parse_args()
    print(dict(fuzz(a.n, a.seed, a.only, verbose=True)))


if __name__ == "__main__":
    sys.path.insert(0, str(TESTS.parent))
    main()
