"""What an architecture is to the readers: a config function and a table of tensor names and shapes.

An architecture file (``arch_<name>.py``) fills one :class:`Architecture`; the shared parts below
list the tensors of its blocks.  Knows names and shapes; files and bytes are ``assemble.py``'s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flashmoe.checkpoint.description import DENSE, FULL, LINEAR, MOE
from flashmoe.config import FIELDS, ConfigReader, read_rope
from flashmoe.errors import ModelFileError, UnsupportedError

__all__ = ["Architecture", "ModelConfig", "TensorSpec"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One resident tensor that the architecture needs.

    ``rows``, if not empty, lists the (start, count) row ranges of the source that, put end to end,
    give the tensor; the source then has ``source_rows`` rows.
    """

    name: str  # canonical (csrc/store/tensor_list.h)
    layer: int
    source: str  # after the prefix
    shape: tuple[int, ...]
    matrix: bool = True  # may be quantised
    zero_centred: bool = False
    conv: bool = False  # stored (C, 1, k) or (C, k, 1)
    rows: tuple[tuple[int, int], ...] = ()
    source_rows: int = 0


@dataclass(slots=True)
class ModelConfig:
    """The core's numbers and the few facts about files that only the readers need."""

    core: dict[str, Any]
    tied: bool | None  # None: not said, the presence of lm_head decides
    qkv_bias: bool = False
    extra_layers: int = 0  # layers after the last that are drafting heads (GLM)


@dataclass(frozen=True, slots=True)
class Architecture:
    """Table of one architecture; see section "Architectures" of ``docs/format.md``."""

    name: str  # as in csrc/model/arch_list.h
    model_types: tuple[str, ...]
    read_config: Callable[[ConfigReader], ModelConfig]
    zero_centred: bool = False  # norms hold w where 1 + w is applied
    interleaved: bool = False  # in_proj_qkvz and in_proj_ba, grouped per key head
    moe: str = "mlp"
    expert_names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "shared_expert"
    router_bias: bool = False

    def tensors(self, mc: ModelConfig) -> list[TensorSpec]:
        """Return every resident tensor but ``lm_head``, in layer order."""
        c = mc.core
        h = c["hidden_size"]
        specs = [TensorSpec("embed_tokens", -1, "embed_tokens.weight", (c["vocab_size"], h))]
        for i in range(c["num_hidden_layers"]):
            specs += self._block(mc, i)
        specs.append(self._norm("norm", -1, "norm.weight", h))
        return specs

    def _norm(self, name: str, layer: int, source: str, n: int) -> TensorSpec:
        return TensorSpec(name, layer, source, (n,), False, self.zero_centred)

    def _block(self, mc: ModelConfig, i: int) -> list[TensorSpec]:
        c, p = mc.core, f"layers.{i}."
        h = c["hidden_size"]
        specs = [self._norm("input_layernorm", i, p + "input_layernorm.weight", h)]
        if c["mixers"][i] == FULL:
            specs += self._attention(mc, i)
        elif self.interleaved:
            specs += _interleaved_linear(c, i)
        else:
            specs += _split_linear(c, i)
        name = "post_attention_layernorm"
        specs.append(self._norm(name, i, f"{p}{name}.weight", h))
        specs += self._moe(c, i) if c["ffns"][i] == MOE else _mlp(i, "mlp.", "mlp.", c)
        return specs

    def _attention(self, mc: ModelConfig, i: int) -> list[TensorSpec]:
        c, p = mc.core, f"layers.{i}."
        h, hd = c["hidden_size"], c["head_dim"]
        nq, nkv = c["num_attention_heads"] * hd, c["num_key_value_heads"] * hd
        q_rows = nq * (2 if c["attn_output_gate"] else 1)
        specs = []
        for x, rows in (("q", q_rows), ("k", nkv), ("v", nkv)):
            name = f"self_attn.{x}_proj"
            specs.append(TensorSpec(name, i, f"{p}{name}.weight", (rows, h)))
            if mc.qkv_bias:
                specs.append(TensorSpec(f"{name}.bias", i, f"{p}{name}.bias", (rows,), False))
        specs.append(TensorSpec("self_attn.o_proj", i, p + "self_attn.o_proj.weight", (h, nq)))
        if c["qk_norm"]:
            wide = c["qk_norm"] == 2
            for x, rows in (("q", nq), ("k", nkv)):
                name = f"self_attn.{x}_norm"
                specs.append(self._norm(name, i, f"{p}{name}.weight", rows if wide else hd))
        return specs

    def _moe(self, c: dict[str, Any], i: int) -> list[TensorSpec]:
        p, h, e = f"layers.{i}.{self.moe}.", c["hidden_size"], c["num_experts"]
        specs = [TensorSpec("mlp.gate", i, p + "gate.weight", (e, h))]
        if self.router_bias:
            name = "gate.e_score_correction_bias"
            specs.append(TensorSpec("mlp." + name, i, p + name, (e,), False))
        width = c["shared_expert_intermediate_size"]
        if width:
            for x, shape in _swiglu(h, width):
                specs.append(
                    TensorSpec(
                        f"mlp.shared_expert.{x}", i, f"{p}{self.shared}.{x}.weight", shape
                    )
                )
            if c["shared_expert_gate"]:
                name = "shared_expert_gate"
                specs.append(TensorSpec("mlp." + name, i, f"{p}{name}.weight", (1, h)))
        return specs


