"""What share of the routed experts a cache of so many slots serves, for stated popularities.

Each layer draws `k` different experts per token, independently of other tokens, with popularity
falling as rank to the power of -`zipf` (0: uniform).  The least recently used expert leaves.
``tests/test_perf_predict.py`` compares this with the simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from math import erfc

import numpy as np
from numpy.typing import NDArray

__all__ = ["chosen_probabilities", "distinct_experts", "lru_hit_rate"]


def _solve(f: Callable[[float], float], target: float, high: float = 1.0) -> float:
    """Return x >= 0 with f(x) = target; f rises from f(0) <= target."""
    while f(high) < target and high < 1e18:
        high *= 2
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < target else (low, middle)
    return (low + high) / 2


def chosen_probabilities(n_experts: int, k: int, zipf: float = 0.0) -> NDArray[np.float64]:
    """Return the probability of each expert to be among the `k` of a token.

    Returns
    -------
    ndarray of shape (n_experts,)
        The sum is `k`; the most popular first.
    """
    weight = np.arange(1, n_experts + 1, dtype=np.float64) ** -zipf
    if k >= n_experts:
        return np.ones(n_experts)
    if zipf == 0:
        return np.full(n_experts, k / n_experts, np.float64)
    # Drawing without replacement, as independent exponential clocks stopped when k have rung.
    t = _solve(lambda x: float((-np.expm1(-x * weight)).sum()), k)
    p: NDArray[np.float64] = -np.expm1(-t * weight)
    p *= k / p.sum()
    return p


def lru_hit_rate(n_slots: float, n_layers: int, n_experts: int, k: int, zipf: float = 0.0) -> float:
    """Return the share of routed experts that are found in `n_slots` shared by all layers.

    An expert comes back after whole tokens, so what counts is how many tokens' different experts
    the slots hold.  Below one token's (`n_layers` * `k`) the rate soon is 0; with uniform routing
    it rises in steps, about the resident share.

    >>> lru_hit_rate(312, 40, 256, 8), round(lru_hit_rate(5120, 40, 256, 8), 2)
    (0.0, 0.49)
    """
    total = n_layers * n_experts
    if n_slots >= total:
        return 1.0
    if n_slots <= (n_layers - 1) * k:
        return 0.0
    p = chosen_probabilities(n_experts, k, zipf)
    share = p / k  # of the accesses
    not_used, hit, seen = np.ones(n_experts), 0.0, 0.0
    for tokens in range(1, 1 << 15):
        not_used = not_used * (1 - p)  # within so many tokens
        different = n_layers * float((1 - not_used).sum())
        spread = max((n_layers * float((not_used * (1 - not_used)).sum())) ** 0.5, 1e-9)
        if tokens == 1:  # exactly n_layers * k; what is short of that is the layer's oldest
            fits = min(n_slots / k - (n_layers - 1), 1.0)
        else:
            fits = 0.5 * erfc((different - n_slots) / spread / 2**0.5)
        back = float((share * (1 - not_used)).sum())
        hit += (back - seen) * fits
        seen = back
        if fits < 1e-6 or seen > 1 - 1e-9:
            break
    return hit


def distinct_experts(n_rows: int, n_experts: int, k: int, zipf: float = 0.0) -> float:
    """Return how many different experts of a layer a batch of rows is expected to want.

    >>> round(distinct_experts(512, 256, 8), 3), distinct_experts(1, 256, 8)
    (256.0, 8.0)
    """
    p = chosen_probabilities(n_experts, k, zipf)
    if n_rows == 1:
        return float(k)
    with np.errstate(divide="ignore"):
        return float((-np.expm1(n_rows * np.log1p(-np.minimum(p, 1.0)))).sum())
