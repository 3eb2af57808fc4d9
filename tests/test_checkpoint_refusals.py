"""What must be refused, each for one reason, and with a message that names it."""

from __future__ import annotations

import json
import os

import checkpoint_files as files
import pytest
from checkpoint_files import Stored, text_of

from flashmoe.checkpoint import open_checkpoint
from flashmoe.checkpoint.safetensors_file import read_header
from flashmoe.errors import FlashMoeError, ModelFileError, StorageError, UnsupportedError

ERRORS = files.GOLDEN.parent / "golden_errors"
CASES = json.loads((ERRORS / "CASES.json").read_text())


@pytest.mark.parametrize("name", sorted(CASES))
def test_bad_headers(name):
    with pytest.raises(ModelFileError) as e:
        read_header(ERRORS / name)
    assert CASES[name] in str(e.value)
    assert name in str(e.value)


def test_every_error_file_has_a_case():
    assert {p.name for p in ERRORS.glob("*.safetensors")} == set(CASES)


def refuse(d, error, *words):
    with pytest.raises(FlashMoeError) as e:
        open_checkpoint(d)
    assert type(e.value) is error, e.value
    for word in words:
        assert word in str(e.value)


def setter(**values):
    return lambda c: text_of(c).update(values)


def rope(**values):
    return lambda c: text_of(c)["rope_parameters"].update(values)


def drop(name):
    def change(c):
        del text_of(c)[name]

    return change


CONFIGS = [
    # model, change, error, words
    ("q35moe_k1", setter(hidden_size=65), ModelFileError, ["shape", "65"]),
    ("q35moe_k1", setter(hidden_size=0), ModelFileError, ["hidden_size is 0"]),
    ("q35moe_k1", setter(hidden_size=-64), ModelFileError, ["hidden_size is -64"]),
    ("q35moe_k1", setter(hidden_size=64.0), ModelFileError, ["hidden_size", "integer"]),
    ("q35moe_k1", setter(hidden_size=True), ModelFileError, ["hidden_size", "integer"]),
    ("q35moe_k1", setter(hidden_size="64"), ModelFileError, ["hidden_size", "integer"]),
    ("q35moe_k1", setter(hidden_size=10**30), ModelFileError, ["hidden_size"]),
    ("q35moe_k1", setter(num_hidden_layers=10**6), ModelFileError, ["num_hidden_layers"]),
    ("q35moe_k1", setter(rms_norm_eps=1e999), ModelFileError, ["Infinity"]),
    ("q35moe_k1", setter(rms_norm_eps=float("nan")), ModelFileError, ["NaN"]),
    ("q35moe_k1", setter(rms_norm_eps=-1e-6), ModelFileError, ["rms_norm_eps"]),
    ("q35moe_k1", setter(num_experts_per_tok=9), ModelFileError, ["9", "num_experts 8"]),
    ("q35moe_k1", setter(num_experts_per_tok=0), ModelFileError, ["num_experts_per_tok is 0"]),
    ("q35moe_k1", setter(num_experts=7), ModelFileError, ["shape"]),
    ("q35moe_k1", setter(num_key_value_heads=3), ModelFileError, ["num_key_value_heads 3"]),
    ("q35moe_k1", setter(linear_num_key_heads=3), ModelFileError, ["linear_num_key_heads 3"]),
    ("q35moe_k1", setter(layer_types=["full_attention"]), ModelFileError, ["layer_types", "1"]),
    ("q35moe_k1", setter(layer_types=["sliding_attention"] * 4), UnsupportedError, ["sliding"]),
    ("q35moe_k1", setter(hidden_act="gelu"), UnsupportedError, ["hidden_act", "gelu"]),
    ("q35moe_k1", setter(attention_bias=True), UnsupportedError, ["attention_bias"]),
    ("q35moe_k1", setter(attn_output_gate=False), UnsupportedError, ["attn_output_gate"]),
    ("q35moe_k1", setter(mlp_only_layers=[0]), UnsupportedError, ["mlp_only_layers"]),
    ("q35moe_k1", setter(logit_scale=2.0), UnsupportedError, ["logit_scale"]),
    ("q35moe_k1", setter(num_expert_per_tok=2), UnsupportedError, ["'num_experts_per_tok'"]),
    ("q35moe_k1", setter(eos_token_id=256), ModelFileError, ["eos_token_id", "256"]),
    ("q35moe_k1", setter(model_type="mixtral"), ModelFileError, ["text_config", "mixtral"]),
    ("q35moe_k1", rope(rope_type="yarn", factor=4.0), UnsupportedError, ["rope_type", "yarn"]),
    ("q35moe_k1", rope(type="linear"), UnsupportedError, ["linear"]),
    ("q35moe_k1", rope(rope_theta=None), ModelFileError, ["rope_theta is missing"]),
    ("q35moe_k1", rope(rope_theta=0.5), ModelFileError, ["rope_theta"]),
    ("q35moe_k1", rope(partial_rotary_factor=0.01), ModelFileError, ["rotary"]),
    ("q35moe_k1", rope(beta_fast=32), UnsupportedError, ["beta_fast"]),
    ("q35moe_k1", setter(rope_theta=1e4), ModelFileError, ["1e+07", "10000"]),
    ("q35moe_k1", drop("rope_parameters"), ModelFileError, ["rope_theta is missing"]),
    ("q35moe_k1", drop("num_experts"), ModelFileError, ["num_experts is missing"]),
    ("q35moe_k1", lambda c: c.update(text_config=[]), ModelFileError, ["text_config"]),
    ("q35moe_k1", lambda c: c.update(scale_emb=12), UnsupportedError, ["scale_emb"]),
    ("q35moe_k1", lambda c: c.pop("model_type"), ModelFileError, ["model_type"]),
    ("q3moe", setter(use_sliding_window=True), UnsupportedError, ["use_sliding_window"]),
    ("q3moe", setter(rope_scaling={"type": "yarn"}), UnsupportedError, ["yarn"]),
    ("q3moe", setter(partial_rotary_factor=0.5), UnsupportedError, ["partial_rotary_factor"]),
    ("q3moe", setter(num_local_experts=9), ModelFileError, ["num_local_experts is 9"]),
    ("q3moe", drop("rope_theta"), ModelFileError, ["rope_theta is missing"]),
    ("q3moe", setter(mlp_only_layers=[9]), ModelFileError, ["mlp_only_layers"]),
    ("q3moe", setter(decoder_sparse_step=0), ModelFileError, ["decoder_sparse_step"]),
    ("q3moe", setter(tie_word_embeddings="no"), ModelFileError, ["tie_word_embeddings"]),
    ("mixtral", setter(sliding_window=4096), UnsupportedError, ["sliding_window", "4096"]),
    ("glm4moe_groups", setter(n_group=3), ModelFileError, ["n_group 3"]),
    ("glm4moe_groups", setter(topk_group=5), ModelFileError, ["topk_group 5"]),
    ("glm4moe", setter(scoring_func="softmax"), UnsupportedError, ["scoring_func"]),
    ("glm4moe", setter(attention_bias=False), ModelFileError, ["k_proj.bias"]),
    ("q3moe", setter(quantization_config={"quant_method": "fp8"}), UnsupportedError, ["fp8"]),
    ("q3moe", setter(quantization_config={"quant_method": "gptq"}), UnsupportedError, ["gptq"]),
]


