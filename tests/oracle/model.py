"""Whole models in float64: read from a checkpoint directory by a reader of the oracle's own.

>>> model = load("tests/golden/q35moe_base")            # doctest: +SKIP
>>> logits = model.forward([1, 2, 3])                   # doctest: +SKIP
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from .attention import Weights, attention, delta_net, rms_norm
from .moe import mixture, swiglu
from .quant import bf16_to_f64, dequantise


class Model:
    """Numbers `c`, float64 weights by canonical name, and the state of one sequence."""

    def __init__(self, c: dict[str, Any], w: Weights) -> None:
        self.c, self.w = c, w
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.state: list[dict[str, Any]] = [{} for _ in range(self.c["layers"])]
        self.router_ids: list[np.ndarray | None] = []

    def norm(self, name: str, x: np.ndarray) -> np.ndarray:
        """Return the RMS norm, with 1 + w where the checkpoint holds w."""
        return rms_norm(x, self.w[name + ".weight"] + self.c["norm_offset"], self.c["eps"])

    def forward(self, ids: Any) -> np.ndarray:
        """Append tokens; return their logits (n_tokens, vocab). Expert ids: ``router_ids``."""
        c, w = self.c, self.w
        x = w["embed_tokens.weight"][np.asarray(ids, np.int64)]
        self.router_ids = []
        for i in range(c["layers"]):
            p = f"layers.{i}."
            h = self.norm(p + "input_layernorm", x)
            if c["mixers"][i] == "full":
                x = x + attention(c, w, p + "self_attn.", h, self.state[i])
            else:
                x = x + delta_net(c, w, p + "linear_attn.", h, self.state[i])
            h = self.norm(p + "post_attention_layernorm", x)
            if f"{p}mlp.experts.gate" in w:
                y, chosen = mixture(c, w, p + "mlp.", h)
                self.router_ids.append(chosen)
            else:
                y = swiglu(w, p + "mlp.", h)
                self.router_ids.append(None)
            x = x + y
        h = self.norm("norm", x)
        return h @ w["embed_tokens.weight" if c["tied"] else "lm_head.weight"].T

    def router_sets(self, k: int) -> np.ndarray:
        """Return the last call's expert ids (n_tokens, n_layers, k), -1 for dense layers."""
        n = next(len(r) for r in self.router_ids if r is not None)
        none = np.full((n, k), -1)
        return np.stack([none if r is None else r for r in self.router_ids], 1)


# ---------------------------------------------------------------------- reading


def read_safetensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return name -> (dtype, array); BF16 as uint16 bit patterns."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    kinds = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U32": "<u4", "U8": "u1"}
    out = {}
    for name, t in json.loads(data[8 : 8 + n]).items():
        if name != "__metadata__":
            a, b = (8 + n + o for o in t["data_offsets"])
            array = np.frombuffer(data[a:b], kinds[t["dtype"]]).reshape(t["shape"])
            out[name] = (t["dtype"], array)
    return out


def _plain(dtype: str, a: np.ndarray) -> np.ndarray:
    return bf16_to_f64(a) if dtype == "BF16" else a.astype(np.float64)


def _values(
    raw: dict[str, tuple[str, np.ndarray]], quantization: dict[str, Any]
) -> dict[str, np.ndarray]:
    """Decode every tensor to float64; affine triples become one array.

    Bits come from the config, not from the shapes as in the package's reader.
    """
    out = {}
    for name, (dtype, a) in raw.items():
        base = name.removesuffix(".weight")
        if name.endswith((".scales", ".biases")):
            continue
        if dtype != "U32":
            out[name] = _plain(dtype, a)
            continue
        bits = (quantization.get(base) or quantization)["bits"]
        s, b = (_plain(*raw[f"{base}.{x}"]) for x in ("scales", "biases"))
        rows = int(np.prod(a.shape[:-1]))
        codes = np.ascontiguousarray(a).view(np.uint8).reshape(rows, -1)
        w = dequantise(codes, s.reshape(rows, -1), b.reshape(rows, -1), bits)
        out[name] = w.reshape(*a.shape[:-1], -1)
    return out


_SPELLINGS = (
    (r"^(model\.language_model|language_model\.model|model|language_model)\.", ""),
    (r"block_sparse_moe\.", "mlp."),
    (r"shared_experts\.", "shared_expert."),
    (r"\.w1\.", ".gate_proj."),
    (r"\.w3\.", ".up_proj."),
    (r"\.w2\.", ".down_proj."),
)


