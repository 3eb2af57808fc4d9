"""Feed-forward blocks: SwiGLU and the mixture of experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from .attention import Weights, linear, silu
from .router import route, sigmoid


def swiglu(w: Weights, p: str, x: np.ndarray) -> np.ndarray:
    """Return down(silu(gate x) * up x)."""
    y = silu(linear(w, p + "gate_proj", x)) * linear(w, p + "up_proj", x)
    return linear(w, p + "down_proj", y)


def mixture(c: dict[str, Any], w: Weights, p: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (output, expert ids (n_tokens, k)); expert stacks are p + "experts.gate" and so on."""
    bias = w.get(p + "gate.e_score_correction_bias")
    ids, weight = route(linear(w, p + "gate", x), c["top_k"], bias=bias, **c["router"])
    gate, up, down = (w[f"{p}experts.{r}"] for r in ("gate", "up", "down"))
    y = np.zeros_like(x)
    for e in np.unique(ids):
        t, j = np.nonzero(ids == e)
        f = (silu(x[t] @ gate[e].T) * (x[t] @ up[e].T)) @ down[e].T
        np.add.at(y, t, weight[t, j][:, None] * f)
    if p + "shared_expert.gate_proj.weight" in w:
        s = swiglu(w, p + "shared_expert.", x)
        if p + "shared_expert_gate.weight" in w:
            s = s * sigmoid(linear(w, p + "shared_expert_gate", x))
        y = y + s
    return y, ids
