"""Reader of the packed form (``docs/format.md``): flashmoe.json, a trunk file, one file per layer.

The table in ``flashmoe.json`` is trusted no more than any other file: names and shapes must be the
architecture's, sizes must follow from the formats, and the safetensors headers must agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flashmoe.checkpoint.arch import Architecture, ModelConfig
from flashmoe.checkpoint.description import (
    MOE,
    ExpertDesc,
    ExpertRole,
    ModelDescription,
    Piece,
    RawTensor,
    TensorDesc,
)
from flashmoe.checkpoint.formats import (
    bits_of,
    check_format,
    role_bytes,
)
from flashmoe.checkpoint.safetensors_file import Header, Tensor, read_header
from flashmoe.config import _show, load_json, nearest
from flashmoe.errors import ModelFileError, UnsupportedError

__all__ = ["ALIGN", "FORMAT", "TRUNK", "VERSION", "area_tensor", "open_packed", "read_document",
           "tensor_key"]  # fmt: skip

FORMAT = "flashmoe-packed"
VERSION = 1
DOCUMENT = "flashmoe.json"
TRUNK = "trunk.safetensors"
MTP = "mtp.safetensors"
ALIGN = 4096
AREAS = ("weight", "scales", "biases")
ROLES = ("gate", "up", "down")
_BARE = ("linear_attn.A_log", "linear_attn.dt_bias", "mlp.gate.e_score_correction_bias")
_DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
_TOP = {"format", "version", "writer", "arch", "origin", "recipe", "files", "tensors", "experts",
        "extra"}  # fmt: skip


def expert_file(layer: int) -> str:
    """Return the name of the file that holds a layer's experts."""
    return f"experts-{layer:05d}.safetensors"


def tensor_key(name: str, layer: int, area: int = 0) -> str:
    """Return the key in ``trunk.safetensors`` of an area (0 codes, 1 scales, 2 biases)."""
    full = name if layer < 0 else f"layers.{layer}.{name}"
    if area == 0 and (name in _BARE or name.endswith(".bias")):
        return full
    return f"{full}.{AREAS[area]}"


