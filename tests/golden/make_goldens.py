"""Make the golden checkpoints and their logits; needs torch, transformers and mlx-lm (README.md).

    python tests/golden/make_goldens.py [--only NAME ...] [--scan N]

Every checkpoint is run through transformers (float32) and through the float64 oracle; the golden
values are the oracle's, after both agreed.  The test suite never runs this.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
warnings.filterwarnings("ignore")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from oracle import model as oracle  # noqa: E402
from oracle.router import sigmoid  # noqa: E402
from variants import Variant, draw, mtp_shapes, released_names, variants  # noqa: E402

PROMPTS = {"p1": 1, "p24": 24, "p64": 64, "p150": 150}
GREEDY = 16
BF16 = torch.bfloat16


def prompts(seed: int, vocab: int) -> dict[str, np.ndarray]:
    """Return the prompts of a model."""
    rng = np.random.default_rng(seed)
    return {k: rng.integers(0, vocab - 8, n).astype(np.int32) for k, n in PROMPTS.items()}


def hf_model(v: Variant) -> tuple[Any, Any]:
    """Return (model, class) with arbitrary weights."""
    config = {k: x for k, x in v.config.items() if k != "architectures"}
    cfg = getattr(transformers, v.cfgcls)(**config)
    cls = getattr(transformers, v.cls, None)
    if cls is None:
        kind = v.config["model_type"]
        cls = getattr(importlib.import_module(f"transformers.models.{kind}.modeling_{kind}"), v.cls)
    how = {"attn_implementation": "eager", "dtype": torch.float32}
    if v.text.get("num_experts_per_tok"):
        how["experts_implementation"] = "eager"
    return cls._from_config(cfg, **how).eval(), cls


def fill(model: Any, v: Variant, seed: int) -> dict[str, torch.Tensor]:
    """Draw all weights and return them as the checkpoint's tensors."""
    g = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for k, t in state.items():
        if k == "lm_head.weight" and v.tied:
            continue
        x = draw(k, tuple(t.shape), g, v.zero_centred)
        if v.tied and k.endswith("embed_tokens.weight"):
            x = x * 3.0 / v.text["hidden_size"] ** 0.5  # the same matrix gives logits of std 3
        t.copy_(x if k.endswith(v.f32 or ("\0",)) else x.to(BF16).float())
    if v.tied:
        model.tie_weights()
    state = {k: t for k, t in state.items() if not (v.tied and k == "lm_head.weight")}
    out = released_names(state, v)
    if v.mtp:
        for k, shape in mtp_shapes(v).items():
            out[k] = draw(k, shape, g, v.zero_centred)
    return {
        k: (t.float() if k.endswith(v.f32 or ("\0",)) else t.to(BF16)).contiguous().clone()
        for k, t in out.items()
    }


def run_oracle(m: Any, ids: dict[str, np.ndarray], k: int) -> tuple[dict[str, Any], float, float]:
    """Return the golden arrays, the smallest router gap and the smallest greedy gap."""
    gold: dict[str, Any] = {}
    router_gap = greedy_gap = np.inf
    gaps: list[float] = []
    route = oracle.mixture.__globals__["route"]

    def spy(logits: np.ndarray, k: int, *, bias: Any = None, **kw: Any) -> Any:
        choice = sigmoid(logits) + bias if bias is not None else logits
        if kw.get("n_group", 1) == 1:
            s = -np.sort(-choice, -1)
            gaps.append(float((s[:, k - 1] - s[:, k]).min()))
        return route(logits, k, bias=bias, **kw)

    oracle.mixture.__globals__["route"] = spy
    try:
        for name, prompt in ids.items():
            m.reset()
            logits = m.forward(prompt)
            gold[f"{name}.ids"] = prompt
            gold[f"{name}.logits_f64"] = logits.astype(np.float32)
            if k:
                gold[f"{name}.router_idx"] = m.router_sets(k).astype(np.int16)
            last, tokens, steps, routes = logits[-1], [], [], []
            for _ in range(GREEDY):
                top = np.sort(last)
                greedy_gap = min(greedy_gap, float(top[-1] - top[-2]))
                tokens.append(int(last.argmax()))
                last = m.forward(tokens[-1:])[0]
                steps.append(last)
                if k:
                    routes.append(m.router_sets(k)[0])
            tokens.append(int(last.argmax()))
            gold[f"{name}.greedy_tokens"] = np.array(tokens, np.int32)
            gold[f"{name}.greedy_logits_f64"] = np.stack(steps).astype(np.float32)
            if k:
                gold[f"{name}.greedy_router_idx"] = np.stack(routes).astype(np.int16)
    finally:
        oracle.mixture.__globals__["route"] = route
    return gold, min(gaps, default=router_gap), greedy_gap


