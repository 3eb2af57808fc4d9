"""The simulated caches against obvious ones, against a search, and against the core's own."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from engines import core_engine

from flashmoe import _core
from flashmoe.errors import ArgumentError
from flashmoe.perf.policies import POLICIES, belady_hits, simulate


def singles(keys):
    return [[k] for k in keys]


def obvious(policy, n_slots, keys):
    """Hits of a cache that keeps every key's history and looks through all of it."""
    inside, last, count, hits = [], {}, {}, 0
    for t, key in enumerate(keys):
        hits += key in inside
        if key not in inside:
            if len(inside) == n_slots:
                rank = {"lru": lambda k: last[k], "lfu": lambda k: (min(count[k], 31), last[k])}
                inside.remove(min(inside, key=rank[policy]))
            inside.append(key)
        last[key], count[key] = t, count.get(key, 0) + 1
    return hits


@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_against_an_obvious_cache(policy):
    rng = np.random.default_rng(5)
    for n_slots in (1, 3, 8):
        # short of LFU's first ageing, which the obvious cache does not do
        keys = rng.zipf(1.5, 16 * n_slots - 1) % 13
        hits, n = simulate(policy, n_slots, singles(keys.tolist()))
        assert (hits, n) == (obvious(policy, n_slots, keys.tolist()), len(keys))


def test_clock_by_hand():
    # 1 2 3 fill; 1 is marked; 4 passes over 1 and takes 2; 1 stays for its second chance
    hits, n = simulate("clock", 3, singles([1, 2, 3, 1, 4, 1, 2]))
    assert (hits, n) == (2, 7)
    assert simulate("clock", 3, singles([1, 2, 3, 4, 1]))[0] == 0


def test_lfu_forgets():
    """Keys that were popular long ago leave, because counts are halved."""
    old = [0, 1] * 40
    new = [2, 3, 4] * 200
    hits, n = simulate("lfu", 3, singles(old + new))
    assert hits > len(old) - 2 + 300


def test_belady_is_the_best_there_is():
    def best(n_slots, keys):
        """Try every choice of victims."""
        states = {frozenset(): 0}
        for key in keys:
            after = {}
            for inside, hits in states.items():
                if key in inside:
                    options = [(inside, hits + 1)]
                elif len(inside) < n_slots:
                    options = [(inside | {key}, hits)]
                else:
                    options = [(inside - {old} | {key}, hits) for old in inside]
                for state, h in options:
                    after[state] = max(after.get(state, -1), h)
            states = after
        return max(states.values())

    rng = np.random.default_rng(2)
    for _ in range(20):
        keys = rng.integers(0, 6, 18).tolist()
        for n_slots in (1, 2, 3):
            assert belady_hits(n_slots, keys) == best(n_slots, keys)


def test_belady_bounds_the_policies():
    rng = np.random.default_rng(3)
    waves = [sorted(rng.permutation(40)[:4].tolist()) for _ in range(200)]
    bound, _ = simulate("belady", 12, waves)
    for policy in POLICIES:
        hits, n = simulate(policy, 12, waves)
        assert hits <= bound
        assert n == 800


def test_the_pinned_stay():
    """A wave as large as the cache works, whatever was there before."""
    for policy in POLICIES:
        assert simulate(policy, 4, [[0, 1, 2, 3], [4, 5, 6, 7], [0, 1, 2, 3]]) == (0, 12)
        assert simulate(policy, 4, [[0, 1, 2, 3], [2, 3, 4, 5], [2, 3, 4, 5]])[0] >= 4


def test_refusals():
    with pytest.raises(ArgumentError, match="belady"):
        simulate("fifo", 4, [[1]])
    with pytest.raises(ArgumentError, match="2 slots for 3"):
        simulate("lru", 2, [[1, 2, 3]])


def test_the_core_has_the_same_policies():
    assert list(POLICIES) == list(_core.cache_policies())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("model", ["q35moe_base/mlx4", "q3moe"])
def test_the_core_counts_the_same_hits(policy, model):
    """Decoding row by row: the core's hits and misses are the simulator's, for every size."""
    with core_engine(model, slots="all") as engine:
        total, k = engine.info["n_slots"], engine.info["experts_per_token"]
    for n_slots, seed in itertools.product((k, k + 1, total // 3, total - 3), (0, 1)):
        ids = np.random.default_rng(seed).integers(0, 250, 60, dtype=np.int32)
        with core_engine(model, slots=n_slots, cache_policy=policy) as engine:
            session = engine.session()
            rows = [
                engine.forward([session], [ids[i : i + 1]], trace_router=True)["router"][0]
                for i in range(len(ids))
            ]
            stats = engine.stats()
        waves = [
            sorted(layer * 1000 + int(e) for e in chosen)
            for row in rows
            for layer, chosen in enumerate(row)
            if chosen[0] >= 0
        ]
        hits, n = simulate(policy, n_slots, waves)
        assert (stats["hits"], stats["hits"] + stats["misses"]) == (hits, n), n_slots
