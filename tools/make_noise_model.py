"""Make the untrained model that comes along: `python tools/make_noise_model.py [DIR]`.

A Qwen3.5 MoE of three layers with random weights from a fixed seed.  It exists so that the whole
path runs without a download: Gated DeltaNet, attention, router, experts from disk, tokenizer, chat
template.  Its text is noise, but printable: the first hidden unit is a constant, through which the
output matrix keeps control characters and half characters improbable.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SEED = 20261123
HIDDEN, HEAD, EXPERTS, WIDTH, LAYERS = 64, 32, 8, 64, ("linear", "linear", "full")
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 320  # 256 bytes, 3 special tokens, padding

TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def config() -> dict:
    """Return config.json."""
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 258,
        "head_dim": HEAD,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "layer_types": [f"{kind}_attention" for kind in LAYERS],
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 16,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": WIDTH,
        "num_attention_heads": 2,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": len(LAYERS),
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000.0,
            "rope_type": "default",
        },
        "shared_expert_intermediate_size": WIDTH,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }


def tensors() -> dict[str, tuple[str, np.ndarray]]:
    """Return name -> (dtype, values)."""
    rng = np.random.default_rng(SEED)
    out: dict[str, tuple[str, np.ndarray]] = {}

    def put(name: str, *shape: int, scale: float | None = None, dtype: str = "BF16") -> np.ndarray:
        scale = shape[-1] ** -0.5 if scale is None else scale
        out[name] = (dtype, (scale * rng.standard_normal(shape)).astype(np.float32))
        return out[name][1]

    embed = put("model.embed_tokens.weight", VOCAB, HIDDEN, scale=0.5)
    embed[:, 0] = 4.0
    for i, kind in enumerate(LAYERS):
        p = f"model.layers.{i}."
        put(p + "input_layernorm.weight", HIDDEN, scale=0.05)
        put(p + "post_attention_layernorm.weight", HIDDEN, scale=0.05)
        if kind == "linear":
            p += "linear_attn."
            put(p + "in_proj_qkv.weight", 128, HIDDEN)
            put(p + "in_proj_z.weight", 64, HIDDEN)
            put(p + "in_proj_b.weight", 4, HIDDEN)
            put(p + "in_proj_a.weight", 4, HIDDEN)
            put(p + "conv1d.weight", 128, 1, 4, scale=0.5)
            put(p + "A_log", 4, scale=0.5, dtype="F32")
            put(p + "dt_bias", 4, scale=0.5)
            put(p + "norm.weight", 16, scale=0.05, dtype="F32")
            out[p + "norm.weight"][1][:] += 1
            put(p + "out_proj.weight", HIDDEN, 64)[0] = 0
        else:
            p += "self_attn."
            put(p + "q_proj.weight", 2 * 2 * HEAD, HIDDEN)
            put(p + "k_proj.weight", HEAD, HIDDEN)
            put(p + "v_proj.weight", HEAD, HIDDEN)
            put(p + "q_norm.weight", HEAD, scale=0.05)
            put(p + "k_norm.weight", HEAD, scale=0.05)
            put(p + "o_proj.weight", HIDDEN, 2 * HEAD)[0] = 0
        p = f"model.layers.{i}.mlp."
        put(p + "gate.weight", EXPERTS, HIDDEN)
        put(p + "experts.gate_up_proj", EXPERTS, 2 * WIDTH, HIDDEN)
        put(p + "experts.down_proj", EXPERTS, HIDDEN, WIDTH)[:, 0] = 0
        put(p + "shared_expert.gate_proj.weight", WIDTH, HIDDEN)
        put(p + "shared_expert.up_proj.weight", WIDTH, HIDDEN)
        put(p + "shared_expert.down_proj.weight", HIDDEN, WIDTH)[0] = 0
        put(p + "shared_expert_gate.weight", 1, HIDDEN)
    put("model.norm.weight", HIDDEN, scale=0.05)
    head = put("lm_head.weight", VOCAB, HIDDEN, scale=0.25)
    head[:, 0] = [_liking(i) for i in range(VOCAB)]
    return out


def _liking(id: int) -> float:
    letters = b"etaoinshrdlu"
    if id >= 256:
        return -2.0
    if id in (0x20, *letters):
        return 1.0
    return 0.3 if chr(id).isascii() and chr(id).islower() else -0.3 if 32 < id < 127 else -4.0


def bfloat16(values: np.ndarray) -> bytes:
    """Return values rounded to nearest even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def write_safetensors(path: Path, table: dict[str, tuple[str, np.ndarray]]) -> None:
    """Write the container by hand: NumPy has no bfloat16."""
    header, data = {"__metadata__": {"format": "pt"}}, b""  # type: dict, bytes
    for name, (dtype, values) in sorted(table.items()):
        raw = bfloat16(values) if dtype == "BF16" else values.astype("<f4").tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(values.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte."""
    # ByteLevel's alphabet as a list by byte value; the library only gives it as a set.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    spelling = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    t = Tokenizer(models.BPE(vocab={spelling[b]: b for b in range(256)}, merges=[]))
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    t.decoder = decoders.ByteLevel()
    t.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return t


def main(directory: Path) -> None:
    """Write the model's directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(), indent=2) + "\n")
    write_safetensors(directory / "model.safetensors", tensors())
    tokenizer().save(str(directory / "tokenizer.json"), pretty=True)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")
    (directory / "generation_config.json").write_text('{"eos_token_id": [256, 258]}\n')
    (directory / "chat_template.jinja").write_text(TEMPLATE)


if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent / "flashmoe" / "demo_noise"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else here)