def _swiglu(h: int, width: int) -> tuple[tuple[str, tuple[int, int]], ...]:
    return ("gate_proj", (width, h)), ("up_proj", (width, h)), ("down_proj", (h, width))


def _mlp(i: int, name: str, source: str, c: dict[str, Any]) -> list[TensorSpec]:
    return [
        TensorSpec(name + x, i, f"layers.{i}.{source}{x}.weight", shape)
        for x, shape in _swiglu(c["hidden_size"], c["intermediate_size"])
    ]


def _linear_dims(c: dict[str, Any]) -> tuple[int, int, int, int, int]:
    hk, hv = c["linear_num_key_heads"], c["linear_num_value_heads"]
    return hk, hv, hv // hk, c["linear_key_head_dim"], c["linear_value_head_dim"]


def _linear_rest(c: dict[str, Any], i: int) -> list[TensorSpec]:
    hk, hv, _, dk, dv = _linear_dims(c)
    p, conv = f"layers.{i}.linear_attn.", (2 * hk * dk + hv * dv, c["linear_conv_kernel_dim"])
    n = "linear_attn."
    return [
        TensorSpec(n + "conv1d", i, p + "conv1d.weight", conv, False, conv=True),
        TensorSpec(n + "A_log", i, p + "A_log", (hv,), False),
        TensorSpec(n + "dt_bias", i, p + "dt_bias", (hv,), False),
        TensorSpec(n + "norm", i, p + "norm.weight", (dv,), False),
        TensorSpec(n + "out_proj", i, p + "out_proj.weight", (c["hidden_size"], hv * dv)),
    ]


def _split_linear(c: dict[str, Any], i: int) -> list[TensorSpec]:
    hk, hv, _, dk, dv = _linear_dims(c)
    h, p = c["hidden_size"], f"layers.{i}."
    rows = {"qkv": 2 * hk * dk + hv * dv, "z": hv * dv, "b": hv, "a": hv}
    names = {x: f"linear_attn.in_proj_{x}" for x in rows}
    return [
        TensorSpec(names[x], i, f"{p}{names[x]}.weight", (n, h)) for x, n in rows.items()
    ] + _linear_rest(c, i)


