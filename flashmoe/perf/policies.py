"""Cache policies, simulated as plainly as possible: the core's three, and Belady's bound.

The rules of `Lru`, `Clock` and `Lfu` are those of ``csrc/store/expert_cache.h``; a test holds the
core's counters against them.  Keys are any integers.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Protocol

from flashmoe.errors import ArgumentError

__all__ = ["POLICIES", "Clock", "Lfu", "Lru", "Policy", "belady_hits", "simulate"]

LFU_COUNTS = 32
LFU_AGE_FACTOR = 16


class Policy(Protocol):
    """A cache of `n_slots` keys."""

    def __init__(self, n_slots: int) -> None: ...

    def __contains__(self, key: int) -> bool: ...

    def touch(self, key: int) -> None:
        """Use a key that is there."""

    def take(self, key: int, pinned: set[int]) -> None:
        """Bring in a key that is not there; none of `pinned` may leave for it."""


class Lru:
    """The least recently used key leaves."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.keys: OrderedDict[int, None] = OrderedDict()  # oldest first

    def __contains__(self, key: int) -> bool:
        return key in self.keys

    def touch(self, key: int) -> None:
        """Make it the newest."""
        self.keys.move_to_end(key)

    def take(self, key: int, pinned: set[int]) -> None:
        """Evict the oldest that is not pinned."""
        if len(self.keys) == self.n_slots:
            del self.keys[next(k for k in self.keys if k not in pinned)]
        self.keys[key] = None


class Clock:
    """The oldest key leaves, unless it was used since the hand last passed."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.used: OrderedDict[int, bool] = OrderedDict()  # oldest first

    def __contains__(self, key: int) -> bool:
        return key in self.used

    def touch(self, key: int) -> None:
        """Mark it; it keeps its place."""
        self.used[key] = True

    def take(self, key: int, pinned: set[int]) -> None:
        """Move the hand over pinned keys, past marked ones, to the first without a mark."""
        if len(self.used) == self.n_slots:
            victim = None
            while victim is None:
                for old in list(self.used):
                    if old in pinned:
                        continue
                    if not self.used[old]:
                        victim = old
                        break
                    self.used[old] = False
                    self.used.move_to_end(old)
            del self.used[victim]
        self.used[key] = False


class Lfu:
    """The least often used key leaves, the least recently used among equals.

    Uses outlive eviction, stop counting at 31, and are halved every 16 * `n_slots` uses.
    """

    def __init__(self, n_slots: int) -> None:
        self.n_slots = n_slots
        self.uses: dict[int, int] = {}
        self.n_touches = 0
        self.buckets: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(LFU_COUNTS)]
        self.bucket_of: dict[int, int] = {}

    def __contains__(self, key: int) -> bool:
        return key in self.bucket_of

    def _age(self) -> None:
        self.uses = {key: n // 2 for key, n in self.uses.items()}
        for b in range(1, LFU_COUNTS):
            for key in self.buckets[b]:
                self.buckets[b // 2][key] = None
                self.bucket_of[key] = b // 2
            self.buckets[b] = OrderedDict()

    def touch(self, key: int) -> None:
        """Count a use."""
        self.n_touches += 1
        if self.n_touches % (LFU_AGE_FACTOR * self.n_slots) == 0:
            self._age()
        n = self.uses[key] = min(self.uses.get(key, 0) + 1, LFU_COUNTS - 1)
        if key in self.bucket_of:
            del self.buckets[self.bucket_of[key]][key]
        self.buckets[n][key] = None
        self.bucket_of[key] = n

    def take(self, key: int, pinned: set[int]) -> None:
        """Evict from the lowest count that has an unpinned key; count a use of the new one."""
        if len(self.bucket_of) == self.n_slots:
            victim = next(k for b in self.buckets for k in b if k not in pinned)
            del self.buckets[self.bucket_of.pop(victim)][victim]
        self.touch(key)


POLICIES: dict[str, type[Policy]] = {"lru": Lru, "clock": Clock, "lfu": Lfu}
"""As the engine's ``cache_policy``; ``"belady"`` is no policy but a bound."""


def simulate(policy: str, n_slots: int, waves: Iterable[Sequence[int]]) -> tuple[int, int]:
    """Run waves of keys through a cache as the core does; return (hits, accesses).

    Parameters
    ----------
    policy : {"lru", "clock", "lfu", "belady"}
    n_slots : int
        At least as many as the longest wave.
    waves : iterable of sequences of different int
        The experts that one layer wants at a time.  Those present are touched first, then the
        missing ones come in; what came in for a wave stays until the wave is done.
    """
    if policy == "belady":
        flat = [key for wave in waves for key in wave]
        return belady_hits(n_slots, flat), len(flat)
    if policy not in POLICIES:
        raise ArgumentError(f"policy {policy!r}; there are: {', '.join(POLICIES)}, belady")
    cache = POLICIES[policy](n_slots)
    n_hits = n = 0
    for wave in waves:
        if len(wave) > n_slots:
            raise ArgumentError(f"{n_slots} slots for {len(wave)} experts at a time")
        n += len(wave)
        fresh: set[int] = set()
        for key in wave:
            if key in cache:
                cache.touch(key)
        for _ in range(2):  # a second round for those that the wave's own misses pushed out
            for key in wave:
                if key not in cache:
                    cache.take(key, fresh)
                    fresh.add(key)
        n_hits += len(wave) - len(fresh)
    return n_hits, n


def belady_hits(n_slots: int, keys: Sequence[int]) -> int:
    """Return the most hits that any policy can have: who is used again last leaves.

    >>> belady_hits(2, [1, 2, 3, 1, 2])
    1
    """
    end = len(keys)
    next_use = [0] * end
    seen: dict[int, int] = {}
    for i in range(end - 1, -1, -1):
        next_use[i] = seen.get(keys[i], end)
        seen[keys[i]] = i
    inside: dict[int, int] = {}  # key -> next use
    heap: list[tuple[int, int]] = []  # (-next use, key), stale entries included
    n_hits = 0
    for i, key in enumerate(keys):
        if key in inside:
            n_hits += 1
        elif len(inside) == n_slots:
            while True:
                at, old = heapq.heappop(heap)
                if inside.get(old) == -at:
                    break
            del inside[old]
        inside[key] = next_use[i]
        heapq.heappush(heap, (-next_use[i], key))
    return n_hits
