"""Mixers: gated softmax attention with partial rotary, and the Gated DeltaNet."""

from __future__ import annotations

from typing import Any

import numpy as np

from .router import sigmoid, softmax

Weights = dict[str, np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    """Return x * sigmoid(x)."""
    return x * sigmoid(x)


def softplus(x: np.ndarray) -> np.ndarray:
    """Return log(1 + exp(x)) without overflow."""
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def rms_norm(x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
    """Return x / sqrt(mean(x^2) + eps) * w over the last axis."""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w


def linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    """Return x W^T, plus the bias if there is one."""
    y = x @ w[name + ".weight"].T
    return y + w[name + ".bias"] if name + ".bias" in w else y


def rotary(x: np.ndarray, pos: np.ndarray, rot: int, theta: float) -> np.ndarray:
    """Rotate the first `rot` dimensions of x (n_tokens, n_heads, hd); pairs are (i, i + rot/2)."""
    half = rot // 2
    angle = pos[:, None] * theta ** (-2.0 * np.arange(half) / rot)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    a, b = x[..., :half], x[..., half:rot]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, x[..., rot:]], -1)


def attention(
    c: dict[str, Any], w: Weights, p: str, x: np.ndarray, state: dict[str, Any]
) -> np.ndarray:
    """Causal grouped-query attention on top of the keys and values in `state` (updated).

    ``c["kv_round"]``, where there is one, rounds keys and values as a cache keeps them.
    """
    n, nh, nkv, hd = len(x), c["heads"], c["kv_heads"], c["head_dim"]
    q, k = linear(w, p + "q_proj", x), linear(w, p + "k_proj", x)
    v = linear(w, p + "v_proj", x).reshape(n, nkv, hd)
    gate = None
    if c["gated"]:  # per head: the query, then its gate
        q = q.reshape(n, nh, 2 * hd)
        q, gate = q[..., :hd], q[..., hd:]
    if c["qk_norm"] == "flat":
        q = rms_norm(q, w[p + "q_norm.weight"], c["eps"])
        k = rms_norm(k, w[p + "k_norm.weight"], c["eps"])
    q, k = q.reshape(n, nh, hd), k.reshape(n, nkv, hd)
    if c["qk_norm"] == "head":
        q = rms_norm(q, w[p + "q_norm.weight"] + c["norm_offset"], c["eps"])
        k = rms_norm(k, w[p + "k_norm.weight"] + c["norm_offset"], c["eps"])
    if c["clip_qkv"]:
        q, k, v = (np.clip(a, -c["clip_qkv"], c["clip_qkv"]) for a in (q, k, v))
    old = state.get("k", np.zeros((0, nkv, hd)))
    pos = len(old) + np.arange(n, dtype=np.float64)
    q, k = (rotary(a, pos, c["rotary_dim"], c["theta"]) for a in (q, k))
    if "kv_round" in c:
        k, v = c["kv_round"](k), c["kv_round"](v)
    k = state["k"] = np.concatenate([old, k])
    v = state["v"] = np.concatenate([state.get("v", np.zeros((0, nkv, hd))), v])
    future = np.arange(len(k))[None, :] > pos[:, None]
    out = np.empty((n, nh, hd))
    for h in range(nh):
        g = h // (nh // nkv)
        scores = np.where(future, -np.inf, q[:, h] @ k[:, g].T / np.sqrt(hd))
        out[:, h] = softmax(scores) @ v[:, g]
    if gate is not None:
        out = out * sigmoid(gate)
    return linear(w, p + "o_proj", out.reshape(n, nh * hd))


def delta_net(
    c: dict[str, Any], w: Weights, p: str, x: np.ndarray, state: dict[str, Any]
) -> np.ndarray:
    """Gated DeltaNet, token by token, on the conv and recurrent `state` (updated)."""
    n, hk, hv, dk, dv = len(x), c["k_heads"], c["v_heads"], c["k_dim"], c["v_dim"]
    r, kern = hv // hk, c["kernel"]
    if p + "in_proj_qkvz.weight" in w:  # Qwen3-Next: grouped per key head
        y = linear(w, p + "in_proj_qkvz", x).reshape(n, hk, 2 * dk + 2 * r * dv)
        q, k, v, z = np.split(y, [dk, 2 * dk, 2 * dk + r * dv], -1)
        m = np.concatenate([a.reshape(n, -1) for a in (q, k, v)], -1)
        ba = linear(w, p + "in_proj_ba", x).reshape(n, hk, 2 * r)
        b, a = ba[..., :r].reshape(n, hv), ba[..., r:].reshape(n, hv)
    else:
        m, z = linear(w, p + "in_proj_qkv", x), linear(w, p + "in_proj_z", x)
        b, a = linear(w, p + "in_proj_b", x), linear(w, p + "in_proj_a", x)
    taps = w[p + "conv1d.weight"].reshape(-1, kern)  # the last tap is the current token's
    full = np.concatenate([state.get("conv", np.zeros((kern - 1, m.shape[1]))), m])
    state["conv"] = full[len(full) - (kern - 1) :]
    y = silu(sum(full[j : j + n] * taps[:, j] for j in range(kern)))
    q = y[:, : hk * dk].reshape(n, hk, dk)
    k = y[:, hk * dk : 2 * hk * dk].reshape(n, hk, dk)
    v = y[:, 2 * hk * dk :].reshape(n, hv, dv)
    q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6) / np.sqrt(dk)
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    q, k = np.repeat(q, r, 1), np.repeat(k, r, 1)  # value head h uses key head h // r
    beta = sigmoid(b)
    alpha = np.exp(-np.exp(w[p + "A_log"]) * softplus(a + w[p + "dt_bias"]))
    s = state.get("s", np.zeros((hv, dk, dv)))
    out = np.empty((n, hv, dv))
    for t in range(n):
        s = alpha[t][:, None, None] * s
        d = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", s, k[t]))
        s = s + k[t][:, :, None] * d[:, None, :]
        out[t] = np.einsum("hkv,hk->hv", s, q[t])
    state["s"] = s
    out = rms_norm(out, w[p + "norm.weight"], c["eps"]) * silu(z.reshape(n, hv, dv))
    return linear(w, p + "out_proj", out.reshape(n, hv * dv))
