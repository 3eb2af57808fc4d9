"""A packed checkpoint that is damaged, incomplete or edited is refused with the reason."""

from __future__ import annotations

import json
import os
import shutil

import checkpoint_files as files
import pytest

from flashmoe.checkpoint import open_checkpoint
from flashmoe.errors import FlashMoeError, ModelFileError, UnsupportedError
from flashmoe.pack import pack, verify

NAMES = sorted(["trunk.safetensors", "mtp.safetensors",
                *(f"experts-{i:05d}.safetensors" for i in range(4))])  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    dst = tmp_path_factory.mktemp("packed") / "p"
    pack(files.GOLDEN / "q3next", dst)
    return dst


@pytest.fixture
def copy(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "p")


def edit(d, change):
    doc = json.loads((d / "flashmoe.json").read_text())
    change(doc)
    (d / "flashmoe.json").write_text(json.dumps(doc))


def refuse(d, error, *words):
    with pytest.raises(FlashMoeError) as e:
        open_checkpoint(d)
    assert type(e.value) is error, e.value
    for word in words:
        assert word in str(e.value)


@pytest.mark.parametrize("name", [*NAMES, "config.json"])
def test_missing_file(copy, name):
    (copy / name).unlink()
    with pytest.raises(FlashMoeError, match=name):
        open_checkpoint(copy)


@pytest.mark.parametrize("name", NAMES)
def test_short_file(copy, name):
    os.truncate(copy / name, (copy / name).stat().st_size - 1)
    refuse(copy, ModelFileError, name)


@pytest.mark.parametrize("name", NAMES)
def test_swapped_content(copy, name):
    """A valid safetensors file of something else."""
    other = {"x": files.Stored("U8", [4], bytes(4))}
    files.write(copy / name, other)
    refuse(copy, ModelFileError, name)


@pytest.mark.parametrize("name", NAMES)
def test_flipped_bit(copy, name):
    """Only the checksums see it; verify names file and place."""
    raw = bytearray((copy / name).read_bytes())
    at = 8 + int.from_bytes(raw[:8], "little") + 3
    raw[at] ^= 0x10
    (copy / name).write_bytes(raw)
    open_checkpoint(copy)
    with pytest.raises(ModelFileError, match="checksum 0x") as e:
        verify(copy)
    assert name in str(e.value)


def test_verify_wants_a_packed_one():
    with pytest.raises(ModelFileError, match="not a packed checkpoint"):
        verify(files.GOLDEN / "q3moe")


def first(key, **values):
    return lambda d: d[key][0].update(values)


def second_tensor(**values):
    return lambda d: d["tensors"][1].update(values)


