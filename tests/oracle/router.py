"""Expert choice: the largest scores, equal scores by increasing expert id."""

from __future__ import annotations

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)) without overflow."""
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Return the ids of the k largest, by decreasing score; ties go to the lower id."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def route(
    logits: np.ndarray,
    k: int,
    *,
    score: str = "softmax",
    normalise: bool = True,
    eps: float = 0.0,
    scale: float = 1.0,
    bias: np.ndarray | None = None,
    n_group: int = 1,
    topk_group: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, weights), both (n_tokens, k), in order of decreasing choice.

    Parameters
    ----------
    logits : ndarray of shape (n_tokens, n_experts)
    score : {"softmax", "sigmoid"}
    bias : ndarray of shape (n_experts,), optional
        Added for the choice only.
    n_group, topk_group : int
        Only experts of the `topk_group` groups with the largest sum of two best may be chosen.
    """
    p = softmax(logits) if score == "softmax" else sigmoid(logits)
    choice = p if bias is None else p + bias
    if n_group > 1:
        n, e = choice.shape
        best2 = np.sort(choice.reshape(n, n_group, -1), -1)[..., -2:].sum(-1)
        allowed = np.zeros((n, n_group), bool)
        np.put_along_axis(allowed, top_k(best2, topk_group), True, -1)
        choice = np.where(np.repeat(allowed, e // n_group, -1), choice, -np.inf)
    ids = top_k(choice, k)
    w = np.take_along_axis(p, ids, -1)
    if normalise:
        w = w / (w.sum(-1, keepdims=True) + eps)
    return ids, w * scale