def _interleaved_linear(c: dict[str, Any], i: int) -> list[TensorSpec]:
    """Qwen3-Next: per key head [q | k | v of its value heads | z of them], and [b | a]."""
    hk, hv, r, dk, dv = _linear_dims(c)
    h, p, w = c["hidden_size"], f"layers.{i}.linear_attn.", r * dv
    size = 2 * dk + 2 * w
    q = [(g * size, dk) for g in range(hk)]
    k = [(g * size + dk, dk) for g in range(hk)]
    v = [(g * size + 2 * dk, w) for g in range(hk)]
    z = [(g * size + 2 * dk + w, w) for g in range(hk)]
    b = [(g * 2 * r, r) for g in range(hk)]
    a = [(g * 2 * r + r, r) for g in range(hk)]

    def spec(x: str, source: str, total: int, ranges: list[tuple[int, int]]) -> TensorSpec:
        merged = _merge(ranges)
        n = sum(m for _, m in merged)
        return TensorSpec(
            f"linear_attn.in_proj_{x}", i, f"{p}{source}.weight", (n, h),
            rows=merged, source_rows=total,
        )  # fmt: skip

    return [
        spec("qkv", "in_proj_qkvz", hk * size, q + k + v),
        spec("z", "in_proj_qkvz", hk * size, z),
        spec("b", "in_proj_ba", 2 * hv, b),
        spec("a", "in_proj_ba", 2 * hv, a),
        *_linear_rest(c, i),
    ]


def _merge(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    out: list[tuple[int, int]] = []
    for start, n in ranges:
        if out and sum(out[-1]) == start:
            out[-1] = (out[-1][0], out[-1][1] + n)
        else:
            out.append((start, n))
    return tuple(out)


# ------------------------------------------------------------------ shared parts of read_config


def read_common(
    r: ConfigReader, *, partial: float, head_dim: int | None = None, bias_allowed: bool = False
) -> ModelConfig:
    """Read what every architecture has; all other fields of the core are zero.

    Parameters
    ----------
    r : ConfigReader
    partial : float
        ``partial_rotary_factor`` where the config is silent; 1 admits no other value.
    head_dim : int, optional
        Used when the config has no ``head_dim``; by default hidden_size / num_attention_heads.
    bias_allowed : bool
        Whether ``attention_bias`` may be true (q, k and v then have a bias).
    """
    c: dict[str, Any] = {n: kind(0) for n, (kind, _, _) in FIELDS.items()}
    for n in ("num_hidden_layers", "hidden_size", "vocab_size", "max_position_embeddings",
              "num_attention_heads"):  # fmt: skip
        c[n] = r.integer(n)
    c["num_key_value_heads"] = r.integer("num_key_value_heads", c["num_attention_heads"])
    c["rms_norm_eps"] = r.number("rms_norm_eps")
    if r.values.get("head_dim") is None and head_dim is None:
        if c["hidden_size"] % c["num_attention_heads"]:
            raise ModelFileError(
                f"{r.where}: head_dim is missing and hidden_size {c['hidden_size']} is not a "
                f"multiple of num_attention_heads {c['num_attention_heads']}"
            )
        head_dim = c["hidden_size"] // c["num_attention_heads"]
    c["head_dim"] = r.integer("head_dim", head_dim)
    c["rope_theta"], c["rotary_dim"] = read_rope(r, c["head_dim"], partial)
    if partial == 1 and c["rotary_dim"] != c["head_dim"]:
        raise UnsupportedError(
            f"{r.where}: partial_rotary_factor gives {c['rotary_dim']} of {c['head_dim']} "
            "dimensions; this architecture rotates the whole head"
        )
    r.expect("hidden_act", "silu")
    r.expect("mlp_bias", False)
    bias = r.flag("attention_bias", False)
    if bias and not bias_allowed:
        raise UnsupportedError(f"{r.where}: attention_bias is true; supported: false")
    tied = r.flag("tie_word_embeddings", None) if r.values.get("tie_word_embeddings") is not None \
        else None  # fmt: skip
    r.ignore("tie_word_embeddings")
    c["routed_scaling_factor"] = 1.0
    return ModelConfig(c, tied, bias)


def read_linear(r: ConfigReader, c: dict[str, Any]) -> None:
    """Read the Gated DeltaNet sizes and the list of mixers into `c`; queries are gated."""
    for n in ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
              "linear_value_head_dim", "linear_conv_kernel_dim"):  # fmt: skip
        c[n] = r.integer(n, low=1)
    if c["linear_num_value_heads"] % c["linear_num_key_heads"]:
        raise ModelFileError(
            f"{r.where}: linear_num_value_heads {c['linear_num_value_heads']} is not a multiple "
            f"of linear_num_key_heads {c['linear_num_key_heads']}"
        )
    r.expect("attn_output_gate", True)
    no_sliding_window(r)
    # The gate of the linear layers (silu of z); the attention gate is a sigmoid whatever this says.
    r.expect("output_gate_type", "swish", "silu")
    n_layers = c["num_hidden_layers"]
    kinds = read_layer_types(r, n_layers, {"linear_attention": LINEAR, "full_attention": FULL})
    if kinds is None:
        step = r.integer("full_attention_interval", low=1)
        kinds = [FULL if (i + 1) % step == 0 else LINEAR for i in range(n_layers)]
    r.ignore("full_attention_interval")
    c["mixers"] = kinds
    c["attn_output_gate"], c["qk_norm"] = 1, 1


