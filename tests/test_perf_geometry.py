"""Byte and operation counts of known models, and synthetic checkpoints of their geometry."""

from __future__ import annotations

import importlib.util
import json
import os

import numpy as np
import pytest

from flashmoe import _core
from flashmoe.checkpoint import open_checkpoint
from flashmoe.errors import ArgumentError, UnsupportedError
from flashmoe.pack import verify
from flashmoe.perf.geometry import expert_bytes, from_config, from_description, geometry
from flashmoe.perf.models import CONFIGS, known_model
from flashmoe.perf.predict import Hardware, predict
from flashmoe.perf.runner import Runner, random_ids

# The published counts of the Qwen3.5 family's checkpoints, to the byte (35B, 122B, 397B).
FAMILY = ("35b", "122b", "397b")
EXACT = {
    "n_params": (34_660_610_688, 122_111_526_912, 396_346_350_336),
    "trunk_bytes": (1_389_396_096, 3_479_864_832, 5_579_065_472),
    "trunk_read_bytes": (1_103_331_456, 3_050_767_872, 5_006_936_192),
    "embed_bytes": (286_064_640, 429_096_960, 572_129_280),
    "shared_bytes": (70_778_880, 254_803_968, 424_673_280),
    "expert_bytes": (1_769_472, 5_308_416, 7_077_888),
    "experts_bytes": (18_119_393_280, 65_229_815_808, 217_432_719_360),
    "recurrent_bytes": (62_914_560, 150_994_944, 188_743_680),
    "conv_bytes": (2_949_120, 5_308_416, 6_635_520),
    "kv_bytes_per_token": (40_960, 49_152, 61_440),
}


@pytest.mark.parametrize("field", EXACT)
def test_sizes_to_the_byte(field):
    assert tuple(getattr(geometry(m), field) for m in FAMILY) == EXACT[field]


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({"gate_bits": 4}, (1_378_869_376, 3_460_916_736, 5_516_028_032)),
        ({"bits": 16}, (4_896_721_536, 12_294_833_664, 19_598_604_672)),
    ],
)
def test_trunk_in_other_formats(options, want):
    found = [from_config(known_model(m)[1], m, **options).trunk_bytes for m in FAMILY]
    assert tuple(found) == want


def test_expert_sizes_by_bits():
    weights = [3 * 2048 * 512, 3 * 3072 * 1024, 3 * 4096 * 1024]
    want = {
        2: (983_040, 2_949_120, 3_932_160),
        3: (1_376_256, 4_128_768, 5_505_024),
        8: (3_342_336, 10_027_008, 13_369_344),
        16: (6_291_456, 18_874_368, 25_165_824),
    }
    for bits, sizes in want.items():
        assert tuple(expert_bytes(n, bits) for n in weights) == sizes
    with pytest.raises(ArgumentError, match="bits"):
        expert_bytes(1024, 0)


def test_routed_bytes_per_token():
    want = {
        (4, None): (566_231_040, 2_038_431_744, 4_246_732_800),
        (4, 4): (283_115_520, 1_019_215_872, 1_698_693_120),
        (2, None): (314_572_800, 1_132_462_080, 2_359_296_000),
        (2, 4): (157_286_400, 566_231_040, 943_718_400),
    }
    for (bits, k), sizes in want.items():
        assert tuple(geometry(m, bits=bits).routed_bytes(k) for m in FAMILY) == sizes


def test_operations_per_token():
    trained = [round(geometry(m).flops() / 1e9, 3) for m in FAMILY]
    assert trained == [6.003, 18.281, 32.993]
    assert [round(geometry(m).flops(4) / 1e9, 3) for m in FAMILY] == [4.996, 14.657, 23.933]
    assert [round(geometry(m).attention_flops / 1e6, 3) for m in FAMILY] == [0.164, 0.393, 0.492]


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("qwen3-30b-a3b", 30.5), ("qwen3-235b-a22b", 235.1), ("qwen3-next-80b-a3b", 79.7),
        ("mixtral-8x7b", 46.7), ("olmoe-1b-7b", 6.9),
    ],
)  # fmt: skip
def test_parameters_of_other_models(model, billions):
    assert geometry(model).n_params / 1e9 == pytest.approx(billions, abs=0.06)


