"""The memory plan: sizes in words, what is free, how the budget is divided, what is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys

import numpy as np
import pytest
from fake_core import MIB

from flashmoe.errors import ArgumentError, OutOfMemory
from flashmoe.memory import format_bytes, parse_bytes, plan_memory
from flashmoe.system import available_bytes, resident_bytes

GIB = 1 << 30
IDENTITY = {
    "model": "m", "arch": "a", "backend": "cpu", "numeric": "exact", "kv_format": "f32", "n_threads": 2,
    "experts_per_token": 2, "trained_experts_per_token": 4,
}  # fmt: skip


def core_plan(opts):
    """100 MiB trunk, 10 MiB state, 1/4 MiB scratch a row, 4,000 experts of 2 MiB."""
    return {
        "trunk_bytes": 100 * MIB,
        "state_bytes": 10 * MIB,
        "scratch_bytes": opts["max_rows"] * MIB // 4,
        "slot_bytes": 2 * MIB + (8192 if opts["io_direct"] else 0),
        "n_slots_min": 8,
        "n_experts_total": 4000,
        "expert_record_bytes_max": 2 * MIB,
    }


def plan(memory=None, *, io="auto", free=16 * GIB, prefill_chunk=None, baseline=50 * MIB, **more):
    return plan_memory(
        core_plan,
        {"context": 4096},
        memory=memory,
        prefill_chunk=prefill_chunk,
        io=io,
        identity=IDENTITY,
        available=(free, "test"),
        baseline_bytes=baseline,
        **more,
    )


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        (123, 123), ("123", 123), ("1kB", 1000), ("1 KiB", 1024), ("8GiB", 8 * GIB),
        ("8gb", 8 * 10**9), (" 1.5 GiB ", 3 * GIB // 2), ("500MB", 500 * 10**6), ("2T", 2 * 10**12),
        ("7b", 7), ("3M", 3 * 10**6),
    ],
)  # fmt: skip
def test_parse_bytes(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize(
    "bad", ["", "GiB", "8 XB", "8GiBs", "-1GiB", "1e9", "1,5GiB", 0, -5, 1.5, True, None, "0", []]
)
def test_parse_bytes_refuses(bad):
    with pytest.raises(ArgumentError, match="memory="):
        parse_bytes(bad)


def test_format_bytes():
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * GIB // 2, 5 << 40)] == [
        "0 B", "1023 B", "1.00 KiB", "1.50 GiB", "5.00 TiB",
    ]  # fmt: skip


@pytest.mark.parametrize("memory", ["400MiB", "500MiB", "1GiB", "4GiB", "8GiB", "64GiB"])
@pytest.mark.parametrize("io", ["auto", "direct", "pread"])
def test_the_total_stays_within_the_budget(memory, io):
    p = plan(memory, io=io)
    assert p.total_bytes <= p.budget_bytes == parse_bytes(memory)
    assert p.n_slots_min <= p.n_slots <= p.n_experts
    parts = p.baseline_bytes + p.trunk_bytes + p.state_bytes + p.scratch_bytes + p.slots_bytes
    assert p.total_bytes == parts


def test_direct_when_the_experts_exceed_free_memory():
    p = plan("2GiB", free=4 * GIB)
    assert (p.io, p.io_direct) == ("direct", True)
    assert p.budget_bytes - p.total_bytes < p.slot_bytes  # the slots are the cache: all that fits


def test_buffered_when_the_page_cache_holds_them():
    """Never two caches: few slots of our own."""
    p = plan("2GiB", free=16 * GIB)
    assert (p.io, p.io_direct, p.n_slots) == ("pread", False, p.n_slots_min)
    assert p.slot_bytes == 2 * MIB


def test_everything_resident_when_it_fits():
    p = plan("12GiB")
    assert (p.io, p.io_direct, p.n_slots) == ("pread", False, 4000)
    assert plan("12GiB", io="direct").io_direct


def test_direct_reads_refused_by_the_file_system():
    p = plan("2GiB", free=4 * GIB, direct_refused="tmpfs")
    assert (p.io, p.io_direct) == ("pread", False)
    assert "tmpfs" in p.io_reason


def test_prefill_chunk_shrinks_when_memory_is_tight():
    chunks = [plan(f"{m}MiB", free=4 * GIB).prefill_chunk for m in (214, 260, 400, 1200)]
    assert chunks == sorted(chunks)
    assert (chunks[0], chunks[-1]) == (16, 512)
    assert plan("4GiB", prefill_chunk=100).prefill_chunk == 100
    assert plan("4GiB", prefill_chunk=10**6).prefill_chunk == 4096  # the context


def test_prefill_chunk_grows_where_experts_are_streamed():
    assert plan("5GiB", io="direct").prefill_chunk == 1024  # 256 MiB of scratch; 512 would be > 1/16
    assert plan("5GiB", io="direct", prefill_chunk=512).prefill_chunk == 512
    assert plan("16GiB", free=32 * GIB).prefill_chunk == 512  # all experts resident


def test_default_budget_leaves_head_room():
    p = plan(free=8 * GIB)
    assert p.budget_bytes == 50 * MIB + 7 * GIB
    assert "free now by test" in str(p)
    assert plan(free=GIB).budget_bytes == 50 * MIB + GIB - 256 * MIB


def test_too_small_a_budget_names_the_one_that_works():
    with pytest.raises(OutOfMemory, match=r"smallest that works is (\d+)MiB") as e:
        plan("100MiB")
    smallest = int(str(e.value).split("smallest that works is ")[1].split("MiB")[0])
    assert plan(f"{smallest}MiB").n_slots == 8
    with pytest.raises(OutOfMemory, match=r"trunk 100\.00 MiB"):
        plan(f"{smallest - 16}MiB")
    with pytest.raises(OutOfMemory, match="prefill_chunk below 512"):
        plan("300MiB", prefill_chunk=512)
    with pytest.raises(OutOfMemory, match="free now by test"):
        plan(free=100 * MIB)


def test_plan_as_text_and_table():
    p = plan("2GiB", free=4 * GIB)
    text = str(p)
    assert "2 experts per token (trained with 4)" in text
    for label in ("trunk", "state", "scratch", "expert slots", "total", "on disk"):
        assert f"  {label} " in text
    assert p.__rich__().row_count == 7


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:   8388608 kB\n"}


def test_free_memory_of_the_machine(tmp_path):
    assert available_bytes(write(tmp_path, MEMINFO)) == (8 * GIB, "MemAvailable")


def test_cgroup_v2_limit_at_any_level(tmp_path):
    write(tmp_path, MEMINFO)
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/b/memory.max": "max\n",
            "sys/fs/cgroup/a/b/memory.current": "5\n",
            "sys/fs/cgroup/a/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/a/memory.current": f"{3 * GIB}\n",
            "sys/fs/cgroup/a/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        },
    )
    assert available_bytes(tmp_path) == (2 * GIB, "cgroup limit")


def test_cgroup_v2_inside_a_container(tmp_path):
    """The path names the host's group, the files are those of the root."""
    write(tmp_path, MEMINFO)
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../../docker/x\n",
            "sys/fs/cgroup/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory.current": f"{GIB}\n",
        },
    )
    assert available_bytes(tmp_path) == (GIB, "cgroup limit")


