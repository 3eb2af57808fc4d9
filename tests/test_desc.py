"""Spoilt descriptions through the binding: refused by a typed error, or they run; never a crash.

The C twin without Python is ``tests/fuzz/fuzz_desc.c``.  What is accepted here is also opened and
run on the real file, so that a check that is too weak shows as a crash or a wrong kind of error.
"""

from __future__ import annotations

import os
import random
import shutil
import time

import numpy as np
import pytest
from engines import GOLDEN, core_desc, ids_of

from flashmoe import _core
from flashmoe.checkpoint import open_checkpoint
from flashmoe.errors import (
    ArgumentError,
    FlashMoeError,
    ModelFileError,
    OutOfMemory,
    StorageError,
    UnsupportedError,
)

BASES = ("q35moe_base/mlx4", "q3moe", "glm4moe_groups")
EDGES = (0, 1, -1, 2, 3, 64, 2**31 - 1, 2**31, -(2**31), 2**32, 2**40, 2**62, 2**63 - 1, -(2**63), 2**63,
         2**64, 10**30)  # fmt: skip
ODD = (None, "", "x", "affine4", "bf16", "mlp.gate", (), [], {}, 1.5, float("nan"), float("inf"), True, b"x",
       object(), np.int64(3), "\udcff", "a\0b", "é" * 300)  # fmt: skip
SMALL = 64 << 20


# ---- mutations of the dict ----


def places(x, at=()):
    """Yield the path of everything inside a description."""
    items = (
        x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, (list, tuple)) else ()
    )
    for k, v in items:
        yield (*at, k)
        yield from places(v, (*at, k))


def value_at(x, path):
    for k in path:
        x = x[k]
    return x


def replaced(x, path, change):
    """Return a copy with change(value) at a path."""
    if not path:
        return change(x)
    k, rest = path[0], path[1:]
    if isinstance(x, dict):
        return {**x, k: replaced(x[k], rest, change)}
    return type(x)([replaced(v, rest, change) if i == k else v for i, v in enumerate(x)])


