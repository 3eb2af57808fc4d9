"""Readers: golden checkpoints are described to the last byte and decode to the oracle's weights."""

from __future__ import annotations

import functools
import json
import re

import checkpoint_files as files
import numpy as np
import pytest
from oracle import model as oracle
from oracle.quant import bf16_to_f64, dequantise

from flashmoe.checkpoint import ARCHITECTURES, open_checkpoint
from flashmoe.checkpoint.description import Piece
from flashmoe.checkpoint.formats import area_bytes, bits_of, role_bytes
from flashmoe.config import FIELDS
from flashmoe.errors import ModelFileError, StorageError, UnsupportedError

ALL = [*files.MODELS, *files.TWINS]
KINDS = {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}


@functools.lru_cache(maxsize=2)
def load_oracle(name):
    return oracle.load(files.GOLDEN / name)


def numbers(raw, fmt):
    a = raw.view(KINDS[fmt])
    return bf16_to_f64(a) if fmt == "bf16" else a.astype(np.float64)


def decode(areas, fmt, group, scale, n_rows, n_cols):
    """Decode byte areas with the oracle's codec."""
    bits = bits_of(fmt)
    if not bits:
        return numbers(areas[0], fmt).reshape(n_rows, n_cols)
    s, b = (numbers(a, scale).reshape(n_rows, n_cols // group) for a in areas[1:])
    return dequantise(areas[0].reshape(n_rows, -1), s, b, bits)


def decode_tensor(d, t):
    areas = [files.gather(d.files, p) for p in (t.codes, t.scales, t.biases) if p]
    n_rows, n_cols = t.shape if len(t.shape) == 2 else (1, t.shape[0])
    w = decode(areas, t.format, t.group, t.scale_format, n_rows, n_cols)
    return w.reshape(t.shape)


def decode_experts(d, e):
    """Return the three stacks of a layer's experts."""
    stacks = []
    at = 0
    for r in (e.gate, e.up, e.down):
        sizes = role_bytes(r)
        ws = []
        for i in range(len(e.file)):
            pieces = [
                Piece(int(e.file[i, at + a]), int(e.offset[i, at + a]), n)
                for a, n in enumerate(sizes)
            ]
            areas = [files.gather(d.files, [p]) for p in pieces]
            ws.append(decode(areas, r.format, r.group, r.scale_format, r.n_rows, r.n_cols))
        stacks.append(np.stack(ws))
        at += len(sizes)
    return stacks


def all_pieces(d):
    for t in d.tensors:
        yield from (*t.codes, *t.scales, *t.biases)
    for e in d.experts:
        sizes = [n for r in (e.gate, e.up, e.down) for n in role_bytes(r)]
        for i in range(e.file.shape[0]):
            for s, n in enumerate(sizes):
                yield Piece(int(e.file[i, s]), int(e.offset[i, s]), n)
    for x in d.extra:
        yield x.piece


@pytest.mark.parametrize("name", ALL)
def test_every_byte_is_accounted_for(name):
    d = open_checkpoint(files.GOLDEN / name)
    ranges = sorted((p.file, p.offset, p.n_bytes) for p in all_pieces(d))
    end = (-1, 0)
    for file, offset, n in ranges:
        assert n > 0
        assert (file, offset) >= end, "pieces overlap"
        assert offset + n <= d.files[file][1]
        end = (file, offset + n)
    stored = files.read(files.GOLDEN / name / "model.safetensors")
    left_out = sum(len(stored[n].data) for n in d.skipped)
    assert sum(r[2] for r in ranges) + left_out == sum(len(t.data) for t in stored.values())
    d.to_core()


@pytest.mark.parametrize("name", ALL)
def test_sizes_follow_from_formats(name):
    d = open_checkpoint(files.GOLDEN / name)
    for t in d.tensors:
        n_rows, n_cols = t.shape if len(t.shape) == 2 else (1, t.shape[0])
        want = area_bytes(t.format, t.group, t.scale_format, n_rows, n_cols)
        areas = [a for a in (t.codes, t.scales, t.biases) if a]
        assert tuple(sum(p.n_bytes for p in a) for a in areas) == want
    for e in d.experts:
        n_segments = sum(len(role_bytes(r)) for r in (e.gate, e.up, e.down))
        assert e.file.shape == e.offset.shape == (d.config["num_experts"], n_segments)
        assert (e.file.dtype, e.offset.dtype) == (np.int32, np.int64)
        assert len(e.sources) == n_segments
    assert [e.layer for e in d.experts] == [i for i, f in enumerate(d.config["ffns"]) if f]


@pytest.mark.parametrize("name", ALL)
def test_decodes_to_the_oracles_weights(name):
    d = open_checkpoint(files.GOLDEN / name)
    w = dict(load_oracle(name).w)
    c = d.config
    hk, hv = c["linear_num_key_heads"], c["linear_num_value_heads"]
    for t in d.tensors:
        p = f"layers.{t.layer}." if t.layer >= 0 else ""
        got = decode_tensor(d, t)
        if t.name.startswith("linear_attn.in_proj") and d.arch == "qwen3_next":
            dk, r = c["linear_key_head_dim"], hv // hk
            dv = c["linear_value_head_dim"]
            if t.name[-1] in "vz":  # de-interleave the oracle's matrix by heads
                y = w[p + "linear_attn.in_proj_qkvz.weight"].reshape(hk, -1, got.shape[1])
                parts = np.split(y, [dk, 2 * dk, 2 * dk + r * dv], axis=1)
                parts = parts[:3] if t.name.endswith("qkv") else parts[3:]
            else:
                y = w[p + "linear_attn.in_proj_ba.weight"].reshape(hk, 2 * r, -1)
                parts = [y[:, :r] if t.name.endswith("b") else y[:, r:]]
            want = np.concatenate([x.reshape(-1, got.shape[1]) for x in parts])
        else:
            key = p + t.name
            want = w.get(key + ".weight", w.get(key))
        assert (got == want.reshape(got.shape)).all(), t.name
    for e in d.experts:
        for role, got in zip(("gate", "up", "down"), decode_experts(d, e), strict=True):
            assert (got == w[f"layers.{e.layer}.mlp.experts.{role}"]).all()


@pytest.mark.parametrize("name", ALL)
def test_add_one_marks_the_released_zero_centred_norms(name):
    d = open_checkpoint(files.GOLDEN / name)
    marked = {t.name for t in d.tensors if t.add_one}
    if "mlx" in name or not name.startswith(("q35", "q3next")):
        assert not marked
    else:
        assert marked == {"norm", "input_layernorm", "post_attention_layernorm",
                          "self_attn.q_norm", "self_attn.k_norm"}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_the_essentials_of_config(name):
    d = open_checkpoint(files.GOLDEN / name)
    c = oracle.load(files.GOLDEN / name).c
    assert d.config["rotary_dim"] == c["rotary_dim"]
    assert d.config["rope_theta"] == c["theta"]
    assert d.config["rms_norm_eps"] == c["eps"]
    assert d.config["tie_word_embeddings"] == c["tied"]
    assert [("full", "linear")[m] for m in d.config["mixers"]] == c["mixers"]
    assert d.eos_token_ids
    assert d.origin == ("mlx" if "mlx" in name else "hf")


def test_config_fields_are_those_of_the_core(root):
    text = (root / "csrc/model/config.h").read_text()
    found = {name: kind for kind, name in re.findall(r"X\((\w+), (\w+), ", text)}
    found.pop("name", None)
    assert found == {k: {int: "int64_t", float: "double"}[v[0]] for k, v in FIELDS.items()}


def test_tensor_names_are_those_of_the_core(root):
    text = (root / "csrc/store/tensor_list.h").read_text()
    known = set(re.findall(r'X\(\w+, "([^"]+)"', text))
    matrices = set(re.findall(r'"([^"]+)", MATRIX', text))
    for name in ALL:
        for t in open_checkpoint(files.GOLDEN / name).tensors:
            assert t.name in known
            assert bits_of(t.format) == 0 or t.name in matrices


def test_drafting_and_vision_tensors():
    d = open_checkpoint(files.GOLDEN / "q35moe_base")
    assert {x.name.split(".")[0] for x in d.extra} == {"mtp"}
    assert "mtp.layers.0.mlp.experts.0.gate_proj.weight" in {x.name for x in d.extra}
    assert d.skipped
    assert all(n.startswith("model.visual.") for n in d.skipped)


# ------------------------------------------------------------------ the same model otherwise


def same_weights(a, b):
    """Compare two descriptions by content."""
    for x, y in zip(a.tensors, b.tensors, strict=True):
        assert (x.name, x.layer, x.format, x.shape, x.add_one) == (
            y.name, y.layer, y.format, y.shape, y.add_one
        )  # fmt: skip
        assert (files.gather(a.files, x.codes) == files.gather(b.files, y.codes)).all()
    for e, f in zip(a.experts, b.experts, strict=True):
        for x, y in zip(decode_experts(a, e), decode_experts(b, f), strict=True):
            assert (x == y).all()
    assert a.config == b.config
    assert a.eos_token_ids == b.eos_token_ids


def split_experts(tensors, form):
    """Turn fused experts into one of the per-expert layouts."""
    for name in [n for n in tensors if n.endswith("experts.gate_up_proj")]:
        base = name.removesuffix("gate_up_proj")
        both, down = tensors.pop(name), tensors.pop(base + "down_proj")
        n, rows, cols = both.shape
        size = len(both.data) // n
        for e in range(n):
            one = files.Stored(both.dtype, [rows, cols], both.data[e * size : (e + 1) * size])
            if form == "third":
                tensors[f"{base}{e}.gate_up_proj.weight"] = one
            else:
                tensors[f"{base}{e}.gate_proj.weight"] = files.cut(one, 0, rows // 2)
                tensors[f"{base}{e}.up_proj.weight"] = files.cut(one, rows // 2, rows)
            last = files.cut(down, e, e + 1)
            tensors[f"{base}{e}.down_proj.weight"] = files.Stored(
                last.dtype, last.shape[1:], last.data
            )


@pytest.mark.parametrize("form", ["each", "third"])
def test_expert_layouts_agree(tmp_path, form):
    d = files.copy("q35moe_r4", tmp_path / "m")
    files.change_tensors(d, lambda t: split_experts(t, form))
    other = open_checkpoint(d)
    same_weights(open_checkpoint(files.GOLDEN / "q35moe_r4"), other)
    assert "{}" in other.experts[0].sources[0]


def test_layouts_may_differ_by_layer(tmp_path):
    d = files.copy("q35moe_r4", tmp_path / "m")

    def change(tensors):
        part = {k: t for k, t in tensors.items() if ".layers.1.mlp.experts" in k}
        for k in part:
            del tensors[k]
        split_experts(part, "each")
        tensors.update(part)

    files.change_tensors(d, change)
    same_weights(open_checkpoint(files.GOLDEN / "q35moe_r4"), open_checkpoint(d))


def test_flat_text_only_config(tmp_path):
    d = files.copy("q35moe_r4", tmp_path / "m")

    def flatten(config):
        text = config["text_config"]
        config.clear()
        config.update(text, architectures=["Qwen3_5MoeForCausalLM"])

    files.change_config(d, flatten)
    same_weights(open_checkpoint(files.GOLDEN / "q35moe_r4"), open_checkpoint(d))


def test_number_of_experts_under_its_other_name(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    files.change_config(d, lambda c: c.update(num_local_experts=c.pop("num_experts")))
    same_weights(open_checkpoint(files.GOLDEN / "q3moe"), open_checkpoint(d))


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", ""])
def test_prefixes(tmp_path, prefix):
    d = files.copy("q35moe_r4", tmp_path / "m")

    def rename(tensors):
        for k in [k for k in tensors if k.startswith("model.language_model.")]:
            tensors[prefix + k.removeprefix("model.language_model.")] = tensors.pop(k)

    files.change_tensors(d, rename)
    a, b = open_checkpoint(files.GOLDEN / "q35moe_r4"), open_checkpoint(d)
    same_weights(a, b)


def test_shards(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    tensors = files.read(d / "model.safetensors")
    (d / "model.safetensors").unlink()
    files.write_shards(d, tensors, 3)
    other = open_checkpoint(d)
    assert len(other.files) == 3
    same_weights(open_checkpoint(files.GOLDEN / "q3moe"), other)
    (d / "model.safetensors.index.json").unlink()
    same_weights(other, open_checkpoint(d))


def test_eos_ids_of_both_files(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    (d / "generation_config.json").write_text('{"eos_token_id": [9, 255, 7]}')
    assert open_checkpoint(d).eos_token_ids == (255, 9, 7)


def test_tied_head_in_the_file_is_left_out(tmp_path):
    d = files.copy("q35dense", tmp_path / "m")

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]

    files.change_tensors(d, add_head)
    x = open_checkpoint(d)
    assert x.config["tie_word_embeddings"] == 1
    assert "lm_head.weight" in x.skipped


def test_glm_drafting_layers_are_kept(tmp_path):
    d = files.copy("glm4moe", tmp_path / "m")
    files.change_config(d, lambda c: c.update(num_nextn_predict_layers=1))
    files.change_tensors(d, lambda t: t.update(
        {"model.layers.4.eh_proj.weight": files.Stored("BF16", [2, 2], bytes(8))}
    ))  # fmt: skip
    assert [x.name for x in open_checkpoint(d).extra] == ["model.layers.4.eh_proj.weight"]


def test_a_repository_that_is_not_downloaded(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelFileError, match="hf download nobody/no-such-model"):
        open_checkpoint("nobody/no-such-model")
    with pytest.raises(StorageError):
        open_checkpoint(tmp_path / "absent" / "very")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFileError, match="not a directory"):
        open_checkpoint(tmp_path / "file")
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        open_checkpoint(tmp_path)


def test_every_architecture_has_a_golden():
    assert {open_checkpoint(files.GOLDEN / n).arch for n in files.MODELS} == {
        a.name for a in ARCHITECTURES
    }
    kinds = [t for a in ARCHITECTURES for t in a.model_types]
    assert len(set(kinds)) == len(kinds)


def test_manifest_hashes():
    import hashlib

    manifest = json.loads((files.GOLDEN / "MANIFEST.json").read_text())
    for name, want in manifest["sha256"].items():
        assert hashlib.sha256((files.GOLDEN / name).read_bytes()).hexdigest() == want, name


def test_unknown_model_type_names_the_known_ones(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    files.change_config(d, lambda c: c.update(model_type="qwen3_mo"))
    with pytest.raises(UnsupportedError, match=r"nearest known name: 'qwen3_moe'"):
        open_checkpoint(d)


def test_a_repository_in_the_cache(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    repo = tmp_path / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs/main").write_text("a" * 40)
    files.copy("q3moe", repo / "snapshots" / ("a" * 40))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    download = hub.snapshot_download
    monkeypatch.setattr(
        hub, "snapshot_download", lambda name, **kw: download(name, cache_dir=tmp_path, **kw)
    )
    same_weights(open_checkpoint(files.GOLDEN / "q3moe"), open_checkpoint("someone/tiny"))