@pytest.mark.parametrize(("model", "change", "error", "words"), CONFIGS)
def test_configs(tmp_path, model, change, error, words):
    d = files.copy(model, tmp_path / "m")
    files.change_config(d, change)
    refuse(d, error, *words)


Q = "model.layers.0.self_attn.q_proj.weight"
E0 = "model.layers.0.mlp.experts.0.gate_proj.weight"


def remove(name):
    return lambda t: t.pop(name)


def reshape(name, *shape):
    def change(t):
        t[name] = Stored(t[name].dtype, list(shape), t[name].data)

    return change


def retype(name, dtype, width):
    def change(t):
        old = t[name]
        n = len(old.data) // 2
        t[name] = Stored(dtype, old.shape, bytes(n * width))

    return change


def add(name, dtype="BF16"):
    return lambda t: t.update({name: Stored(dtype, [1], bytes(2))})


def duplicate(old, new):
    return lambda t: t.update({new: t[old]})


TENSORS = [
    ("q3moe", remove(Q), ModelFileError, [Q, "missing"]),
    ("q3moe", remove("model.norm.weight"), ModelFileError, ["model.norm.weight"]),
    ("q3moe", remove("lm_head.weight"), ModelFileError, ["lm_head.weight"]),
    ("q3moe", remove("model.embed_tokens.weight"), ModelFileError, ["embed_tokens.weight"]),
    ("q3moe", remove(E0), ModelFileError, ["experts of layer 0"]),
    ("q3moe", remove(E0.replace("s.0.g", "s.5.g")), ModelFileError, ["experts.5.gate_proj"]),
    ("q3moe", reshape(Q, 64, 96), ModelFileError, [Q, "(64, 96)", "(96, 64)"]),
    ("q3moe", reshape(E0, 64, 32), ModelFileError, [E0, "(64, 32)", "(32, 64)"]),
    ("q3moe", retype(Q, "F8_E4M3", 1), UnsupportedError, [Q, "FP8"]),
    ("q3moe", retype(Q, "I32", 4), UnsupportedError, [Q, "I32"]),
    ("q3moe", retype(Q, "U32", 4), UnsupportedError, [Q, "scales"]),
    ("q3moe", retype(E0, "F32", 4), UnsupportedError, ["expert 1", "bf16", "f32"]),
    ("q3moe", add("model.layers.0.self_attn.sinks"), ModelFileError, ["self_attn.sinks"]),
    ("q3moe", add("model.layers.4.input_layernorm.weight"), ModelFileError, ["layers.4"]),
    ("q3moe", add(Q + "_scale_inv"), UnsupportedError, ["FP8"]),
    ("q3moe", add("model.layers.0.self_attn.q_proj.qweight"), UnsupportedError, ["GPTQ"]),
    ("q3moe", add("model.layers.0.self_attn.q_proj.bias"), ModelFileError, ["q_proj.bias"]),
    ("q3moe", duplicate("model.embed_tokens.weight", "embed_tokens.weight"), ModelFileError,
     ["both"]),
    ("q3moe", duplicate("lm_head.weight", "model.lm_head.weight"), ModelFileError, ["both"]),
    ("q35moe_k1", reshape("model.language_model.layers.0.linear_attn.conv1d.weight", 96, 3, 1),
     ModelFileError, ["1 + w"]),
    ("q35moe_k1", reshape("model.language_model.layers.0.linear_attn.conv1d.weight", 3, 96, 1),
     ModelFileError, ["conv1d"]),
]  # fmt: skip


