"""Which format every matrix gets: the defaults, and overrides by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flashmoe.checkpoint.formats import AFFINE_BITS, GROUPS
from flashmoe.config import nearest
from flashmoe.errors import ArgumentError

__all__ = ["MATRICES", "Recipe"]

MATRICES = (
    "embed_tokens", "lm_head",
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "linear_attn.in_proj_qkv", "linear_attn.in_proj_z", "linear_attn.in_proj_b",
    "linear_attn.in_proj_a", "linear_attn.out_proj",
    "mlp.gate", "mlp.shared_expert_gate",
    "mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "experts", "experts.gate", "experts.up", "experts.down",
)  # fmt: skip
"""Names that an override may have; ``experts`` stands for all three matrices of the experts."""

_ROUTING = ("mlp.gate", "mlp.shared_expert_gate")
_ROUTING_BITS = 8


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to quantise: bits per weight (None keeps the source), group, and exceptions.

    Routers and shared-expert gates get 8 bits whatever `bits` says, unless overridden: they are
    small, and an error there changes which experts run.
    """

    bits: int | None
    group: int = 64
    overrides: tuple[tuple[str, int | None], ...] = ()

    @classmethod
    def of(
        cls, bits: int | None, group: int, overrides: Mapping[str, int | None] | None
    ) -> Recipe:
        """Check the arguments of ``pack`` and return the recipe."""
        for what, b in (("bits", bits), *(overrides or {}).items()):
            if b is not None and (type(b) is not int or b not in AFFINE_BITS):
                raise ArgumentError(f"{what}: {b!r} bits; possible: {AFFINE_BITS} or None")
        if type(group) is not int or group not in GROUPS:
            raise ArgumentError(f"group {group!r} is not one of {GROUPS}")
        for name in overrides or {}:
            if name not in MATRICES:
                raise ArgumentError(f"unknown matrix {name!r}{nearest(name, MATRICES)}")
        return cls(bits, group, tuple(sorted((overrides or {}).items())))

    def bits_for(self, name: str) -> int | None:
        """Return the bits for a matrix of :data:`MATRICES`, None to keep it as it is."""
        table = dict(self.overrides)
        if name in table:
            return table[name]
        if name.startswith("experts.") and "experts" in table:
            return table["experts"]
        if self.bits is not None and name in _ROUTING:
            return _ROUTING_BITS
        return self.bits

    def as_json(self) -> dict[str, Any]:
        """Return the recipe as ``flashmoe.json`` and the journal hold it."""
        method = "round to nearest" if self.bits is not None or self.overrides else "as stored"
        return {"bits": self.bits, "group": self.group, "overrides": dict(self.overrides),
                "method": method}  # fmt: skip