def spoil(rng: random.Random, desc: dict, paths: list) -> dict:
    """Change one thing: a number to an edge, a value to another kind, a container's length."""
    path = rng.choice(paths)
    donor = value_at(desc, rng.choice(paths))

    def change(v):
        if isinstance(v, np.ndarray):
            return spoil_array(rng, v)
        plain = (int, float, str, dict, list, tuple)
        if isinstance(v, bool) or not isinstance(v, plain) or rng.random() < 0.12:
            return rng.choice((*ODD, donor))
        if isinstance(v, (int, float)):
            near = (v + 1, v - 1, v * 2, -v, v + 4096, v / 2 if isinstance(v, float) else v // 2)
            return rng.choice((*EDGES, *near, *near, donor))
        if isinstance(v, str):
            return rng.choice(("", v + "x", v[:-1], donor, 3))
        if isinstance(v, dict):
            gone = rng.choice(list(v)) if v and rng.random() < 0.7 else None
            return {k: x for k, x in v.items() if k != gone} if gone else {**v, "new": 1}
        if not len(v):
            return type(v)([donor])
        i = rng.randrange(len(v))
        return rng.choice((v[:i], v[:i] + v[i + 1 :], v + v[i : i + 1], v[::-1], donor))

    return replaced(desc, path, change)


def spoil_array(rng: random.Random, a: np.ndarray):
    kind = rng.randrange(7)
    if kind == 0:
        return a[: rng.randrange(len(a) + 1)]
    if kind == 1:
        return a.astype(rng.choice(("i2", "i8", "u4", "f4", "f8", "?", ">i4", "O", "S4")))
    if kind == 2:
        return a.T if a.ndim > 1 else a[::2]
    if kind == 3:
        return rng.choice((a.reshape(-1), a[None], a[:0], a.tolist(), np.array(3), None))
    b = a.copy()
    low, high = np.iinfo(a.dtype).min, np.iinfo(a.dtype).max
    at = rng.randrange(b.size)
    old = int(b.flat[at])
    new = rng.choice((low, high, 0, old + 1, old - 1, old + 64, int(b.flat[rng.randrange(b.size)])))
    b.flat[at] = min(max(new, low), high)
    return b


def try_to_run(desc: dict, ids: np.ndarray) -> str:
    """Plan, open and run; return how far it came.  Anything but a typed refusal is raised."""
    opts = {"context": 32, "n_threads": 1, "max_rows": 16}
    try:
        plan = _core.Engine.plan(desc, opts)
    except (FlashMoeError, TypeError):
        return "refused"
    if sum(plan[k] for k in ("trunk_bytes", "state_bytes", "scratch_bytes")) > SMALL:
        return "large"
    if plan["n_slots_min"] * plan["slot_bytes"] > SMALL:
        return "large"
    try:
        engine = _core.Engine(desc, opts)
    except FlashMoeError:
        return "not opened"
    try:
        vocab = engine.info["vocab_size"]
        engine.forward([engine.session()], [ids % vocab], all_logits=True)
    except FlashMoeError:  # e.g. numbers that are not weights overflow
        return "failed"
    finally:
        engine.close()
    return "ran"


def fuzz(base: str, seed: int, n: int) -> dict[str, int]:
    rng = random.Random(seed)
    valid = core_desc(base)
    ids = ids_of(base, "p24")[:6]
    assert try_to_run(valid, ids) == "ran"
    paths = list(places(valid))
    counts: dict[str, int] = {}
    for _ in range(n):
        desc = valid
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            desc = spoil(rng, desc, paths if desc is valid else list(places(desc)))
        t0 = time.monotonic()
        how = try_to_run(desc, ids)
        assert time.monotonic() - t0 < 5, "a hang, or nearly one"
        counts[how] = counts.get(how, 0) + 1
    return counts


@pytest.mark.parametrize("base", BASES)
def test_mutated_descriptions(base):
    counts = fuzz(base, 1, 700)
    assert counts["refused"] > 300
    assert counts.get("ran", 0) > 20, "the mutations are so wild that nothing is reached"


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_many_mutated_descriptions(base):
    fuzz(base, 2, 10_000)


# ---- what each refusal says ----


def with_tensor(desc, name, layer, change):
    """Return a copy in which one tensor's tuple is changed."""
    i = next(i for i, t in enumerate(desc["tensors"]) if (t[0], t[1]) == (name, layer))
    return replaced(desc, ("tensors", i), lambda t: tuple(change(list(t))))


def setting(i, value):
    def change(t):
        t[i] = value(t[i]) if callable(value) else value
        return t

    return change


Q = ("self_attn.q_proj", 0)


@pytest.mark.parametrize(
    ("spoilt", "error", "words"),
    [
        (lambda d: with_tensor(d, *Q, setting(6, (64, 65))), ModelFileError, "its shape needs"),
        (lambda d: with_tensor(d, *Q, setting(6, (2, 3, 4))), ModelFileError, "has 3 dimensions"),
        (lambda d: with_tensor(d, *Q, setting(6, (2**62, 2**62))), ModelFileError, "out of range"),
        (lambda d: with_tensor(d, *Q, setting(6, (2**63, 1))), ModelFileError, "out of range"),
        (lambda d: with_tensor(d, *Q, setting(0, "self_attn.r_proj")), ModelFileError, "'self_attn.r_proj' is unknown"),
        (lambda d: with_tensor(d, *Q, setting(0, "self_attn.k_proj")), ModelFileError, "is there twice"),
        (lambda d: with_tensor(d, *Q, setting(1, 99)), ModelFileError, "layer 99"),
        (lambda d: with_tensor(d, *Q, setting(3, "affine9")), UnsupportedError, "'affine9' is unknown"),
        (lambda d: with_tensor(d, *Q, setting(8, [(0, 2**62, 16)])), ModelFileError, "file has"),
        (lambda d: with_tensor(d, *Q, setting(8, [(7, 0, 16)])), ModelFileError, "names file 7 of 1"),
        (lambda d: with_tensor(d, *Q, setting(8, lambda p: [(p[0][0], p[0][1] - 2, p[0][2])])), ModelFileError, "overlap"),
        (lambda d: {**d, "tensors": d["tensors"][1:]}, ModelFileError, "is missing"),
        (lambda d: {**d, "experts": d["experts"][1:]}, ModelFileError, "its experts are missing"),
        (lambda d: {**d, "experts": d["experts"][::-1]}, ModelFileError, "out of order"),
        (lambda d: {k: v for k, v in d.items() if k != "files"}, ModelFileError, "'files' is missing"),
        (lambda d: {**d, "config": {**d["config"], "new": 1}}, ModelFileError, "fields, the core knows"),
        (lambda d: {**d, "config": {**d["config"], "hidden_size": 2**70}}, ModelFileError, "hidden_size: out of range"),
        (lambda d: {**d, "config": {**d["config"], "head_dim": 3}}, ModelFileError, "rotary_dim"),
        (lambda d: {**d, "config": {**d["config"], "mixers": (0,)}}, ModelFileError, "has 1 items"),
        (lambda d: {**d, "arch": "gpt2"}, UnsupportedError, "'gpt2' is not known; there are:.*qwen3_moe"),
        (lambda d: replaced(d, ("experts", 0, "offset"), lambda a: a[:3].copy()), ModelFileError, "wrong shape"),
        (lambda d: replaced(d, ("experts", 0, "offset"), lambda a: a.astype("i4")), ModelFileError, "right type"),
        (lambda d: replaced(d, ("experts", 0, "offset"), lambda a: a + 2**40), ModelFileError, "layer 0 expert 0 .*file has"),
        (lambda d: replaced(d, ("experts", 0, "crc32c"), lambda _: np.zeros(1, "u4")), ModelFileError, "crc32c: array of the wrong shape"),
    ],
)  # fmt: skip
def test_refusals_name_field_and_numbers(spoilt, error, words):
    d = spoilt(core_desc("q3moe"))
    with pytest.raises(error, match=words):
        _core.Engine.plan(d, {"context": 32})
    with pytest.raises(error, match=words):
        _core.Engine(d, {"context": 32})


@pytest.mark.parametrize(
    ("opts", "error", "words"),
    [
        ({"contxt": 32}, ArgumentError, "'contxt' is unknown"),
        ({"context": 0}, ArgumentError, "context is 0"),
        ({"context": 2**62}, ArgumentError, "size overflows"),
        ({"context": 2**70}, FlashMoeError, "out of range"),
        ({"max_rows": 0}, ArgumentError, "must be 1 to 65536"),
        ({"experts_per_token": 65}, ArgumentError, r"must be 1 to \d+ \(trained: 3\)"),
        ({"n_threads": 2000}, ArgumentError, "must be 1 to 1024"),
        ({"context": "many"}, FlashMoeError, "not an integer"),
    ],
)
def test_bad_options(opts, error, words):
    for call in (_core.Engine.plan, _core.Engine):
        with pytest.raises(error, match=words):
            call(core_desc("q3moe"), {"context": 32, **opts})


def test_sizes_that_no_machine_has():
    """A context that fits the arithmetic but no memory: OutOfMemory, and nothing is left behind."""
    plan = _core.Engine.plan(core_desc("q3moe"), {"context": 2**44})
    assert plan["state_bytes"] > 2**44
    engine = _core.Engine(core_desc("q3moe"), {"context": 32})
    with pytest.raises(OutOfMemory):
        engine.session(context=2**44)
    with pytest.raises(OutOfMemory):
        _core.Engine(core_desc("q3moe"), {"context": 32, "n_slots": 2**31 - 1})
    engine.session().step(1)
    engine.close()


def test_file_names_that_are_no_text(tmp_path):
    """Any bytes but NUL are a file name; a message cut within a character is still a message."""
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff\xe9-" + "\N{SNOWMAN}".encode() * 60)
    try:
        shutil.copytree(GOLDEN / "q3moe", odd)
    except OSError as e:
        pytest.skip(f"no such names on this file system: {e}")
    d = open_checkpoint(odd).to_core()
    engine = _core.Engine(d, {"context": 32})
    engine.session().step(1)
    engine.close()
    os.unlink(d["files"][0][0])
    with pytest.raises(StorageError) as e:
        _core.Engine(d, {"context": 32})
    assert e.value.filename == d["files"][0][0]
    for cut in range(4):
        longer = replaced(
            d, ("files", 0), lambda f, n=cut: (f[0][:-20] + "x" * n + "\u2603" * 400, 9)
        )
        with pytest.raises(FlashMoeError):
            _core.Engine(longer, {"context": 32})
    for bad, words in (("a\0b", "holds a NUL"), ("\ud800", "not a text")):
        with pytest.raises(ModelFileError, match=words):
            _core.Engine.plan(
                replaced(d, ("files", 0), lambda f, b=bad: (b, f[1])), {"context": 32}
            )
