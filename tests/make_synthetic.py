"""Write a random checkpoint of any geometry, fast: for tests of memory, speed and sizes.

    python tests/make_synthetic.py DIR --form packed --experts 64 --layers 8 --width 1024

The weights are one block of random numbers over and over: finite, of sensible size, meaningless.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 8 << 20  # bytes of random numbers


def config(
    *,
    layers: int = 4,
    hidden: int = 512,
    experts: int = 32,
    top_k: int = 4,
    width: int = 512,
    vocab: int = 1024,
) -> dict[str, Any]:
    """Return the config.json of a Qwen3.5-MoE of this geometry; every fourth layer is full."""
    heads = max(1, hidden // 128)
    text = {
        "model_type": "qwen3_5_moe_text", "attn_output_gate": True, "eos_token_id": vocab - 1,
        "full_attention_interval": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": hidden,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 64, "linear_num_key_heads": heads,
        "linear_num_value_heads": 2 * heads, "linear_value_head_dim": 64,
        "max_position_embeddings": 32768, "moe_intermediate_size": width,
        "num_attention_heads": 2 * heads, "num_experts": experts, "num_experts_per_tok": top_k,
        "num_hidden_layers": layers, "num_key_value_heads": heads, "rms_norm_eps": 1e-6,
        "shared_expert_intermediate_size": width, "tie_word_embeddings": False,
        "vocab_size": vocab,
        "rope_parameters": {"rope_theta": 1e7, "rope_type": "default",
                            "partial_rotary_factor": 0.25},
    }  # fmt: skip
    return {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe",
            "text_config": text, "tie_word_embeddings": False}  # fmt: skip


def make(path: str | Path, *, form: str = "packed", bits: int = 4, seed: int = 0,
         **geometry: int) -> dict[str, int]:  # fmt: skip
    """Write a checkpoint.

    Parameters
    ----------
    path : str or Path
        A directory that does not exist.
    form : {"hf", "mlx", "packed"}
        Plain bf16; affine experts and matrices of group 64; the same packed.
    bits : {2, 4, 8}
        Of the affine forms.
    **geometry : int
        See :func:`config`.

    Returns
    -------
    dict
        ``expert_bytes`` (one expert), ``all_experts_bytes``, ``trunk_bytes``.
    """
    path = Path(path)
    if form == "packed":
        from flashmoe.pack import pack

        source = path.with_name(path.name + ".mlx")
        sizes = make(source, form="mlx", bits=bits, seed=seed, **geometry)
        pack(source, path, bits=None)
        shutil.rmtree(source)
        return sizes
    path.mkdir(parents=True)
    conf = config(**geometry)
    if form == "mlx":
        conf["quantization"] = {"group_size": 64, "bits": bits, "mode": "affine"}
    (path / "config.json").write_text(json.dumps(conf, indent=1))
    tensors = _tensors(conf["text_config"], form, bits)
    _write(path / "model.safetensors", tensors, form, np.random.default_rng(seed))
    experts = sum(n for name, _, _, n in tensors if ".experts." in name or "switch_mlp" in name)
    t = conf["text_config"]
    one = experts // (t["num_experts"] * t["num_hidden_layers"])
    total = sum(n for *_, n in tensors)
    return {"expert_bytes": one, "all_experts_bytes": experts, "trunk_bytes": total - experts}


def _tensors(t: dict[str, Any], form: str, bits: int) -> list[tuple[str, str, list[int], int]]:
    """Return (name, dtype, shape, bytes) of every tensor."""
    from flashmoe.checkpoint import read_model_config

    arch, mc = read_model_config({"model_type": "qwen3_5_moe", "text_config": t}, "synthetic")
    prefix = "model.language_model." if form == "hf" else "language_model.model."
    out: list[tuple[str, str, list[int], int]] = []

    def add(name: str, shape: tuple[int, ...], matrix: bool) -> None:
        n = int(np.prod(shape))
        if form == "mlx" and matrix and shape[-1] % 64 == 0:
            base, lead = name.removesuffix(".weight"), list(shape[:-1])
            out.append((name, "U32", [*lead, shape[-1] * bits // 32], n * bits // 8))
            for area in ("scales", "biases"):
                out.append((f"{base}.{area}", "BF16", [*lead, shape[-1] // 64], n // 64 * 2))
        else:
            out.append((name, "BF16", list(shape), 2 * n))

    for s in arch.tensors(mc):
        shape = s.shape
        if s.conv:
            shape = (shape[0], 1, shape[1]) if form == "hf" else (*shape, 1)
        add(prefix + s.source, shape, s.matrix)
    add("lm_head.weight" if form == "hf" else "language_model.lm_head.weight",
        (t["vocab_size"], t["hidden_size"]), True)  # fmt: skip
    e, w, h = t["num_experts"], t["moe_intermediate_size"], t["hidden_size"]
    for i in range(t["num_hidden_layers"]):
        p = f"{prefix}layers.{i}.mlp."
        if form == "hf":
            add(p + "experts.gate_up_proj", (e, 2 * w, h), True)
            add(p + "experts.down_proj", (e, h, w), True)
            continue
        for role, shape in (("gate", (e, w, h)), ("up", (e, w, h)), ("down", (e, h, w))):
            add(f"{p}switch_mlp.{role}_proj.weight", shape, True)
    return out


def _write(path: Path, tensors: list[tuple[str, str, list[int], int]], form: str,
           rng: np.random.Generator) -> None:  # fmt: skip
    """Write the file, every tensor from a repeated block of random content."""
    header, at = {}, 0
    for name, dtype, shape, n in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    codes = rng.integers(0, 256, BLOCK, np.uint8).tobytes()
    normal = rng.standard_normal(BLOCK // 2).astype(np.float32)

    def bf16(x: np.ndarray) -> bytes:
        return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype("<u2").tobytes()

    small = bf16(normal * 0.03)
    scales = bf16(np.abs(normal) * 0.002 + 0.001)
    biases = bf16(-np.abs(normal) * 0.015 - 0.008)
    shifted = bf16(1 + normal * 0.1)
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name, dtype, _, n in tensors:
            block = small
            if dtype == "U32":
                block = codes
            elif name.endswith((".scales", ".biases")):
                block = scales if name.endswith(".scales") else biases
            elif form == "mlx" and name.endswith("norm.weight"):
                block = shifted
            for start in range(0, n, BLOCK):
                f.write(memoryview(block)[: min(BLOCK, n - start)])


def main() -> None:
    """Run the command line."""
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("path")
    ap.add_argument("--form", choices=("hf", "mlx", "packed"), default="packed")
    ap.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    ap.add_argument("--seed", type=int, default=0)
    for name in ("layers", "hidden", "experts", "top-k", "width", "vocab"):
        ap.add_argument(f"--{name}", type=int)
    a = {k: v for k, v in vars(ap.parse_args()).items() if v is not None}
    print(json.dumps(make(a.pop("path"), **a)))


if __name__ == "__main__":
    main()
