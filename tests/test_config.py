"""Strict reading of configuration objects."""

from __future__ import annotations

import pytest

from flashmoe.config import FIELDS, ConfigReader, check_config, load_json, nearest, read_rope
from flashmoe.errors import ModelFileError, StorageError, UnsupportedError


def good():
    """Return core numbers that pass."""
    c = {k: kind(max(low, 1) if low >= 0 else 1) for k, (kind, low, _) in FIELDS.items()}
    c.update(mixers=[0], ffns=[1], rms_norm_eps=1e-6, rotary_dim=2, head_dim=4, hidden_size=8,
             num_attention_heads=4, num_key_value_heads=2, num_experts=8, num_experts_per_tok=3)
    return c  # fmt: skip


def test_good_config_passes():
    check_config(good(), "x")


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_every_field_is_checked(name):
    kind, low, high = FIELDS[name]
    for bad in (low - 1, high * 2 + 1, None, "1", float("nan"), float("inf"), True):
        if name in ("rms_norm_eps",) and bad == low - 1:
            bad = -1e-9
        with pytest.raises(ModelFileError, match=name):
            check_config({**good(), name: bad}, "x")
    with pytest.raises(ModelFileError, match=name):
        check_config({k: v for k, v in good().items() if k != name}, "x")
    if kind is int:
        with pytest.raises(ModelFileError, match=name):
            check_config({**good(), name: 1.5}, "x")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4"),
        ({"rotary_dim": 8}, "rotary_dim 8"),
        ({"num_experts_per_tok": 9}, "num_experts 8"),
        ({"mixers": [1], "linear_num_value_heads": 3, "linear_num_key_heads": 2}, "heads 3"),
        ({"mixers": [1], "linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim is 0"),
        ({"mixers": [2]}, "mixers"),
        ({"mixers": []}, "mixers"),
        ({"ffns": [0], "intermediate_size": 0}, "intermediate_size is 0"),
        ({"n_group": 3, "topk_group": 1}, "n_group 3"),
        ({"n_group": 8, "topk_group": 4}, "fewer than 2"),
        ({"n_group": 4, "topk_group": 1}, "topk_group 1 leaves"),
        ({"n_groups": 4}, "nearest known name: 'n_group'"),
    ],
)
def test_rules_between_fields(change, words):
    with pytest.raises(ModelFileError, match=words):
        check_config({**good(), **change}, "x")


def test_reader_types():
    r = ConfigReader({"i": 3, "f": 0.5, "b": True, "l": [1, 2], "o": {"x": 1}, "n": None}, "c")
    assert r.integer("i") == 3
    assert r.number("f") == 0.5
    assert r.number("i") == 3.0
    assert r.flag("b") is True
    assert r.int_list("l", 0, 2) == [1, 2]
    assert r.integer("n", 7) == 7
    assert r.int_list("absent", 0, 1) == []
    assert r.sub("o") is not None
    assert r.sub("absent") is None
    for call in (lambda: r.integer("f"), lambda: r.integer("b"), lambda: r.number("b"),
                 lambda: r.flag("i"), lambda: r.int_list("l", 0, 1), lambda: r.sub("l"),
                 lambda: r.integer("absent"), lambda: r.integer("i", high=2)):  # fmt: skip
        with pytest.raises(ModelFileError, match=r"^c: "):
            call()


def test_unknown_keys():
    r = ConfigReader({"known": 1, "dtype": "bfloat16", "off": None, "no": False, "none": []}, "c")
    r.integer("known")
    r.finish()
    r = ConfigReader({"knwon": 1}, "c")
    r.integer("known", 0)
    with pytest.raises(UnsupportedError, match=r"'knwon' = 1.*nearest known name: 'known'"):
        r.finish()


def test_expect_is_strict_about_types():
    for value in (1, "true", 1.0):
        with pytest.raises(UnsupportedError, match="supported: true"):
            ConfigReader({"a": value}, "c").expect("a", True)
    ConfigReader({"a": True}, "c").expect("a", True)
    ConfigReader({}, "c").expect("a", True)


@pytest.mark.parametrize(
    ("config", "want"),
    [
        ({"rope_theta": 1e4}, (1e4, 16)),
        ({"rope_theta": 10, "partial_rotary_factor": 0.25}, (10.0, 4)),
        ({"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.5}}, (1e7, 8)),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, (5, 16)),
        ({"rope_theta": 5, "rope_scaling": {"type": "default", "mrope_section": [1]}}, (5, 16)),
        ({"rope_theta": 5, "rope_scaling": None}, (5, 16)),
    ],
)
def test_rope(config, want):
    assert read_rope(ConfigReader(config, "c"), 16, 1) == want


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({}, ModelFileError, "rope_theta is missing"),
        ({"rope_parameters": {}}, ModelFileError, "rope_theta is missing"),
        ({"rope_theta": 5, "rope_parameters": {"rope_theta": 6}}, ModelFileError, "6 and as 5"),
        ({"rope_theta": 5, "rope_scaling": {"rope_type": "llama3"}}, UnsupportedError, "llama3"),
        ({"rope_theta": 5, "rope_scaling": {"factor": 8}}, UnsupportedError, "factor"),
        ({"rope_theta": 5, "partial_rotary_factor": 0.2}, ModelFileError, "rotary size 3"),
        ({"rope_theta": 5, "partial_rotary_factor": 1.5}, ModelFileError, "partial_rotary_factor"),
        ({"rope_theta": "big"}, ModelFileError, "rope_theta"),
        ({"rope_theta": 5, "rope_scaling": 2}, ModelFileError, "rope_scaling"),
    ],
)
def test_rope_refusals(config, error, words):
    with pytest.raises(error, match=words):
        read_rope(ConfigReader(config, "c"), 16, 1)


def test_load_json(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, {"b": null}]}')
    assert load_json(path) == {"a": [1, {"b": None}]}
    with pytest.raises(ModelFileError, match="limit is 5"):
        load_json(path, max_bytes=5)
    with pytest.raises(StorageError) as e:
        load_json(tmp_path / "absent.json")
    assert e.value.errno == 2
    assert e.value.filename == str(tmp_path / "absent.json")
    path.write_text('{"a": ' + "9" * 10_000 + "}")
    with pytest.raises(ModelFileError):
        load_json(path)


def test_nearest():
    assert nearest("hiden_size", ["hidden_size"]) == " (nearest known name: 'hidden_size')"
    assert nearest("zzz", ["hidden_size"]) == ""