EDITS = [
    (lambda d: d.update(version=2), UnsupportedError, ["version 2", "supported: 1"]),
    (lambda d: d.update(version="1"), ModelFileError, ["version"]),
    (lambda d: d.update(format="other"), ModelFileError, ["format", "other"]),
    (lambda d: d.update(arch="mixtral"), ModelFileError, ["mixtral", "qwen3_next"]),
    (lambda d: d.update(note="x"), ModelFileError, ["'note'"]),
    (lambda d: d.pop("recipe"), ModelFileError, ["recipe is missing"]),
    (lambda d: d.update(recipe=[]), ModelFileError, ["recipe"]),
    (lambda d: d.update(files=[]), ModelFileError, ["files"]),
    (lambda d: d["files"].pop("trunk.safetensors"), ModelFileError, ["trunk.safetensors"]),
    (lambda d: d["files"].update({"../x": 3}), ModelFileError, ["../x"]),
    (lambda d: d["files"].update({"trunk.safetensors": 5}), ModelFileError, ["5", "truncated"]),
    (lambda d: d["files"].update({"trunk.safetensors": -5}), ModelFileError, ["-5"]),
    (lambda d: d.update(tensors={}), ModelFileError, ["tensors"]),
    (lambda d: d["tensors"].pop(), ModelFileError, ["lm_head"]),
    (lambda d: d["tensors"].pop(0), ModelFileError, ["embed_tokens"]),
    (lambda d: d["tensors"].append(dict(d["tensors"][0])), ModelFileError, ["twice"]),
    (first("tensors", name="embed_token"), ModelFileError, ["embed_tokens", "missing"]),
    (first("tensors", layer=0), ModelFileError, ["embed_tokens"]),
    (first("tensors", shape=[256, 65]), ModelFileError, ["shape", "256"]),
    (first("tensors", format="affine7"), ModelFileError, ["affine7"]),
    (first("tensors", format="affine8"), ModelFileError, ["embed_tokens", "U32"]),
    (first("tensors", format="bf16"), ModelFileError, ["group 64"]),
    (first("tensors", format=4), ModelFileError, ["embed_tokens"]),
    (first("tensors", group=48), ModelFileError, ["group 48"]),
    (first("tensors", group=32), ModelFileError, ["embed_tokens"]),
    (first("tensors", scale_format="f8"), ModelFileError, ["f8"]),
    (first("tensors", scale_format="f32"), ModelFileError, ["scales"]),
    (first("tensors", crc32c=[1]), ModelFileError, ["crc32c"]),
    (first("tensors", crc32c=[1, 2, 1 << 32]), ModelFileError, ["crc32c"]),
    (first("tensors", add_one=True), ModelFileError, ["add_one"]),
    (second_tensor(add_one=1), ModelFileError, ["add_one"]),
    (second_tensor(format="affine4", group=64), ModelFileError, ["vector"]),
    (first("tensors", extra=1), ModelFileError, ["'extra'"]),
    (lambda d: d["experts"].pop(), ModelFileError, ["layers"]),
    (first("experts", layer=7), ModelFileError, ["layers"]),
    (first("experts", file="trunk.safetensors"), ModelFileError, ["file"]),
    (first("experts", stride=4096), ModelFileError, ["stride"]),
    (first("experts", record_bytes=0), ModelFileError, ["record_bytes"]),
    (first("experts", crc32c=[]), ModelFileError, ["crc32c"]),
    (first("experts", crc32c=[-1] * 8), ModelFileError, ["crc32c"]),
    (first("experts", gate={"format": "bf16", "group": 0, "scale_format": "bf16"}),
     ModelFileError, ["record_bytes"]),
    (first("experts", gate=5), ModelFileError, ["gate"]),
    (first("experts", gate={}), ModelFileError, ["gate", "format"]),
    (first("experts", sources=["x"]), ModelFileError, ["sources"]),
    (lambda d: d["extra"].pop("mtp.norm.weight"), ModelFileError, ["mtp.norm.weight"]),
    (lambda d: d["extra"].update(x=1), ModelFileError, ["'x'"]),
    (lambda d: d["extra"].update({"mtp.norm.weight": "1"}), ModelFileError, ["crc32c"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), EDITS)
def test_edited_table(copy, change, error, words):
    edit(copy, change)
    refuse(copy, error, "flashmoe.json" if error is UnsupportedError else "", *words)


def test_config_of_another_model(copy):
    shutil.copy(files.GOLDEN / "q3next_r3/config.json", copy / "config.json")
    refuse(copy, ModelFileError, "shape")


def test_misaligned_records(copy):
    """The same tensor, but its data no longer begins at a multiple of 4096."""
    name = "experts-00001.safetensors"
    experts = files.read(copy / name)["experts"]
    files.write(copy / name, {"experts": experts})
    size = (copy / name).stat().st_size
    edit(copy, lambda d: d["files"].update({name: size}))
    refuse(copy, ModelFileError, name, "multiple of 4096")


def test_tensor_that_the_table_does_not_know(copy):
    path = copy / "trunk.safetensors"
    files.write(path, {**files.read(path), "x": files.Stored("U8", [1], b"x")})
    edit(copy, lambda d: d["files"].update({"trunk.safetensors": path.stat().st_size}))
    refuse(copy, ModelFileError, "'x'", "flashmoe.json")


def test_head_of_a_tied_model(tmp_path):
    pack(files.GOLDEN / "q35dense", tmp_path / "p", bits=None)
    doc = json.loads((tmp_path / "p/flashmoe.json").read_text())
    head = {**doc["tensors"][0], "name": "lm_head"}
    edit(tmp_path / "p", lambda d: d["tensors"].append(head))
    refuse(tmp_path / "p", ModelFileError, "lm_head", "tied")
