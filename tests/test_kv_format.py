"""K and V in f16 and bf16: the same for every way to feed and divide the work, half the memory."""

from __future__ import annotations

import json
import struct
import sys

import numpy as np
import pytest
from engines import (
    BOUND,
    GOLDEN,
    core_desc,
    core_engine,
    golden_names,
    ids_of,
    prompts,
    run,
    worst,
)
from oracle import model as oracle

from flashmoe import Engine, _core, cli
from flashmoe.errors import ArgumentError, ModelFileError, UnsupportedError
from flashmoe.prepare import KV_FORMATS
from flashmoe.system import resident_bytes

HALF = [f for f in KV_FORMATS if f != "f32"]
MODELS = [n for n in golden_names() if "/" not in n]


def rounded(x: np.ndarray, kv_format: str) -> np.ndarray:
    """Return x to nearest even in a format, as float64."""
    if kv_format == "f16":
        return x.astype(np.float16).astype(np.float64)
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32).astype(np.float64)


def kv_bytes(name: str, context: int) -> int:
    """Return the bytes of K and V in f32."""
    c = core_desc(name)["config"]
    width = c["num_key_value_heads"] * c["head_dim"]
    return list(c["mixers"]).count(0) * 2 * width * context * 4


@pytest.mark.parametrize("kv_format", HALF)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_rounded_keys_and_values(name, kv_format):
    """Against float64 with K and V rounded.  More than the usual bound: a number beside a tie may
    round the other way, which is a step of 2^-11 or 2^-8 of itself."""
    ids = ids_of(name, "p24")
    m = oracle.load(GOLDEN / name)
    m.c["kv_round"] = lambda x: rounded(x, kv_format)
    with core_engine(name, kv_format=kv_format) as engine:
        assert engine.info["kv_format"] == kv_format
        assert worst(run(engine, ids)[0], m.forward(ids)) < BOUND * (2 if kv_format == "f16" else 4)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_one_result_for_all_forms(kv_format):
    """Chunks, single rows, threads, batch mates: the same bits, beyond the first part of positions."""
    name = "q3moe"
    ids = np.arange(1300, dtype=np.int32) % 50 + 1
    opts = {"kv_format": kv_format, "context": 1400, "max_rows": 1300}
    with core_engine(name, n_threads=1, **opts) as engine:
        want, _ = run(engine, ids)
    for n_threads in (2, 5):
        with core_engine(name, n_threads=n_threads, **opts) as engine:
            for chunk in (3, 500, 1300):  # 3 rows: the positions are divided among the threads
                got, session = run(engine, ids[:1290], chunk=chunk)
                assert np.array_equal(got, want[:1290]), (n_threads, chunk)
            mate = engine.session()
            for i in range(1290, 1300):
                both = engine.forward([mate, session], [ids[:2], ids[i : i + 1]], all_logits=True)
                assert np.array_equal(both["logits"][2], want[i])


