"""The tiny models of the golden set: configs in the released form, and how weights are drawn.

Needs torch (only ``make_goldens.py`` imports this).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Variant:
    """One tiny model: its config.json, transformers classes and file conventions."""

    cls: str
    cfgcls: str
    config: dict[str, Any]
    seed: int
    zero_centred: bool = False
    mtp: str | None = None  # "split": experts one by one; "fused"
    experts: str = "split"  # in the file: "fused", "split" or "mixtral"
    f32: tuple[str, ...] = ()  # name endings stored in F32
    twins: tuple[str, ...] = ()
    sizes: dict[str, int] = field(default_factory=dict)

    @property
    def text(self) -> dict[str, Any]:
        """The text level of the config."""
        return self.config.get("text_config", self.config)

    @property
    def tied(self) -> bool:
        """Whether there is no lm_head."""
        return bool(self.text["tie_word_embeddings"])


def hybrid_types(n: int, pattern: str | None) -> list[str]:
    """Return layer_types from a pattern such as "lllf", or full at every fourth."""
    pattern = pattern or "".join("f" if i % 4 == 3 else "l" for i in range(n))
    return [{"f": "full_attention", "l": "linear_attention"}[x] for x in pattern]


def q35(seed: int, H: int, L: int, nh: int, nkv: int, hd: int, mrope: list[int], hk: int, hv: int,
        dk: int, dv: int, E: int, K: int, width: int, shared: int, V: int, *, kern: int = 4,
        pattern: str | None = None, tied: bool = False, mtp: str = "split",
        twins: tuple[str, ...] = ()) -> Variant:  # fmt: skip
    """Qwen3.5-MoE as released: nested config, vision tower, fused experts, MTP block."""
    text = {
        "model_type": "qwen3_5_moe_text", "attention_bias": False, "attention_dropout": 0.0,
        "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": V - 1,
        "full_attention_interval": 4, "head_dim": hd, "hidden_act": "silu", "hidden_size": H,
        "initializer_range": 0.02, "layer_types": hybrid_types(L, pattern),
        "linear_conv_kernel_dim": kern, "linear_key_head_dim": dk, "linear_num_key_heads": hk,
        "linear_num_value_heads": hv, "linear_value_head_dim": dv, "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 4096, "mlp_only_layers": [], "moe_intermediate_size": width,
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
        "num_attention_heads": nh, "num_experts": E, "num_experts_per_tok": K,
        "num_hidden_layers": L, "num_key_value_heads": nkv, "output_router_logits": False,
        "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": shared, "tie_word_embeddings": tied, "use_cache": True,
        "vocab_size": V,
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": mrope, "partial_rotary_factor": 0.25,
            "rope_theta": 1e7, "rope_type": "default",
        },
    }  # fmt: skip
    config = nest(text, "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", V, tied, H)
    return Variant("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig", config, seed,
                   zero_centred=True, mtp=mtp, experts="fused",
                   f32=(".A_log", "linear_attn.norm.weight"), twins=twins)  # fmt: skip


def nest(text: dict[str, Any], kind: str, cls: str, V: int, tied: bool, H: int) -> dict[str, Any]:
    """Return the multimodal config around a text config; the vision tower is as small as can be."""
    vision = {
        "model_type": f"{kind}_vision" if kind.endswith("moe") else kind, "depth": 1,
        "hidden_act": "gelu_pytorch_tanh", "hidden_size": 16, "in_channels": 3,
        "initializer_range": 0.02, "intermediate_size": 24, "num_heads": 2,
        "num_position_embeddings": 16, "out_hidden_size": H, "patch_size": 4,
        "spatial_merge_size": 2, "temporal_patch_size": 2,
    }  # fmt: skip
    return {
        "architectures": [cls], "model_type": kind, "image_token_id": V - 5,
        "video_token_id": V - 4, "vision_start_token_id": V - 3, "vision_end_token_id": V - 2,
        "text_config": text, "vision_config": vision, "tie_word_embeddings": tied,
        "transformers_version": "4.57.0.dev0",
    }  # fmt: skip


def q35dense(seed: int) -> Variant:
    """Return a dense Qwen3.5: tied embeddings, plain SwiGLU."""
    v = q35(seed, 64, 4, 4, 2, 32, [2, 1, 1], 2, 6, 16, 16, 8, 3, 32, 32, 256, tied=True)
    text = v.config["text_config"]
    for key in list(text):
        if re.search("expert|router|moe_|mlp_only", key):
            del text[key]
    text.update(model_type="qwen3_5_text", intermediate_size=96)
    config = nest(text, "qwen3_5", "Qwen3_5ForConditionalGeneration", 256, True, 64)
    return Variant("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", config, seed,
                   zero_centred=True, f32=v.f32)  # fmt: skip


def flat(kind: str, cls: str, seed: int, H: int, L: int, nh: int, nkv: int, V: int,
         extra: dict[str, Any], **more: Any) -> Variant:  # fmt: skip
    """Return a text-only model with a flat config."""
    config = {
        "architectures": [f"{cls}ForCausalLM"], "model_type": kind, "attention_bias": False,
        "attention_dropout": 0.0, "eos_token_id": V - 1, "hidden_act": "silu", "hidden_size": H,
        "initializer_range": 0.02, "max_position_embeddings": 4096, "num_attention_heads": nh,
        "num_hidden_layers": L, "num_key_value_heads": nkv, "output_router_logits": False,
        "rope_scaling": None, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "use_cache": True, "vocab_size": V, **extra,
    }  # fmt: skip
    return Variant(f"{cls}ForCausalLM", f"{cls}Config", config, seed, **more)


def q3next(seed: int, H: int = 64, hk: int = 2, hv: int = 4, dk: int = 16, dv: int = 16,
           E: int = 8, K: int = 3, width: int = 64, shared: int = 64, V: int = 256,
           **more: Any) -> Variant:  # fmt: skip
    """Qwen3-Next: interleaved linear projections, experts one by one."""
    extra = {
        "decoder_sparse_step": 1, "full_attention_interval": 4, "head_dim": 32,
        "intermediate_size": 160, "linear_conv_kernel_dim": 4, "linear_key_head_dim": dk,
        "linear_num_key_heads": hk, "linear_num_value_heads": hv, "linear_value_head_dim": dv,
        "mlp_only_layers": [], "moe_intermediate_size": width, "norm_topk_prob": True,
        "num_experts": E, "num_experts_per_tok": K, "partial_rotary_factor": 0.25,
        "rms_norm_eps": 1e-6, "rope_theta": 1e7, "shared_expert_intermediate_size": shared,
    }  # fmt: skip
    return flat("qwen3_next", "Qwen3Next", seed, H, 4, 4, 2, V, extra, zero_centred=True,
                mtp="split", **more)  # fmt: skip


def q3moe(seed: int, L: int, norm: bool, **more: Any) -> Variant:
    """Qwen3-MoE; with 5 layers the second is dense."""
    extra = {
        "decoder_sparse_step": 1, "head_dim": 24, "intermediate_size": 96, "max_window_layers": L,
        "mlp_only_layers": [1] if L > 4 else [], "moe_intermediate_size": 32,
        "norm_topk_prob": norm, "num_experts": 8, "num_experts_per_tok": 3, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "sliding_window": None, "use_sliding_window": False,
    }  # fmt: skip
    return flat("qwen3_moe", "Qwen3Moe", seed, 64, L, 4, 2, 256, extra, **more)


def mixtral(seed: int, **more: Any) -> Variant:
    """Mixtral: w1, w2, w3."""
    extra = {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2,
             "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": None}  # fmt: skip
    v = flat("mixtral", "Mixtral", seed, 64, 3, 4, 2, 256, extra, experts="mixtral", **more)
    del v.config["attention_bias"]
    return v


def olmoe(seed: int, **more: Any) -> Variant:
    """OLMoE: q/k norm over the whole projection, weights not renormalised."""
    extra = {"clip_qkv": None, "intermediate_size": 32, "norm_topk_prob": False, "num_experts": 8,
             "num_experts_per_tok": 3, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}  # fmt: skip
    return flat("olmoe", "Olmoe", seed, 64, 3, 4, 4, 256, extra, **more)


def glm4moe(seed: int, groups: int = 1, **more: Any) -> Variant:
    """GLM-4.5: sigmoid router with a choice bias, first layer dense, q/k/v bias."""
    extra = {
        "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 16,
        "intermediate_size": 80, "moe_intermediate_size": 32, "n_group": groups,
        "n_routed_experts": 8, "n_shared_experts": 1, "norm_topk_prob": True,
        "num_experts_per_tok": 3, "num_nextn_predict_layers": 0, "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5, "rope_theta": 1000000, "routed_scaling_factor": 2.5,
        "topk_group": max(1, groups // 2), "use_qk_norm": True,
    }  # fmt: skip
    v = flat("glm4_moe", "Glm4Moe", seed, 64, 4, 6, 2, 256, extra,
             f32=(".e_score_correction_bias",), **more)  # fmt: skip
    v.config["eos_token_id"] = [255, 254]
    return v


def variants() -> dict[str, Variant]:
    """Return all models; seeds were chosen by ``make_goldens.py --scan`` for wide gaps."""
    mlx = ("mlx4",)
    return {
        "q35moe_base": q35(2, 64, 8, 4, 2, 32, [2, 1, 1], 2, 4, 16, 16, 8, 3, 64, 64, 256,
                           twins=("mlx4", "mlx4all", "mlx2exp", "mlxmix")),
        "q35moe_r4": q35(8, 64, 4, 8, 1, 32, [2, 1, 1], 2, 8, 16, 16, 16, 10, 32, 32, 256,
                         mtp="fused"),
        "q35moe_odd": q35(15, 72, 5, 6, 3, 24, [1, 1, 1], 3, 9, 12, 20, 10, 3, 28, 44, 263,
                          pattern="lfllf", tied=True),
        "q35moe_k1": q35(7, 64, 4, 4, 1, 32, [2, 1, 1], 4, 4, 8, 8, 8, 1, 32, 32, 256, kern=3),
        "q35moe_realheads": q35(8, 64, 4, 2, 1, 256, [11, 11, 10], 1, 2, 128, 128, 8, 3, 32, 32,
                                256),
        "q35dense": q35dense(20),
        "q3next": q3next(4, twins=mlx),
        "q3next_r3": q3next(10, H=72, hv=6, dk=16, dv=24, E=6, width=24, shared=28, V=250),
        "q3moe": q3moe(7, 4, True, twins=mlx),
        "q3moe_nonorm": q3moe(1, 5, False),
        "mixtral": mixtral(15, twins=mlx),
        "olmoe": olmoe(2, twins=mlx),
        "glm4moe": glm4moe(6, twins=mlx),
        "glm4moe_groups": glm4moe(7, groups=4),
    }  # fmt: skip


# ---------------------------------------------------------------------- weights

_GAINS = (
    (r"lm_head\.weight$", 3.0),
    (r"(mlp|block_sparse_moe)\.gate\.weight$", 1.5),
    (r"shared_expert_gate\.weight$", 1.0),
    (r"experts|shared_expert\.", 1.15),
    (r"in_proj_qkv", 1.8),
)


def draw(name: str, shape: tuple[int, ...], g: torch.Generator, zero_centred: bool) -> torch.Tensor:
    """Draw one tensor: activations stay O(1), decays and gates unsaturated, logits of std 3."""

    def normal(std: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=g) * std

    if name.endswith("A_log"):
        return torch.log(torch.rand(shape, generator=g) * 5.7 + 0.3)
    if name.endswith("dt_bias"):
        return normal() - 2.0
    if name.endswith("e_score_correction_bias"):
        return normal(0.1)
    if name.endswith("linear_attn.norm.weight"):
        return 1.0 + normal(0.25)
    if re.search(r"norm\.weight$|pre_fc_norm", name):
        return normal(0.3) + (0.0 if zero_centred else 1.0)  # negative w on purpose
    if name.endswith("conv1d.weight"):
        return normal(0.9)
    if name.endswith(".bias"):
        return normal(0.2)
    if name.endswith("embed_tokens.weight"):
        return normal()
    gain = next((v for pattern, v in _GAINS if re.search(pattern, name)), 1.0)
    return normal(gain / shape[-1] ** 0.5)


def mtp_shapes(v: Variant) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the drafting block, like a full-attention block of the model."""
    t = v.text
    h, hd, e, w = t["hidden_size"], t["head_dim"], t["num_experts"], t["moe_intermediate_size"]
    nq, nkv = t["num_attention_heads"] * hd, t["num_key_value_heads"] * hd
    s, p = t["shared_expert_intermediate_size"], "mtp.layers.0."
    out: dict[str, tuple[int, ...]] = {"mtp.fc.weight": (h, 2 * h)}
    for k in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        out[f"mtp.{k}.weight"] = (h,)
    for k, shape in {
        "input_layernorm": (h,), "post_attention_layernorm": (h,), "self_attn.q_norm": (hd,),
        "self_attn.k_norm": (hd,), "self_attn.q_proj": (2 * nq, h), "self_attn.k_proj": (nkv, h),
        "self_attn.v_proj": (nkv, h), "self_attn.o_proj": (h, nq), "mlp.gate": (e, h),
        "mlp.shared_expert.gate_proj": (s, h), "mlp.shared_expert.up_proj": (s, h),
        "mlp.shared_expert.down_proj": (h, s), "mlp.shared_expert_gate": (1, h),
    }.items():  # fmt: skip
        out[f"{p}{k}.weight"] = shape
    if v.mtp == "fused":
        out[p + "mlp.experts.gate_up_proj"], out[p + "mlp.experts.down_proj"] = (
            (e, 2 * w, h), (e, h, w),
        )  # fmt: skip
        return out
    for i in range(e):
        for x, shape in (("gate", (w, h)), ("up", (w, h)), ("down", (h, w))):
            out[f"{p}mlp.experts.{i}.{x}_proj.weight"] = shape
    return out


def released_names(state: dict[str, torch.Tensor], v: Variant) -> dict[str, torch.Tensor]:
    """Return the module's tensors under the names of the released checkpoints."""
    out: dict[str, torch.Tensor] = {}
    roles = ("w1", "w3", "w2") if v.experts == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for k, t in state.items():
        m = re.match(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)$", k)
        if v.experts == "mixtral":
            k = k.replace(".mlp.gate.", ".block_sparse_moe.gate.")
        if m is None or v.experts == "fused":
            out[k] = t
            continue
        moe = "block_sparse_moe" if v.experts == "mixtral" else "mlp"
        for e in range(t.shape[0]):
            b = f"{m[1]}.{moe}.experts.{e}."
            if m[2] == "down_proj":
                out[f"{b}{roles[2]}.weight"] = t[e]
            else:
                gate, up = t[e].chunk(2)
                out[f"{b}{roles[0]}.weight"], out[f"{b}{roles[1]}.weight"] = gate, up
    return out