def area_tensor(
    fmt: str, group: int, scale_format: str, shape: tuple[int, ...], area: int
) -> tuple[str, tuple[int, ...]]:
    """Return (safetensors dtype, shape) of an area of a tensor."""
    bits = bits_of(fmt)
    if not bits:
        return _DTYPES[fmt], shape
    n_rows, n_cols = shape
    if area:
        return _DTYPES[scale_format], (n_rows, n_cols // group)
    if n_cols * bits % 32:
        return "U8", (n_rows, n_cols * bits // 8)
    return "U32", (n_rows, n_cols * bits // 32)


def open_packed(directory: Path) -> ModelDescription:
    """Return the description of a packed checkpoint."""
    from flashmoe.checkpoint import read_eos_ids, read_model_config

    if not (directory / "config.json").is_file():
        raise ModelFileError(f"{directory}: config.json is missing beside {DOCUMENT}")
    hf_config = load_json(directory / "config.json")
    arch, mc = read_model_config(hf_config, str(directory / "config.json"))
    doc = read_document(directory)
    if doc["arch"] != arch.name:
        raise ModelFileError(
            f"{directory / DOCUMENT}: arch is {_show(doc['arch'])}, config.json says {arch.name!r}"
        )
    d = _Reader(directory, doc, arch, mc).read(hf_config)
    d.eos_token_ids = read_eos_ids(directory, hf_config, d.config["vocab_size"])
    return d


def read_document(directory: Path) -> dict[str, Any]:
    """Return ``flashmoe.json`` after checking its version and top level."""
    path = directory / DOCUMENT
    doc = load_json(path)
    if doc.get("format") != FORMAT:
        raise ModelFileError(f"{path}: format is {_show(doc.get('format'))}, not {FORMAT!r}")
    version = doc.get("version")
    if type(version) is not int:
        raise ModelFileError(f"{path}: version is {_show(version)}, an integer is wanted")
    if version != VERSION:
        raise UnsupportedError(
            f"{path}: version {version} of the packed form; supported: {VERSION}"
        )
    for key in sorted(_TOP - doc.keys()):
        raise ModelFileError(f"{path}: {key} is missing")
    for key in sorted(doc.keys() - _TOP):
        raise ModelFileError(f"{path}: unknown key {key!r}{nearest(key, _TOP)}")
    return doc


class _Reader:
    """Checks one document against architecture and files."""

    def __init__(
        self, directory: Path, doc: dict[str, Any], arch: Architecture, mc: ModelConfig
    ) -> None:
        self.directory, self.doc, self.arch, self.mc = directory, doc, arch, mc
        self.path = directory / DOCUMENT
        self.files: list[tuple[str, int]] = []
        self.sizes: dict[str, int] = {}

    def read(self, hf_config: dict[str, Any]) -> ModelDescription:
        files = self.doc["files"]
        if not isinstance(files, dict):
            raise self._bad("files", files, "an object")
        for name, n in files.items():
            if type(n) is not int or n < 0:
                raise self._bad(f"files: {name!r}", n, "a size in bytes")
            self.sizes[name] = n
        want = {TRUNK, *(expert_file(i) for i, f in enumerate(self.mc.core["ffns"]) if f == MOE)}
        for name in sorted(want - files.keys()):
            raise ModelFileError(f"{self.path}: files: {name!r} is missing")
        for name in sorted(files.keys() - want - {MTP}):
            raise ModelFileError(f"{self.path}: files: unknown file {_show(name)}")
        trunk = self._header(TRUNK)
        tensors = self._tensors(trunk)
        experts = self._experts()
        extra = self._extra() if MTP in files else []
        return ModelDescription(
            arch=self.arch.name, config=self.mc.core, files=self.files, tensors=tensors,
            experts=experts, origin="packed", path=self.directory, hf_config=hf_config,
            extra=extra, recipe={"origin": self.doc["origin"], **self._dict("recipe")},
        )  # fmt: skip

    # ------------------------------------------------------------------ small checks

    def _bad(self, what: str, value: Any, wanted: str) -> ModelFileError:
        return ModelFileError(f"{self.path}: {what} is {_show(value)}, {wanted} is wanted")

    def _dict(self, key: str) -> dict[str, Any]:
        v = self.doc[key]
        if not isinstance(v, dict):
            raise self._bad(key, v, "an object")
        return v

    def _list(self, key: str) -> list[dict[str, Any]]:
        v = self.doc[key]
        if not isinstance(v, list) or not all(isinstance(x, dict) for x in v):
            raise self._bad(key, v, "a list of objects")
        return v

    def _keys(self, what: str, d: dict[str, Any], want: set[str]) -> None:
        for key in sorted(want - d.keys()):
            raise ModelFileError(f"{self.path}: {what}: {key} is missing")
        for key in sorted(d.keys() - want):
            raise ModelFileError(f"{self.path}: {what}: unknown key {key!r}{nearest(key, want)}")

    def _crcs(self, what: str, v: Any, n: int) -> list[int]:
        if not isinstance(v, list) or len(v) != n:
            raise self._bad(f"{what}: crc32c", v, f"a list of {n} numbers")
        for x in v:
            if type(x) is not int or not 0 <= x < 1 << 32:
                raise self._bad(f"{what}: crc32c", x, "a 32-bit number")
        return v

    def _header(self, name: str) -> Header:
        path = self.directory / name
        h = read_header(path, len(self.files))
        if h.size != self.sizes[name]:
            raise ModelFileError(
                f"{path}: {h.size} bytes, {DOCUMENT} says {self.sizes[name]} (truncated copy?)"
            )
        self.files.append((str(path.absolute()), h.size))
        return h

    def _format(self, what: str, d: dict[str, Any], n_cols: int) -> tuple[str, int, str]:
        fmt, group, scale = d["format"], d["group"], d["scale_format"]
        if not isinstance(fmt, str) or type(group) is not int or not isinstance(scale, str):
            raise self._bad(what, [fmt, group, scale], "(format, group, scale_format)")
        wrong = check_format(fmt, group, scale, n_cols)
        if wrong:
            raise ModelFileError(f"{self.path}: {what}: {wrong}")
        return fmt, group, scale

    # ------------------------------------------------------------------ trunk

    def _tensors(self, trunk: Header) -> list[TensorDesc]:
        c = self.mc.core
        entries: dict[tuple[str, int], dict[str, Any]] = {}
        keys = {"name", "layer", "source", "format", "group", "scale_format", "shape", "add_one",
                "crc32c"}  # fmt: skip
        for t in self._list("tensors"):
            what = f"tensor {_show(t.get('name'))}"
            self._keys(what, t, keys)
            if not isinstance(t["name"], str) or type(t["layer"]) is not int:
                raise self._bad(what, t["layer"], "a name and a layer")
            if (t["name"], t["layer"]) in entries:
                raise ModelFileError(f"{self.path}: {what} of layer {t['layer']} appears twice")
            entries[t["name"], t["layer"]] = t
        specs = {(s.name, s.layer): s.shape for s in self.arch.tensors(self.mc)}
        matrices = {(s.name, s.layer) for s in self.arch.tensors(self.mc) if s.matrix}
        centred = {(s.name, s.layer) for s in self.arch.tensors(self.mc) if s.zero_centred}
        head = ("lm_head", -1)
        if self.mc.tied is False and head not in entries:
            raise ModelFileError(f"{self.path}: tensor 'lm_head' is missing")
        if self.mc.tied and head in entries:
            raise ModelFileError(f"{self.path}: tensor 'lm_head' is there, but the head is tied")
        c["tie_word_embeddings"] = int(head not in entries)
        if head in entries:
            specs[head] = (c["vocab_size"], c["hidden_size"])
            matrices.add(head)
        out, used = [], set()
        for (name, layer), shape in specs.items():
            what = f"tensor {name!r} of layer {layer}" if layer >= 0 else f"tensor {name!r}"
            if (name, layer) not in entries:
                raise ModelFileError(f"{self.path}: {what} is missing")
            t = entries.pop((name, layer))
            if t["shape"] != list(shape):
                raise self._bad(f"{what}: shape", t["shape"], str(list(shape)))
            fmt, group, scale = self._format(what, t, shape[-1])
            if bits_of(fmt) and (name, layer) not in matrices:
                raise ModelFileError(f"{self.path}: {what} is a vector, but its format is {fmt}")
            if type(t["add_one"]) is not bool or (t["add_one"] and (name, layer) not in centred):
                raise self._bad(f"{what}: add_one", t["add_one"], "false")
            if not isinstance(t["source"], str):
                raise self._bad(f"{what}: source", t["source"], "a string")
            n_areas = 3 if bits_of(fmt) else 1
            self._crcs(what, t["crc32c"], n_areas)
            areas: list[tuple[Piece, ...]] = []
            for a in range(n_areas):
                key = tensor_key(name, layer, a)
                used.add(key)
                dtype, want = area_tensor(fmt, group, scale, shape, a)
                areas.append((self._area(trunk, key, dtype, want),))
            codes, scales, biases = (*areas, (), ())[:3]
            key = tensor_key(name, layer)
            out.append(
                TensorDesc(
                    name, layer, key, fmt, shape, codes, scales, biases, group, scale, t["add_one"]
                )
            )
        for name, layer in sorted(entries):
            raise ModelFileError(
                f"{self.path}: unknown tensor {name!r} of layer {layer} for {self.arch.name}"
            )
        for key in sorted(trunk.tensors.keys() - used):
            raise ModelFileError(f"{trunk.path}: tensor {key!r} is not in {DOCUMENT}")
        return out

    def _area(self, h: Header, key: str, dtype: str, shape: tuple[int, ...]) -> Piece:
        t = h.tensors.get(key)
        if t is None:
            raise ModelFileError(f"{h.path}: tensor {key!r} is missing")
        if (t.dtype, t.shape) != (dtype, shape):
            raise ModelFileError(
                f"{h.path}: tensor {key!r} is {t.dtype} {t.shape}, wanted {dtype} {shape}"
            )
        return Piece(t.file, t.offset, t.n_bytes)

    # ------------------------------------------------------------------ experts

    def _experts(self) -> list[ExpertDesc]:
        layers = [i for i, f in enumerate(self.mc.core["ffns"]) if f == MOE]
        entries = self._list("experts")
        if [e.get("layer") for e in entries] != layers:
            raise self._bad("experts: layers", [e.get("layer") for e in entries], str(layers))
        return [self._layer(i, e) for i, e in zip(layers, entries, strict=True)]

    def _layer(self, layer: int, e: dict[str, Any]) -> ExpertDesc:
        c, what = self.mc.core, f"experts of layer {layer}"
        numbers = {"layer", "file", "stride", "record_bytes", "crc32c", "sources"}
        self._keys(what, e, numbers | set(ROLES))
        if e["file"] != expert_file(layer):
            raise self._bad(f"{what}: file", e["file"], repr(expert_file(layer)))
        n, i, h = c["num_experts"], c["moe_intermediate_size"], c["hidden_size"]
        roles = []
        for r, (rows, cols) in zip(ROLES, ((i, h), (i, h), (h, i)), strict=True):
            d = e[r]
            if not isinstance(d, dict):
                raise self._bad(f"{what}: {r}", d, "an object")
            self._keys(f"{what}: {r}", d, {"format", "group", "scale_format"})
            fmt, group, scale = self._format(f"{what}: {r}", d, cols)
            roles.append(ExpertRole(fmt, rows, cols, group, scale))
        sizes = [b for r in roles for b in role_bytes(r)]
        record = sum(sizes)
        stride = -(-record // ALIGN) * ALIGN
        if e["record_bytes"] != record or e["stride"] != stride:
            raise self._bad(
                f"{what}: (record_bytes, stride)", [e["record_bytes"], e["stride"]],
                f"[{record}, {stride}]",
            )  # fmt: skip
        crc = np.array(self._crcs(what, e["crc32c"], n), np.uint32)
        sources = e["sources"]
        if not isinstance(sources, list) or len(sources) != len(sizes) or not all(
            isinstance(s, str) for s in sources
        ):
            raise self._bad(f"{what}: sources", sources, f"a list of {len(sizes)} names")
        head = self._header(e["file"])
        piece = self._area(head, "experts", "U8", (n, stride))
        if piece.offset % ALIGN:
            raise ModelFileError(
                f"{head.path}: the records begin at {piece.offset}, not a multiple of {ALIGN}"
            )
        starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
        offset = piece.offset + np.arange(n, dtype=np.int64)[:, None] * stride + starts[None, :]
        file = np.full(offset.shape, piece.file, np.int32)
        gate, up, down = roles
        return ExpertDesc(layer, gate, up, down, file, offset, tuple(sources), crc)

    # ------------------------------------------------------------------ kept tensors

    def _extra(self) -> list[RawTensor]:
        h = self._header(MTP)
        crcs = self._dict("extra")
        for name in sorted(crcs.keys() ^ h.tensors.keys()):
            raise ModelFileError(f"{h.path}: tensor {name!r} is not both there and in {DOCUMENT}")
        out = []
        for name, t in h.tensors.items():
            self._crcs(f"extra: {name!r}", [crcs[name]], 1)
            out.append(RawTensor(name, t.dtype, t.shape, _piece(t)))
        return out


def _piece(t: Tensor) -> Piece:
    return Piece(t.file, t.offset, t.n_bytes)