def worst(a: Any, b: Any) -> float:
    """Return the largest absolute difference."""
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).max())


def make(name: str, v: Variant, out: Path) -> dict[str, Any]:
    """Write one model and return its entry of the manifest."""
    d = out / name
    d.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        model, cls = hf_model(v)
        save_file(fill(model, v, v.seed), str(d / "model.safetensors"), metadata={"format": "pt"})
        (d / "config.json").write_text(json.dumps(v.config, indent=1) + "\n")
        reloaded, info = cls.from_pretrained(
            d, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
        ids = prompts(v.seed, v.text["vocab_size"])
        m = oracle.load(d)
        k = v.text.get("num_experts_per_tok", 0)
        gold, router_gap, greedy_gap = run_oracle(m, ids, k)
        differences = []
        for key, prompt in ids.items():
            tokens = gold[f"{key}.greedy_tokens"]
            whole = torch.tensor(np.concatenate([prompt, tokens[:-1]]).astype(np.int64))[None]
            logits = reloaded.eval()(input_ids=whole, use_cache=False).logits[0].numpy()
            f64 = np.concatenate([gold[f"{key}.logits_f64"], gold[f"{key}.greedy_logits_f64"]])
            differences.append(worst(logits, f64))
            assert (logits[len(prompt) - 1 :].argmax(-1) == tokens).all(), (name, key)
        assert not info["missing_keys"], info["missing_keys"]
    np.savez_compressed(d / "golden.npz", **gold)
    entry: dict[str, Any] = {
        "seed": v.seed,
        "transformers_vs_oracle": max(differences),
        "router_gap": router_gap if np.isfinite(router_gap) else None,
        "greedy_gap": greedy_gap,
        "logit_std": float(gold["p150.logits_f64"].std()),
    }
    assert entry["transformers_vs_oracle"] < 5e-4, entry
    for tag in v.twins:
        entry[tag] = make_twin(d, tag, ids["p24"], k)
    return entry


def plan(tag: str, path: str) -> tuple[int, int]:
    """Return (bits, group) of a module of an MLX twin."""
    gate = path.endswith(("mlp.gate", "shared_expert_gate", "block_sparse_moe.gate"))
    if tag == "mlxmix":
        role = path.rpartition(".")[2] if "switch_mlp" in path else ""
        return {"gate_proj": (3, 64), "up_proj": (5, 32), "down_proj": (6, 64)}.get(role, (8, 64))
    if tag == "mlx2exp" and ".switch_mlp." in path:
        return 2, 64
    return (8 if gate and tag != "mlx4all" else 4), 64


def make_twin(d: Path, tag: str, ids: np.ndarray, k: int) -> dict[str, Any]:
    """Write the MLX-quantised twin of a model; return its entry of the manifest."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map_with_path
    from mlx_lm.utils import load_model, save_model

    t = d / tag
    t.mkdir(exist_ok=True)
    model, cfg = load_model(d, lazy=False)
    keep = ("A_log", "e_score_correction_bias")
    model.update(tree_map_with_path(
        lambda p, x: x if p.endswith(keep) else x.astype(mx.bfloat16), model.parameters()
    ))  # fmt: skip
    overrides: dict[str, Any] = {}

    def predicate(path: str, module: Any) -> Any:
        if not hasattr(module, "to_quantized"):
            return False
        bits, group = plan(tag, path)
        if module.weight.shape[-1] % group:
            return False
        q = {"bits": bits, "group_size": group}
        if (bits, group) != (4, 64):
            overrides[path] = q
        return q

    nn.quantize(model, 64, 4, class_predicate=predicate)
    q = {"group_size": 64, "bits": 4, "mode": "affine", **overrides}
    save_model(t, model)
    cfg = {**cfg, "quantization": q, "quantization_config": q}
    (t / "config.json").write_text(json.dumps(cfg, indent=1) + "\n")
    m = oracle.load(t)
    gold, _, greedy_gap = run_oracle(m, {"p24": ids}, k)
    np.savez_compressed(t / "golden.npz", **gold)
    model.set_dtype(mx.float32)
    got = np.array(model(mx.array(ids.astype(np.int32))[None])[0].astype(mx.float32))
    entry = {"mlx_vs_oracle": worst(got, gold["p24.logits_f64"]), "greedy_gap": greedy_gap}
    assert entry["mlx_vs_oracle"] < 2e-3, entry
    return entry


def scan(name: str, v: Variant, n: int, out: Path) -> None:
    """Print the seeds with the widest gaps and the smallest float32 error of transformers."""
    results = []
    model, _ = hf_model(v)
    d = out / name
    d.mkdir(parents=True, exist_ok=True)
    (d / "config.json").write_text(json.dumps(v.config))
    for seed in range(1, n + 1):
        ids = prompts(seed, v.text["vocab_size"])
        with torch.no_grad():
            save_file(fill(model, v, seed), str(d / "model.safetensors"))
            whole = torch.tensor(ids["p150"].astype(np.int64))[None]
            logits = model(input_ids=whole, use_cache=False).logits[0].numpy()
        gold, r, g = run_oracle(oracle.load(d), ids, v.text.get("num_experts_per_tok", 0))
        e = worst(logits, gold["p150.logits_f64"])
        score = min(r / 3e-4, 1) * min(g / 3e-2, 1) * min(1e-4 / e, 1)
        results.append((score, seed, r, g, e))
    results.sort(reverse=True)
    print(name, [(s, *(float(f"{x:.2g}") for x in m)) for _, s, *m in results[:4]], flush=True)


def manifest(entries: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return MANIFEST.json: origin, measured differences, and the hash of every file."""
    from importlib.metadata import version

    files = {
        str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest()
        for name in entries
        for p in sorted((out / name).rglob("*"))
        if p.is_file()
    }
    tools = ("torch", "transformers", "mlx", "mlx-lm", "numpy", "safetensors")
    return {
        "command": "python tests/golden/make_goldens.py",
        "date": datetime.date.today().isoformat(),
        "python": sys.version.split()[0],
        "versions": {n: version(n) for n in tools},
        "models": entries,
        "sha256": files,
    }


def main() -> None:
    """Run the command line."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--out", type=Path, default=HERE)
    ap.add_argument("--only", nargs="*")
    ap.add_argument("--scan", type=int, default=0, help="try this many seeds; write scratch files")
    a = ap.parse_args()
    torch.set_num_threads(int(os.environ.get("ORACLE_THREADS", "2")))
    path = a.out / "MANIFEST.json"
    entries = json.loads(path.read_text())["models"] if path.exists() else {}
    for name, v in variants().items():
        if a.only and name not in a.only:
            continue
        if a.scan:
            scan(name, v, a.scan, a.out)
            continue
        entries[name] = make(name, v, a.out)
        print(name, json.dumps(entries[name]), flush=True)
    if not a.scan:
        path.write_text(json.dumps(manifest(entries, a.out), indent=1) + "\n")


if __name__ == "__main__":
    main()