def test_names():
    assert known_model("397B")[0] == "qwen3.5-397b-a17b"
    name, config = known_model("35b-12layers")
    assert (name, config["num_hidden_layers"]) == ("qwen3.5-35b-a3b-12layers", 12)
    assert CONFIGS["qwen3.5-35b-a3b"]["num_hidden_layers"] == 40
    with pytest.raises(ArgumentError, match="397b"):
        known_model("398b")


def test_a_checkpoint_counts_like_its_config(golden_q35):
    d = open_checkpoint(golden_q35)
    g = from_description(d)
    config = json.loads((golden_q35 / "config.json").read_text())
    del config["quantization"]
    same = from_config(config, bits=4)
    assert g.n_params == same.n_params
    assert (g.expert_bytes, g.bits) == (same.expert_bytes, 4)
    assert g.kv_bytes_per_token == same.kv_bytes_per_token
    assert g.flops() == same.flops()
    # What the engine plans: state in three copies of the recurrent part, and two rows of logits.
    plan = _core.Engine.plan(d.to_core(), {"context": 100, "max_rows": 1, "n_slots": 0})
    assert plan["state_bytes"] == g.state_bytes(100, copies=3) + 2 * 4 * g.vocab_size
    assert plan["expert_record_bytes_max"] == g.expert_bytes
    assert plan["n_experts_total"] == g.n_experts_total


@pytest.fixture
def golden_q35(root):
    return root / "tests" / "golden" / "q35moe_base" / "mlx4"


# ------------------------------------------------------------------ synthetic checkpoints


