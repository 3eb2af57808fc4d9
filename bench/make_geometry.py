#!/usr/bin/env python3
"""Write a packed checkpoint of a real model's geometry with random, valid weights.

    python bench/make_geometry.py --model 35b OUT
    python bench/make_geometry.py --model 397b --link-layers 8 OUT

Sizes, formats, K, heads and vocabulary are the model's; the weights are noise that keeps
activations finite and logits varied, and every checksum is right.  With --link-layers M only M
expert files are real and the other layers are hard links to them: the logical size stays, the disk
use does not.  Then one read can answer for several layers, so the page cache (and a device's own)
would lie: measure such a checkpoint with direct reads only.  It has no tokenizer; token ids work.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from flashmoe import __version__
from flashmoe._core import crc32c
from flashmoe.checkpoint import read_model_config
from flashmoe.checkpoint.description import MOE, ExpertDesc, ExpertRole, TensorDesc
from flashmoe.checkpoint.formats import AFFINE_BITS, area_bytes, bits_of
from flashmoe.checkpoint.packed import DOCUMENT, FORMAT, TRUNK, VERSION
from flashmoe.errors import FlashMoeError
from flashmoe.pack.layout import LayerFile, PlannedFile, TrunkFile, pwrite_all
from flashmoe.pack.recipe import MATRICES, Recipe
from flashmoe.perf.models import known_model

GROUP = 64
POOL_BYTES = 48 << 20
CHUNK_BYTES = 32 << 20
FLUSH_BYTES = 256 << 20
NOTE = "layers share expert files: page-cache results would lie, measure with direct reads only"


class Noise:
    """Random codes, scales and biases cut from two pools at random places.

    Scales have random signs and magnitudes within 20 % of one another; bias = -middle code * scale,
    so weights have mean 0 and the deviation asked for.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.Generator(np.random.SFC64(seed))
        self.codes = np.frombuffer(self.rng.bytes(POOL_BYTES), np.uint8)
        n = POOL_BYTES // 16
        sign = np.where(self.rng.random(n) < 0.5, -1, 1)
        self.scales = (sign * self.rng.uniform(0.8, 1.2, n)).astype(np.float32)
        self.cut: dict[tuple[int, float], tuple[np.ndarray, np.ndarray]] = {}

    def _at(self, pool: np.ndarray, n: int) -> Iterator[np.ndarray]:
        """Yield pieces of `pool`, from a random place on, of `n` elements in all."""
        at = int(self.rng.integers(0, pool.size))
        while n:
            piece = pool[at : at + n]
            yield piece
            n, at = n - piece.size, 0

    def raw(self, out: np.ndarray) -> None:
        """Fill `out` (uint8) with random codes, every byte XORed with a number of its own."""
        mask, at = np.uint8(self.rng.integers(0, 256)), 0
        for piece in self._at(self.codes, out.size):
            np.bitwise_xor(piece, mask, out=out[at : at + piece.size])
            at += piece.size

    def scales_and_biases(self, bits: int, sigma: float, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `n` scales and biases as bfloat16 bits, for weights of deviation `sigma`."""
        key = (bits, sigma)
        if key not in self.cut:
            deviation = ((4.0**bits - 1) / 12) ** 0.5
            scale = to_bf16(self.scales * np.float32(sigma / deviation))
            bias = to_bf16(from_bf16(scale) * np.float32(-(2**bits - 1) / 2))
            self.cut[key] = (scale, bias)
        scale, bias = self.cut[key]
        at = int(self.rng.integers(0, scale.size))
        index = slice(at, at + n)
        if at + n <= scale.size:
            return scale[index], bias[index]
        reps = -(-(at + n) // scale.size)
        return np.tile(scale, reps)[index], np.tile(bias, reps)[index]


def to_bf16(x: np.ndarray) -> np.ndarray:
    """Return the bits of bfloat16 numbers, ties to even."""
    b = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((b + np.uint32(0x7FFF) + ((b >> np.uint32(16)) & np.uint32(1))) >> 16).astype(np.uint16)


def from_bf16(x: np.ndarray) -> np.ndarray:
    """Return float32 numbers."""
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


# ------------------------------------------------------------------ what to write


def describe(config: dict[str, Any], bits: int) -> tuple[list[TensorDesc], list[ExpertDesc], str]:
    """Return tensors and experts in their final formats, without any source bytes."""
    arch, mc = read_model_config(config, "config")
    c, recipe = mc.core, Recipe.of(bits, GROUP, None)
    specs = [(s.name, s.layer, s.shape, s.matrix) for s in arch.tensors(mc)]
    if not mc.tied:
        specs.append(("lm_head", -1, (c["vocab_size"], c["hidden_size"]), True))
    tensors = []
    for name, layer, shape, matrix in specs:
        b = recipe.bits_for(name) if matrix and name in MATRICES else None
        wide = name == "linear_attn.A_log"
        fmt, group = ("f32" if wide else "bf16"), 0
        if b is not None and shape[-1] % GROUP == 0:
            fmt, group = f"affine{b}", GROUP
        tensors.append(TensorDesc(name, layer, "random", fmt, shape, (), group=group))
    e, i, h = c["num_experts"], c["moe_intermediate_size"], c["hidden_size"]
    if h % GROUP or i % GROUP:
        raise SystemExit(f"hidden {h} and expert width {i} must be multiples of {GROUP}")
    roles = [ExpertRole(f"affine{bits}", r, n, GROUP) for r, n in ((i, h), (i, h), (h, i))]
    at = np.zeros((e, 9), np.int64)
    experts = [
        ExpertDesc(layer, *roles, at.astype(np.int32), at, ("random",) * 9)
        for layer, kind in enumerate(c["ffns"])
        if kind == MOE
    ]
    return tensors, experts, arch.name


def deviation(name: str, n_cols: int) -> float:
    """Return the standard deviation of a matrix: outputs of normed inputs are about 1."""
    return 1.0 if name == "embed_tokens" else float(n_cols) ** -0.5


def vector(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return the values of a tensor that stays plain, float32."""
    if name == "linear_attn.A_log":
        return np.log(rng.uniform(0.1, 8, shape)).astype(np.float32)
    if name == "linear_attn.dt_bias":
        return rng.uniform(-4, 0, shape).astype(np.float32)
    if name == "linear_attn.conv1d":
        return (0.5 * rng.standard_normal(shape)).astype(np.float32)
    if name.endswith(("bias", "_bias")):
        return np.zeros(shape, np.float32)
    if "norm" in name:
        return rng.uniform(0.9, 1.1, shape).astype(np.float32)
    return (shape[-1] ** -0.5 * rng.standard_normal(shape)).astype(np.float32)


class File:
    """Writes one planned file; syncs behind the writer's back, so that memory stays free."""

    def __init__(self, directory: Path, planned: PlannedFile) -> None:
        self.path = directory / planned.name
        self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.unsynced = 0
        self.pool = ThreadPoolExecutor(1)
        self.syncing: Future[None] | None = None
        self.put(planned.header, 0)

    def put(self, data: Any, offset: int) -> None:
        """Write a buffer."""
        pwrite_all(self.fd, data, offset)
        self.unsynced += memoryview(data).nbytes
        if self.unsynced > FLUSH_BYTES:
            if self.syncing is not None:
                self.syncing.result()
            self.syncing, self.unsynced = self.pool.submit(self._sync), 0

    def _sync(self) -> None:
        """Bring everything to the disk and out of the page cache."""
        os.fdatasync(self.fd) if hasattr(os, "fdatasync") else os.fsync(self.fd)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Sync and close."""
        self.pool.shutdown()
        if self.syncing is not None:
            self.syncing.result()
        self._sync()
        os.close(self.fd)


def write_trunk(directory: Path, planned: TrunkFile, noise: Noise, skew: float) -> list[int]:
    """Write the resident tensors; return their checksums."""
    f, crcs, units = File(directory, planned), [], iter(planned.units)
    for t in planned.source:
        n_cols = t.shape[-1]
        bits = bits_of(t.format)
        if not bits:
            values = vector(t.name, t.shape, noise.rng)
            if t.name == "mlp.gate" and skew:
                values *= np.exp(skew * noise.rng.standard_normal((t.shape[0], 1)))
            data = values if t.format == "f32" else to_bf16(values)
            u = next(units)
            f.put(data.reshape(-1).view(np.uint8), u.offset)
            crcs.append(crc32c(data.reshape(-1).view(np.uint8)))
            continue
        codes, scales, biases = (next(units) for _ in range(3))
        crc, buffer = 0, np.empty(min(CHUNK_BYTES, codes.n_bytes), np.uint8)
        for at in range(0, codes.n_bytes, buffer.size):
            part = buffer[: min(buffer.size, codes.n_bytes - at)]
            noise.raw(part)
            f.put(part, codes.offset + at)
            crc = crc32c(part, crc)
        crcs.append(crc)
        n = t.shape[0] * (n_cols // GROUP)
        s, b = noise.scales_and_biases(bits, deviation(t.name, n_cols), n)
        if t.name == "mlp.gate" and skew:  # uneven norms of the router's rows: uneven use
            row = np.exp(skew * noise.rng.standard_normal((t.shape[0], 1))).astype(np.float32)
            s, b = (to_bf16(from_bf16(x).reshape(t.shape[0], -1) * row).reshape(-1) for x in (s, b))
        for unit, data in ((scales, s), (biases, b)):
            raw = np.ascontiguousarray(data).view(np.uint8)
            f.put(raw, unit.offset)
            crcs.append(crc32c(raw))
    f.close()
    return crcs


def write_layer(directory: Path, planned: LayerFile, noise: Noise) -> list[int]:
    """Write one layer's experts; return a checksum per expert."""
    f, crcs = File(directory, planned), []
    record = np.zeros(planned.stride, np.uint8)
    for unit in planned.units:
        at = 0
        for r in planned.roles:
            n_codes, n_scales, _ = area_bytes(r.format, r.group, r.scale_format, r.n_rows, r.n_cols)
            noise.raw(record[at : at + n_codes])
            at += n_codes
            pair = noise.scales_and_biases(bits_of(r.format), float(r.n_cols) ** -0.5,
                                           n_scales // 2)  # fmt: skip
            for area in pair:
                record[at : at + n_scales] = np.ascontiguousarray(area).view(np.uint8)
                at += n_scales
        crcs.append(crc32c(record[: planned.record_bytes]))
        f.put(record, unit.offset)
    f.close()
    return crcs


def make(
    out: Path,
    config: dict[str, Any],
    name: str,
    *,
    bits: int = 4,
    link_layers: int | None = None,
    seed: int = 1,
    skew: float = 0.0,
    say: Any = print,
) -> dict[str, Any]:
    """Write the checkpoint to `out`, which must not exist; return its ``flashmoe.json``."""
    if os.path.lexists(out):
        raise SystemExit(f"{out}: exists already")
    tensors, experts, arch = describe(config, bits)
    as_stored = Recipe.of(None, GROUP, None)
    trunk = TrunkFile(tensors, as_stored, "random weights")
    layers = [LayerFile(e, as_stored, "random weights") for e in experts]
    n_real = min(link_layers or len(layers), len(layers))
    logical = trunk.size + sum(x.size for x in layers)
    real = trunk.size + sum(x.size for x in layers[:n_real])
    free = shutil.disk_usage(out.absolute().parent).free
    say(f"{name}: {logical / 1e9:.2f} GB logical, {real / 1e9:.2f} GB on disk, "
        f"{len(layers)} layers of experts of {layers[0].record_bytes} bytes")  # fmt: skip
    if real + (1 << 30) > free:
        raise SystemExit(f"{out}: {real / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free")
    partial = out.with_name(out.name + ".partial")
    partial.mkdir(parents=True)
    noise, crcs = Noise(seed), {}
    crcs[TRUNK] = write_trunk(partial, trunk, noise, skew)
    shared: dict[str, str] = {}
    for i, layer in enumerate(layers):
        if i < n_real:
            crcs[layer.name] = write_layer(partial, layer, noise)
            continue
        source = layers[i % n_real].name
        os.link(partial / source, partial / layer.name)
        crcs[layer.name], shared[layer.name] = crcs[source], source
    document = {
        "format": FORMAT, "version": VERSION, "writer": f"flashmoe {__version__}", "arch": arch,
        "origin": {"kind": "random", "name": name, "files": [], "left_out": []},
        "recipe": {
            "bits": bits, "group": GROUP, "overrides": {}, "method": "random weights", "kept": [],
            "seed": seed, "skew": skew,
            **({"note": NOTE, "n_real_expert_files": n_real, "shared_files": shared}
               if shared else {}),
        },
        "files": {p.name: p.size for p in (*layers, trunk)},
        "tensors": trunk.entries(crcs[TRUNK]),
        "experts": [x.entry(crcs[x.name]) for x in layers],
        "extra": {},
    }  # fmt: skip
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    (partial / DOCUMENT).write_text(json.dumps(document, indent=1))
    os.rename(partial, out)
    if shared:
        say(f"{len(shared)} of {len(layers)} layers are links: {NOTE}")
    return document


def main() -> None:
    """Read the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    p.add_argument("out", type=Path, metavar="OUT", help="directory to make")
    p.add_argument("--model", required=True, help="35b, 122b, 397b, 35b-12layers, ...")
    p.add_argument("--layers", type=int, help="instead of the model's number")
    p.add_argument("--link-layers", type=int, metavar="M", help="real expert files; others link")
    p.add_argument("--bits", type=int, default=4, choices=AFFINE_BITS)
    p.add_argument("--skew", type=float, default=0.0, metavar="S",
                   help="deviation of the logarithm of the router's row norms")  # fmt: skip
    p.add_argument("--seed", type=int, default=1)
    a = p.parse_args()
    try:
        name, config = known_model(a.model if a.layers is None else f"{a.model}-{a.layers}layers")
    except FlashMoeError as e:
        sys.exit(str(e))
    started = time.perf_counter()
    make(a.out, config, name, bits=a.bits, link_layers=a.link_layers, seed=a.seed, skew=a.skew)
    seconds = time.perf_counter() - started
    written = sum({s.st_ino: s.st_size for s in (f.stat() for f in a.out.iterdir())}.values())
    print(f"{a.out}: {written / 1e9:.2f} GB in {seconds:.1f} s, "
          f"{written / 1e6 / seconds:.0f} MB/s")  # fmt: skip


if __name__ == "__main__":
    main()