@pytest.mark.parametrize(("model", "change", "error", "words"), TENSORS)
def test_tensors(tmp_path, model, change, error, words):
    d = files.copy(model, tmp_path / "m")
    files.change_tensors(d, change)
    refuse(d, error, *words)


def test_raw_norms_in_converted_form(tmp_path):
    """All conv1d as (C, k, 1): the norms then hold 1 + w."""
    d = files.copy("q35moe_k1", tmp_path / "m")

    def change(tensors):
        for t in (t for k, t in tensors.items() if k.endswith("conv1d.weight")):
            t.shape = [t.shape[0], t.shape[2], 1]

    files.change_tensors(d, change)
    assert not any(t.add_one for t in open_checkpoint(d).tensors)


# ---------------------------------------------------------------------- MLX

MQ = "language_model.model.layers.3.self_attn.q_proj"
SW = "language_model.model.layers.0.mlp.switch_mlp.up_proj"
MLX = "q35moe_base/mlx4"


def quantization(**values):
    return lambda c: [c[k].update(values) for k in ("quantization", "quantization_config")]


MLX_CONFIGS = [
    (quantization(mode="mxfp4"), UnsupportedError, ["mxfp4", "affine"]),
    (quantization(**{MQ: {"bits": 4, "group_size": 32, "mode": "nvfp4"}}), UnsupportedError,
     ["nvfp4", MQ]),
    (quantization(**{MQ: {"bits": 8, "group_size": 64}}), ModelFileError, [MQ, "8", "4"]),
    (quantization(**{MQ: {"bits": 4, "group_size": 32}}), ModelFileError, [MQ, "32", "64"]),
    (quantization(**{MQ: False}), ModelFileError, [MQ, "not quantised"]),
    (quantization(**{MQ: 4}), ModelFileError, [MQ]),
    (quantization(**{MQ: {"bits": "4"}}), ModelFileError, [MQ, "bits"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "error", "words"), MLX_CONFIGS)
def test_mlx_configs(tmp_path, change, error, words):
    d = files.copy(MLX, tmp_path / "m")
    files.change_config(d, change)
    refuse(d, error, *words)


def narrower(name):
    """Give every row three scales."""

    def change(t):
        for x in (name + ".scales", name + ".biases"):
            old = t[x]
            n = len(old.data) // old.shape[-1]
            t[x] = Stored(old.dtype, [*old.shape[:-1], 3], bytes(3 * n))

    return change


MLX_TENSORS = [
    (remove(MQ + ".biases"), UnsupportedError, [MQ, "biases"]),
    (remove(MQ + ".scales"), ModelFileError, [MQ + ".scales", "missing"]),
    (remove(SW + ".scales"), ModelFileError, [SW + ".scales", "missing"]),
    (reshape(MQ + ".weight", 512, 4), ModelFileError, [MQ]),
    (narrower(MQ), ModelFileError, [MQ, "affine"]),
    (retype(MQ + ".biases", "F32", 4), ModelFileError, [MQ + ".biases", "F32", "BF16"]),
    (reshape(SW + ".weight", 4, 128, 8), ModelFileError, [SW, "(4, 128, 8)"]),
]


@pytest.mark.parametrize(("change", "error", "words"), MLX_TENSORS)
def test_mlx_tensors(tmp_path, change, error, words):
    d = files.copy(MLX, tmp_path / "m")
    (d / "model.safetensors.index.json").unlink()
    files.change_tensors(d, change)
    refuse(d, error, *words)


# ---------------------------------------------------------------------- files


@pytest.fixture
def sharded(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    tensors = files.read(d / "model.safetensors")
    (d / "model.safetensors").unlink()
    files.write_shards(d, tensors, 3)
    return d


def index_change(d, change):
    path = d / "model.safetensors.index.json"
    doc = json.loads(path.read_text())
    change(doc)
    path.write_text(json.dumps(doc))


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refuse(sharded, ModelFileError, "model-00002-of-00003.safetensors", "missing")
    (sharded / "model.safetensors.index.json").unlink()
    refuse(sharded, ModelFileError, "model-00002-of-00003.safetensors", "missing")


def test_tensor_missing_from_its_shard(sharded):
    index_change(sharded, lambda d: d["weight_map"].update(
        {Q: "model-00001-of-00003.safetensors", E0: "model-00001-of-00003.safetensors",
         "lm_head.weight": "model-00003-of-00003.safetensors"}))  # fmt: skip
    refuse(sharded, ModelFileError, "puts it here")


def test_tensor_in_two_shards(sharded):
    first = files.read(sharded / "model-00001-of-00003.safetensors")
    path = sharded / "model-00002-of-00003.safetensors"
    name, t = next(iter(first.items()))
    files.write(path, {**files.read(path), name: t})
    refuse(sharded, ModelFileError, name, "is also in")


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/passwd", "", 5, None, "x.bin"])
def test_index_with_bad_names(sharded, shard):
    index_change(sharded, lambda d: d["weight_map"].update({Q: shard}))
    refuse(sharded, ModelFileError, "not a file name")


@pytest.mark.parametrize("text", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": [1]}', "{"])
def test_bad_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    refuse(sharded, ModelFileError, "model.safetensors.index.json")


BAD_JSON = ["", "{", "[1]", '"x"', '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": -Infinity}',
            "[" * 100_000, "\ufeff{}", "\x00"]  # fmt: skip


@pytest.mark.parametrize("text", BAD_JSON)
def test_bad_config_json(tmp_path, text):
    d = files.copy("q3moe", tmp_path / "m")
    (d / "config.json").write_text(text, encoding="utf-8")
    refuse(d, ModelFileError, "config.json")


def test_config_that_is_not_utf8(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    (d / "config.json").write_bytes(b'{"a": "\xff"}')
    refuse(d, ModelFileError, "config.json")


def test_no_weights(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    (d / "model.safetensors").unlink()
    refuse(d, ModelFileError, "no model*.safetensors")


@pytest.mark.parametrize("left", [0, 4, 8, 100, 20_000, -1])
def test_truncated_file(tmp_path, left):
    d = files.copy("q3moe", tmp_path / "m")
    path = d / "model.safetensors"
    os.truncate(path, left if left >= 0 else path.stat().st_size - 1)
    refuse(d, ModelFileError, "model.safetensors")


def test_file_that_goes_on(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    with open(d / "model.safetensors", "ab") as f:
        f.write(b"x")
    refuse(d, ModelFileError, "the tensors end at")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    (d / "model.safetensors").chmod(0)
    refuse(d, StorageError, "model.safetensors")


def test_dangling_link(tmp_path):
    d = files.copy("q3moe", tmp_path / "m")
    (d / "model.safetensors").unlink()
    (d / "model.safetensors").symlink_to(tmp_path / "gone")
    refuse(d, StorageError, "model.safetensors")