def canonical(values: dict[str, np.ndarray]) -> Weights:
    """Return weights by canonical name: no prefix, experts as stacks, one spelling for all."""
    out: Weights = {}
    parts: dict[str, dict[int, np.ndarray]] = {}
    for name, a in values.items():
        if re.match(r"(model\.)?(visual|vision_tower)\.|(model\.|language_model\.)?mtp\.", name):
            continue
        n = name
        for old, new in _SPELLINGS:
            n = re.sub(old, new, n)
        if m := re.match(r"(.*experts)\.gate_up_proj$", n):
            out[m[1] + ".gate"], out[m[1] + ".up"] = np.split(a, 2, axis=1)
        elif m := re.match(r"(.*experts)\.down_proj$", n):
            out[m[1] + ".down"] = a
        elif m := re.match(r"(.*mlp)\.switch_mlp\.(gate|up|down)_proj\.weight$", n):
            out[f"{m[1]}.experts.{m[2]}"] = a
        elif m := re.match(r"(.*experts)\.(\d+)\.(gate|up|down)_proj\.weight$", n):
            parts.setdefault(f"{m[1]}.{m[3]}", {})[int(m[2])] = a
        elif m := re.match(r"(.*experts)\.(\d+)\.gate_up_proj\.weight$", n):
            for role, half in zip(("gate", "up"), np.split(a, 2), strict=True):
                parts.setdefault(f"{m[1]}.{role}", {})[int(m[2])] = half
        else:
            out[n] = a
    for name, d in parts.items():
        out[name] = np.stack([d[e] for e in range(len(d))])
    return out


def numbers(config: dict[str, Any], w: Weights, shifted: bool) -> dict[str, Any]:
    """Return the oracle's numbers from a config.json."""
    kind = config["model_type"].removesuffix("_text")
    t = config.get("text_config", config)
    rope = t.get("rope_parameters") or {}
    h, nh, n = t["hidden_size"], t["num_attention_heads"], t["num_hidden_layers"]
    hd = t.get("head_dim") or h // nh
    hybrid = kind in ("qwen3_5_moe", "qwen3_5", "qwen3_next")
    partial = rope.get("partial_rotary_factor", t.get("partial_rotary_factor"))
    if partial is None:
        partial = 0.25 if hybrid else 0.5 if kind == "glm4_moe" else 1.0
    mixers = ["full"] * n
    if hybrid:
        types = t.get("layer_types") or [
            "full" if (i + 1) % t["full_attention_interval"] == 0 else "linear" for i in range(n)
        ]
        mixers = ["full" if x.startswith("full") else "linear" for x in types]
    by_default = kind in ("qwen3_next", "glm4_moe")
    router: dict[str, Any] = {"normalise": t.get("norm_topk_prob", by_default)}
    if kind in ("qwen3_5_moe", "mixtral"):
        router["normalise"] = True
    if kind == "glm4_moe":
        router.update(score="sigmoid", eps=1e-20, scale=t["routed_scaling_factor"],
                      n_group=t.get("n_group", 1), topk_group=t.get("topk_group", 1))  # fmt: skip
    qk = {"olmoe": "flat", "mixtral": None}.get(kind, "head")
    if kind == "glm4_moe" and not t.get("use_qk_norm"):
        qk = None
    return {
        "layers": n, "eps": t["rms_norm_eps"], "heads": nh, "head_dim": hd,
        "kv_heads": t.get("num_key_value_heads", nh), "rotary_dim": int(hd * partial),
        "theta": rope.get("rope_theta", t.get("rope_theta")), "gated": hybrid, "qk_norm": qk,
        "clip_qkv": t.get("clip_qkv") or 0.0, "mixers": mixers,
        "norm_offset": 1.0 if hybrid and not shifted else 0.0,
        "k_heads": t.get("linear_num_key_heads"), "v_heads": t.get("linear_num_value_heads"),
        "k_dim": t.get("linear_key_head_dim"), "v_dim": t.get("linear_value_head_dim"),
        "kernel": t.get("linear_conv_kernel_dim"), "top_k": t.get("num_experts_per_tok"),
        "router": router, "tied": "lm_head.weight" not in w,
    }  # fmt: skip


def load(path: str | Path) -> Model:
    """Return the model of a Hugging Face or MLX checkpoint directory."""
    d = Path(path)
    config = json.loads((d / "config.json").read_text())
    raw: dict[str, tuple[str, np.ndarray]] = {}
    for f in sorted(d.glob("*.safetensors")):
        raw.update(read_safetensors(f))
    conv = next((a for n, (_, a) in raw.items() if n.endswith("conv1d.weight")), None)
    w = canonical(_values(raw, config.get("quantization", {})))
    return Model(numbers(config, w, conv is not None and conv.shape[-1] == 1), w)
