"""How many bytes and operations a model takes, from its configuration or its files.

Shapes come from the architecture tables of the readers, so whatever runs can be counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from flashmoe.checkpoint import read_model_config
from flashmoe.checkpoint.description import FULL, LINEAR, MOE
from flashmoe.checkpoint.formats import AFFINE_BITS, area_bytes, bits_of, role_bytes
from flashmoe.checkpoint.packed import ALIGN
from flashmoe.errors import ArgumentError
from flashmoe.pack.recipe import MATRICES, Recipe
from flashmoe.perf.models import known_model

if TYPE_CHECKING:
    from flashmoe.checkpoint.arch import TensorSpec
    from flashmoe.checkpoint.description import ModelDescription

__all__ = ["Geometry", "expert_bytes", "from_config", "from_description", "geometry"]

GROUP = 64
_KV_BYTES = {"f32": 4, "f16": 2, "bf16": 2}


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes [bytes] and work [floating-point operations, 2 per multiply-add] of a model."""

    name: str
    arch: str
    bits: float  # of the routed experts
    n_layers: int
    n_moe_layers: int
    n_experts: int  # per MoE layer
    experts_per_token: int  # as trained
    vocab_size: int
    n_params: int
    expert_bytes: int  # one routed expert
    trunk_bytes: int  # everything else
    embed_bytes: int  # the embedding table: one row a token is read of it
    tied: bool  # the embedding is the head as well
    shared_bytes: int  # shared experts: they compute while routed ones are read
    kv_bytes_per_token: int  # float32, but for with_kv
    recurrent_bytes: int  # of one sequence, float32
    conv_bytes: int
    trunk_flops: float  # per token, at context 0
    expert_flops: float  # one routed expert, per token
    attention_flops: float  # per token and token of context

    @property
    def n_experts_total(self) -> int:
        """Experts of all layers."""
        return self.n_moe_layers * self.n_experts

    @property
    def experts_bytes(self) -> int:
        """All routed experts together."""
        return self.n_experts_total * self.expert_bytes

    @property
    def slot_bytes(self) -> int:
        """One expert on disk and in a slot, aligned for direct reads."""
        return -(-self.expert_bytes // ALIGN) * ALIGN

    @property
    def trunk_read_bytes(self) -> int:
        """What every token passes through of the trunk."""
        return self.trunk_bytes - (0 if self.tied else self.embed_bytes)

    def routed_bytes(self, k: int | None = None) -> int:
        """Bytes of the experts that one token picks."""
        return self.n_moe_layers * (k or self.experts_per_token) * self.expert_bytes

    def state_bytes(self, context: int, copies: int = 1) -> int:
        """Bytes of a sequence's state; the engine keeps 3 `copies` of the recurrent part."""
        recurrent = self.recurrent_bytes + self.conv_bytes
        return context * self.kv_bytes_per_token + copies * recurrent

    def with_kv(self, kv_format: str) -> Geometry:
        """Return the same with keys and values in ``"f32"``, ``"f16"`` or ``"bf16"``."""
        if kv_format not in _KV_BYTES:
            raise ArgumentError(f"kv_format={kv_format!r}: one of {', '.join(_KV_BYTES)}")
        return replace(
            self, kv_bytes_per_token=self.kv_bytes_per_token // 4 * _KV_BYTES[kv_format]
        )

    def flops(self, k: int | None = None, context: float = 0) -> float:
        """Operations per token."""
        routed = self.n_moe_layers * (k or self.experts_per_token) * self.expert_flops
        return self.trunk_flops + routed + context * self.attention_flops


def expert_bytes(n_weights: int, bits: float, group: int = GROUP) -> int:
    """Return the bytes of an expert of `n_weights`.

    A whole number of `bits` of :data:`AFFINE_BITS` means affine with bf16 scale and bias per
    `group`, 16 means bf16; anything else is taken as effective bits per weight, all included.

    >>> expert_bytes(3 * 4096 * 1024, 4), expert_bytes(3 * 4096 * 1024, 2.25)
    (7077888, 3538944)
    """
    if bits == 16:
        return 2 * n_weights
    if bits in AFFINE_BITS:
        return n_weights * int(bits) // 8 + n_weights // group * 4
    if not 0.5 <= bits <= 32:
        raise ArgumentError(f"bits={bits}: 0.5 to 32 bits per weight are possible")
    return round(n_weights * bits / 8)


def from_config(
    config: Mapping[str, Any],
    name: str = "model",
    *,
    bits: float = 4,
    gate_bits: int = 8,
    trunk_bits: int | None = None,
) -> Geometry:
    """Count a model that is known by its ``config.json`` alone.

    Parameters
    ----------
    config : mapping
    name : str
    bits : float
        Of the routed experts; see :func:`expert_bytes`.
    gate_bits : int
        Of routers and shared-expert gates.
    trunk_bits : int, optional
        Of the other matrices; as the experts, or 4 where `bits` is no format.  16 is bf16, which
        then holds for the gates too.
    """
    arch, mc = read_model_config(dict(config), name)
    if trunk_bits is None:
        trunk_bits = int(bits) if bits in (*AFFINE_BITS, 16) else 4
    plain = trunk_bits == 16
    recipe = Recipe.of(None if plain else trunk_bits, GROUP, None)
    specs = arch.tensors(mc)
    tied = bool(mc.tied)
    sizes: list[tuple[TensorSpec | None, str, tuple[int, ...], int]] = []
    for s in specs:
        b = recipe.bits_for(s.name) if s.matrix and s.name in MATRICES else None
        if b is not None and s.name in ("mlp.gate", "mlp.shared_expert_gate"):
            b = gate_bits
        sizes.append((s, s.name, s.shape, _tensor_bytes(s.name, s.shape, b, plain)))
    if not tied:
        head = (mc.core["vocab_size"], mc.core["hidden_size"])
        b = recipe.bits_for("lm_head")
        sizes.append((None, "lm_head", head, _tensor_bytes("lm_head", head, b, plain)))
    c = mc.core
    n_weights = 3 * c["hidden_size"] * c["moe_intermediate_size"]
    return _count(
        name, arch.name, c, [(n, shape, size) for _, n, shape, size in sizes],
        tied, bits, expert_bytes(n_weights, bits),
    )  # fmt: skip


def _tensor_bytes(name: str, shape: tuple[int, ...], bits: int | None, plain: bool) -> int:
    n_rows, n_cols = (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])
    if bits is not None and n_cols % GROUP == 0:
        return sum(area_bytes(f"affine{bits}", GROUP, "bf16", n_rows, n_cols))
    # As released: A_log in float32 always, the gated norm too but for MLX's conversions.
    wide = name == "linear_attn.A_log" or (plain and name == "linear_attn.norm")
    return prod(shape) * (4 if wide else 2)