def read_layer_types(r: ConfigReader, n_layers: int, kinds: dict[str, int]) -> list[int] | None:
    """Return the mixer of every layer from ``layer_types``, or None when absent."""
    types = r.values.get("layer_types")
    r.ignore("layer_types")
    if types is None:
        return None
    if not isinstance(types, list) or len(types) != n_layers:
        n = len(types) if isinstance(types, list) else "no"
        raise ModelFileError(f"{r.where}: layer_types has {n} entries, not {n_layers}")
    for i, t in enumerate(types):
        if not isinstance(t, str) or t not in kinds:
            raise UnsupportedError(
                f"{r.where}: layer_types[{i}] is {str(t)[:60]!r}; supported: {', '.join(kinds)}"
            )
    return [kinds[t] for t in types]


def all_full(r: ConfigReader, c: dict[str, Any]) -> None:
    """Declare every layer full attention, and refuse a config that says otherwise."""
    kinds = read_layer_types(r, c["num_hidden_layers"], {"full_attention": FULL})
    c["mixers"] = kinds or [FULL] * c["num_hidden_layers"]


def read_sparse_layers(r: ConfigReader, c: dict[str, Any]) -> None:
    """Read which layers are MoE from ``mlp_only_layers`` and ``decoder_sparse_step``."""
    n_layers = c["num_hidden_layers"]
    dense = set(r.int_list("mlp_only_layers", 0, n_layers - 1))
    step = r.integer("decoder_sparse_step", 1, low=1)
    c["ffns"] = [
        DENSE if i in dense or (i + 1) % step else MOE for i in range(n_layers)
    ]  # fmt: skip
    if DENSE in c["ffns"]:
        c["intermediate_size"] = r.integer("intermediate_size", low=1)
    r.ignore("intermediate_size")


def no_sliding_window(r: ConfigReader) -> None:
    """Refuse ``use_sliding_window``; without it the sizes that belong to it do not matter."""
    r.expect("use_sliding_window", False, why="sliding-window attention is not implemented")
    r.ignore("sliding_window", "max_window_layers")


def read_experts(r: ConfigReader, c: dict[str, Any], *, n: str, width: str) -> None:
    """Read the number and width of the routed experts; `n` and `width` are the config's names.

    Some versions of transformers save ``num_experts`` as ``num_local_experts``.
    """
    names = [x for x in (n, "num_local_experts") if r.values.get(x) is not None]
    counts = [r.integer(x, low=1, high=1 << 16) for x in names or [n]]
    if counts[0] != counts[-1]:
        raise ModelFileError(
            f"{r.where}: {names[0]} is {counts[0]}, {names[-1]} is {counts[-1]}"
        )
    c["num_experts"] = counts[0]
    c["num_experts_per_tok"] = r.integer("num_experts_per_tok", low=1)
    c["moe_intermediate_size"] = r.integer(width, low=1, high=1 << 24)