@pytest.mark.parametrize("kv_format", KV_FORMATS)
@pytest.mark.parametrize("variant", _core.cpu_variants())
def test_every_variant_agrees_with_itself(variant, kv_format, monkeypatch):
    monkeypatch.setenv("FLASHMOE_CPU", variant)
    name = "q35moe_base"
    ids = ids_of(name, prompts(name)[-1])
    with core_engine(name, kv_format=kv_format) as engine:
        assert engine.info["cpu_variant"] == variant
        rows, _ = run(engine, ids)
        assert np.array_equal(rows, run(engine, ids, chunk=len(ids) // 2)[0])


@pytest.mark.parametrize("kv_format", HALF)
@pytest.mark.parametrize("name", ["q3moe", "q35moe_base"])
def test_plan_counts_half(name, kv_format):
    plans = [
        _core.Engine.plan(core_desc(name), {"context": 4096, "kv_format": f})["state_bytes"]
        for f in ("f32", kv_format)
    ]
    assert plans[0] - plans[1] == kv_bytes(name, 4096) // 2


@pytest.mark.parametrize("kv_format", HALF)
@pytest.mark.parametrize("name", ["q3moe", "q35moe_base"])
def test_save_load_and_rewind(name, kv_format):
    ids = ids_of(name, prompts(name)[-1])
    n = len(ids) - 4
    with core_engine(name, kv_format=kv_format) as engine, core_engine(name) as other:
        want, session = run(engine, ids, chunk=n)
        session.rewind(0)
        run(engine, ids[:n], session=session)
        saved = session.save()
        assert np.array_equal(run(engine, ids[n:], session=session)[0], want[n:])
        again = engine.session()
        again.load(saved)
        assert again.pos == n
        assert np.array_equal(run(engine, ids[n:], session=again)[0], want[n:])
        refuses = other.session()
        with pytest.raises(ModelFileError, match=f"KV cache is {kv_format}, this engine's f32"):
            refuses.load(saved)
        full = run(other, ids[:n])[1].save()
        with pytest.raises(ModelFileError, match=f"KV cache is f32, this engine's {kv_format}"):
            again.load(full)
        assert len(full) - len(saved) == kv_bytes(name, n) // 2


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_decode_allocates_nothing_where_a_part_begins(kv_format):
    with core_engine("q3moe", kv_format=kv_format, context=1100, max_rows=512) as engine:
        session = engine.session()
        session.prefill(np.ones(508, dtype=np.int32))
        session.step(1)
        before = _core.internals.n_allocs()
        for _ in range(8):
            session.step(2)
        assert _core.internals.n_allocs() == before


def test_unknown_formats_are_refused():
    with pytest.raises(UnsupportedError, match="kv_format='int8' is not in this build"):
        Engine(kv_format="int8")
    for name in ("affine4", "f64"):
        with pytest.raises(Exception, match=f"kv_format '{name}' is unknown; there are: f32"):
            _core.Engine.plan(core_desc("q3moe"), {"kv_format": name})


def test_generation_reports_it():
    with Engine(kv_format="f16", memory="2GiB") as engine:
        made = engine.generate("Once", max_tokens=3, temperature=0)
        assert made.kv_format == engine.stats()["kv_format"] == "f16"
        assert "K and V in f16" in str(engine.plan)


def test_plan_command_counts_it(capsys):
    sizes = {}
    for kv_format in KV_FORMATS:
        args = ["plan", "--model", "35b", "--ssd", "3", "--ram", "16", "--context", "32768"]
        with pytest.raises(SystemExit, match="0"):
            cli.main([*args, "--kv-format", kv_format, "--json"])
        result = json.loads(capsys.readouterr().out)
        assert result["kv_format"] == kv_format
        sizes[kv_format] = result["state_bytes"]
    kv = 10 * 2 * 2 * 256 * 4 * 32768  # 10 attention layers, 2 KV heads of 256
    assert sizes["f32"] - sizes["f16"] == sizes["f32"] - sizes["bf16"] == kv // 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc for resident memory")
@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_full_context_takes_what_was_planned(kv_format):
    """Resident memory of a session whose every position is filled; unfilled ones cost no more than
    the rest of a huge page per strip of a layer's head."""
    name, n = "q3moe", 1 << 17
    opts = {"context": n, "kv_format": kv_format}
    planned = _core.Engine.plan(core_desc(name), opts)["state_bytes"]
    size = 4 if kv_format == "f32" else 2
    assert planned >= kv_bytes(name, n) * size // 4 > 50 << 20
    with core_engine(name, **opts) as engine:
        session = engine.session()
        session.step(1)  # what decoding keeps is there
        head = struct.Struct("<8s9q")  # save_header of csrc/model/state.c
        fields = list(head.unpack_from(session.save()))
        session.close()
        fields[3] = n - 1  # positions
        saved = head.pack(*fields) + b"\1" * (kv_bytes(name, n - 1) * size // 4)
        before = resident_bytes()
        session = engine.session()
        session.step(1)
        assert resident_bytes() - before < 0.25 * planned
        session.load(saved)
        assert 0.9 * planned < resident_bytes() - before < 1.1 * planned
        session.step(2)
        with pytest.raises(ArgumentError, match="context is full"):
            session.step(3)