def from_description(d: ModelDescription, name: str | None = None) -> Geometry:
    """Count a checkpoint that is there."""
    tensors = [
        (t.name, t.shape, sum(p.n_bytes for p in (*t.codes, *t.scales, *t.biases)))
        for t in d.tensors
    ]
    record, bits = 0, 0.0
    for e in d.experts:
        roles = (e.gate, e.up, e.down)
        size = sum(b for r in roles for b in role_bytes(r))
        if size > record:
            record = size
            weights = sum(r.n_rows * r.n_cols for r in roles)
            one = {bits_of(r.format) for r in roles}
            bits = float(one.pop()) if len(one) == 1 and 0 not in one else 8 * size / weights
    tied = bool(d.config["tie_word_embeddings"])
    return _count(name or d.path.name, d.arch, d.config, tensors, tied, bits, record)


def _count(
    name: str,
    arch: str,
    c: Mapping[str, Any],
    tensors: Iterable[tuple[str, tuple[int, ...], int]],
    tied: bool,
    bits: float,
    record: int,
) -> Geometry:
    tensors = list(tensors)
    by_name: dict[str, int] = {}
    matrix_params = 0
    for n, shape, size in tensors:
        by_name[n] = by_name.get(n, 0) + size
        if n in MATRICES and n != "embed_tokens":
            matrix_params += prod(shape)
    if tied:
        matrix_params += c["vocab_size"] * c["hidden_size"]
    n_full, n_linear = list(c["mixers"]).count(FULL), list(c["mixers"]).count(LINEAR)
    n_moe = list(c["ffns"]).count(MOE)
    hv, dk, dv = (c["linear_num_value_heads"], c["linear_key_head_dim"],
                  c["linear_value_head_dim"])  # fmt: skip
    channels = 2 * c["linear_num_key_heads"] * dk + hv * dv
    taps = c["linear_conv_kernel_dim"]
    per_expert = 3 * c["hidden_size"] * c["moe_intermediate_size"]
    n_experts = c["num_experts"] if n_moe else 0
    return Geometry(
        name=name,
        arch=arch,
        bits=bits,
        n_layers=c["num_hidden_layers"],
        n_moe_layers=n_moe,
        n_experts=n_experts,
        experts_per_token=c["num_experts_per_tok"] if n_moe else 0,
        vocab_size=c["vocab_size"],
        n_params=sum(prod(s) for _, s, _ in tensors) + n_moe * n_experts * per_expert,
        expert_bytes=record if n_moe else 0,
        trunk_bytes=sum(by_name.values()),
        embed_bytes=by_name.get("embed_tokens", 0),
        tied=tied,
        shared_bytes=sum(v for n, v in by_name.items() if n.startswith("mlp.shared_expert.")),
        kv_bytes_per_token=n_full * 2 * c["num_key_value_heads"] * c["head_dim"] * 4,
        recurrent_bytes=n_linear * hv * dk * dv * 4,
        conv_bytes=n_linear * max(taps - 1, 0) * channels * 4,
        # gated delta rule: decay, k.S, rank-1 update, q.S: 7 operations per element of the state
        trunk_flops=2.0 * matrix_params + n_linear * (2.0 * taps * channels + 7.0 * hv * dk * dv),
        expert_flops=2.0 * per_expert,
        attention_flops=n_full * 4.0 * c["num_attention_heads"] * c["head_dim"],
    )


def geometry(model: str, *, bits: float | None = None) -> Geometry:
    """Return the geometry of a known name (``"397b"``) or of a checkpoint directory.

    `bits` is for names; a checkpoint has its own.
    """
    from pathlib import Path

    if Path(model).expanduser().is_dir():
        from flashmoe.checkpoint import open_checkpoint

        if bits is not None:
            raise ArgumentError(f"{model}: a checkpoint has its own bits; leave bits out")
        return from_description(open_checkpoint(Path(model).expanduser()))
    name, config = known_model(model)
    return from_config(config, name, bits=4 if bits is None else bits)