def test_cgroup_v1_limit(tmp_path):
    write(tmp_path, MEMINFO)
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,memory:/x\n3:pids:/x\n",
            "sys/fs/cgroup/memory/x/memory.limit_in_bytes": f"{3 * GIB}\n",
            "sys/fs/cgroup/memory/x/memory.usage_in_bytes": f"{GIB}\n",
            "sys/fs/cgroup/memory/x/memory.stat": "total_inactive_file 0\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
        },
    )
    assert available_bytes(tmp_path) == (2 * GIB, "cgroup limit")


def test_this_process():
    assert 10 * MIB < resident_bytes() < 16 * GIB
    assert available_bytes()[0] > 0


# ---- the plan is kept ----

BIG = {"hidden": 256, "width": 512, "experts": 512, "layers": 4, "vocab": 320, "k": 8}


@pytest.fixture(scope="module")
def big_checkpoint(tmp_path_factory, root):
    """1.6 GB of experts in a sparse file: routed by random weights, all zeros themselves."""
    sys.path.insert(0, str(root / "tools"))
    try:
        import make_noise_model as noise
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("big")
    h, n = BIG["hidden"], BIG["experts"]
    config = {
        "model_type": "qwen3_moe", "hidden_size": h, "num_hidden_layers": BIG["layers"],
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 320,
        "num_experts": n, "num_experts_per_tok": BIG["k"], "moe_intermediate_size": BIG["width"],
        "intermediate_size": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "max_position_embeddings": 4096, "tie_word_embeddings": True, "norm_topk_prob": True,
        "hidden_act": "silu", "mlp_only_layers": [], "decoder_sparse_step": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(0)
    small = {"model.embed_tokens.weight": (320, h), "model.norm.weight": (h,)}
    experts = {}
    for i in range(BIG["layers"]):
        p = f"model.layers.{i}."
        small |= {p + f"{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
        p += "self_attn."
        small |= {p + f"{x}_proj.weight": (m, h) for x, m in (("q", 128), ("k", 64), ("v", 64))}
        small |= {p + "o_proj.weight": (h, 128), p + "q_norm.weight": (32,)}
        small |= {p + "k_norm.weight": (32,), f"model.layers.{i}.mlp.gate.weight": (n, h)}
        for e in range(n):
            p = f"model.layers.{i}.mlp.experts.{e}."
            for x in ("gate", "up"):
                experts[p + f"{x}_proj.weight"] = (BIG["width"], h)
            experts[p + "down_proj.weight"] = (h, BIG["width"])
    header, at, data = {}, 0, b""
    for name, shape in small.items():
        data += noise.bfloat16(rng.standard_normal(shape).astype(np.float32))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, len(data)]}
        at = len(data)
    for name, shape in experts.items():
        end = at + 2 * shape[0] * shape[1]
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text + data)
        f.truncate(8 + len(text) + at)
    return folder


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for the peak")
@pytest.mark.parametrize("io", ["direct", "pread"])
def test_peak_memory_stays_within_the_budget(big_checkpoint, io):
    """Experts ten times the budget; the peak is the kernel's own count for a fresh process."""
    code = f"""
import re, sys
from flashmoe import Engine, UnsupportedError
try:
    engine = Engine({str(big_checkpoint)!r}, memory="150MiB", io={io!r}, threads=2, context=1024)
except UnsupportedError as e:
    print("skip", e)
    sys.exit()
plan = engine.plan
assert plan.experts_bytes >= 10 * plan.budget_bytes, plan
ids = [(i * 37) % 320 for i in range(200)]
engine.generate(ids, max_tokens=40, ignore_eos=True, seed=1)
engine.logits(ids)
stats = engine.stats()
assert stats["misses"] > plan.n_slots, stats
engine.close()
peak = re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]
print(int(peak) * 1024, plan.budget_bytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout.strip())
    peak, budget = map(int, done.stdout.split())
    assert peak <= budget, f"{peak / MIB:.1f} MiB of {budget / MIB:.1f}"