@pytest.fixture(scope="module")
def maker(request):
    path = request.config.rootpath / "bench" / "make_geometry.py"
    spec = importlib.util.spec_from_file_location("make_geometry", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.POOL_BYTES = 1 << 20
    return module


def tiny_config(**changes):
    _, config = known_model("35b")
    small = {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 32,
        "num_key_value_heads": 1, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "num_experts": 16,
        "num_experts_per_tok": 4, "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64, "vocab_size": 512,
    }  # fmt: skip
    return {**config, **small, **changes}


def make(maker, out, **options):
    config = options.pop("config", tiny_config())
    said = []
    document = maker.make(out, config, "tiny", say=said.append, **options)
    return document, "\n".join(said)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_synthetic_checkpoint_is_valid_and_runs(maker, tmp_path, bits):
    out = tmp_path / "m"
    make(maker, out, bits=bits)
    report = verify(out)
    assert report.n_records == 4 * 16
    d = open_checkpoint(out)
    assert from_description(d).expert_bytes == expert_bytes(3 * 64 * 64, bits)
    engine = _core.Engine(d.to_core(), {"context": 64, "n_slots": 64, "n_threads": 1})
    session = engine.session()
    ids = np.arange(20, dtype=np.int32)
    out = engine.forward([session], [ids], all_logits=True, trace_hidden=True, trace_router=True)
    logits, hidden = out["logits"], out["hidden"]
    assert np.isfinite(hidden).all()
    assert np.abs(hidden).max() < 100
    assert 0.3 < logits.std() < 3
    assert len(set(logits.argmax(axis=1).tolist())) > 5
    assert len(np.unique(out["router"])) > 8
    engine.close()


def test_synthetic_experts_differ_and_depend_on_the_seed(maker, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make(maker, tmp_path / name, seed=seed)
    a, b, c = (json.loads((tmp_path / n / "flashmoe.json").read_text()) for n in "abc")
    assert a == b
    sums = [x for e in a["experts"] for x in e["crc32c"]]
    assert len(set(sums)) == 64
    assert not set(sums) & {x for e in c["experts"] for x in e["crc32c"]}
    with pytest.raises(SystemExit, match="exists"):
        make(maker, tmp_path / "a")


def test_linked_layers_share_files_and_say_so(maker, tmp_path):
    out = tmp_path / "m"
    document, said = make(maker, out, link_layers=2)
    files = [out / f"experts-{i:05d}.safetensors" for i in range(4)]
    assert os.path.samefile(files[0], files[2])
    assert os.path.samefile(files[1], files[3])
    assert not os.path.samefile(files[0], files[1])
    assert "direct reads only" in said
    recipe = open_checkpoint(out).recipe
    assert "direct reads only" in recipe["note"]
    assert recipe["shared_files"] == {
        "experts-00002.safetensors": "experts-00000.safetensors",
        "experts-00003.safetensors": "experts-00001.safetensors",
    }
    verify(out)
    assert document["recipe"]["n_real_expert_files"] == 2


def test_skew_makes_some_experts_popular(maker, tmp_path):
    """The norm of a router's row decides how often its expert wins."""
    used = {}
    for skew in (0.0, 1.0):
        out = tmp_path / str(skew)
        make(maker, out, skew=skew, config=tiny_config(num_experts=32, num_hidden_layers=2))
        d = open_checkpoint(out)
        engine = _core.Engine(d.to_core(), {"context": 256, "n_slots": 64, "n_threads": 1})
        ids = np.random.default_rng(0).integers(0, 512, 256, dtype=np.int32)
        router = engine.forward([engine.session()], [ids], trace_router=True)["router"]
        engine.close()
        counts = np.sort(np.bincount(router[:, 0].reshape(-1), minlength=32))[::-1]
        used[skew] = counts[:8].sum() / counts.sum()
    assert used[0.0] < 0.5 < used[1.0]


def test_command_line_refuses_what_it_does_not_know(maker, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["x", "--model", "36b", str(tmp_path / "m")])
    with pytest.raises(SystemExit, match="unknown model"):
        maker.main()


def test_predicted_bytes_are_what_an_engine_reads(maker, tmp_path):
    """Near-uniform routing of noise: hit rate, bytes per token and bytes of a prompt."""
    out = tmp_path / "m"
    config = tiny_config(num_experts=48, num_hidden_layers=8, vocab_size=4096)
    make(maker, out, config=config)
    g = geometry(str(out))
    n_slots, n_prompt, n_gen = 120, 64, 160
    options = {"memory": "1GiB", "io": "direct", "threads": 1, "prefill_chunk": n_prompt}
    options["lookahead"] = 0  # a wrong guess reads bytes that no router asked for
    try:
        runner = Runner(str(out), {"n_slots": n_slots}, **options)
    except UnsupportedError as e:
        pytest.skip(f"no direct reads in {tmp_path}: {e}")
    with runner:
        prompt, feed = random_ids(4096, n_prompt, 1), random_ids(4096, n_gen, 2)
        m = runner.measure(prompt, n_gen, feed)
    p = predict(
        g, Hardware(1, 1 << 30), n_slots=n_slots, prompt_tokens=n_prompt, prefill_chunk=n_prompt
    )
    asked = m.decode["hits"] + m.decode["misses"]
    assert asked == (n_gen - 1) * 8 * 4
    assert m.decode["bytes_read"] == m.decode["misses"] * g.slot_bytes
    assert m.decode["hits"] / asked == pytest.approx(p.hit_rate, abs=0.08)
    assert m.decode["bytes_read"] / (n_gen - 1) == pytest.approx(p.read_bytes_per_token, rel=0.12)
    assert m.prefill["bytes_read"] == pytest.approx(p.prefill_read_bytes, rel=0.05)
    assert m.prefill["bytes_read"] <= g.n_experts_total * g.slot_bytes
