"""A stand-in for `flashmoe._core` in plain Python: tiny, deterministic, and it fails on demand.

For what the real core cannot be made to do at will: errors at a given call, a slow forward to
cancel, refusing direct reads, recurrent state that only goes back to snapshots.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from types import SimpleNamespace

import numpy as np

from flashmoe.errors import Cancelled, StateError, UnsupportedError

MIB = 1 << 20


class FakeSession:
    def __init__(self, engine):
        self.engine, self.tokens, self.snapshot = engine, [], 0
        self.context = engine.opts["context"]
        self.cancelled = threading.Event()
        self.closed = False
        self.last = None

    @property
    def pos(self):
        return len(self.tokens)

    def _run(self, ids, all_logits=False):
        if self.closed or self.engine.closed:
            raise StateError("closed")
        self.engine.calls.append((self, list(map(int, ids))))
        if self.engine.faults:
            fault = self.engine.faults.pop(0)
            if fault is not None:
                raise fault
        if self.cancelled.wait(self.engine.delay):
            self.cancelled.clear()
            raise Cancelled("cancelled")
        rows = []
        for i in ids:
            self.tokens.append(int(i))
            self.last = self.engine.row(self.tokens)
            rows.append(self.last)
        return np.stack(rows) if all_logits else None

    def prefill(self, ids):
        n = min(len(ids), self.engine.opts["max_rows"])
        self._run(ids[:n])
        return n

    def step(self, id):
        self._run([id])

    def logits(self):
        return self.last.copy()

    def read_logits(self, fn):
        row = self.last.view()
        row.flags.writeable = False
        return fn(row)

    def rewind(self, want):
        got = self.snapshot if self.snapshot <= want else 0
        self.tokens = self.tokens[:got]
        self.last = None
        return got

    def checkpoint(self):
        self.snapshot = self.pos

    def save(self):
        return json.dumps(self.tokens).encode()

    def load(self, data):
        self.tokens, self.last = json.loads(data), None

    def cancel(self):
        self.cancelled.set()

    def close(self):
        self.closed = True


class FakeEngine:
    refuse_direct = False
    sizes = {  # noqa: RUF012
        "trunk_bytes": 64 * MIB,
        "state_bytes": 8 * MIB,
        "scratch_bytes": 0,  # set per row below
        "slot_bytes": MIB,
        "n_slots_min": 4,
        "n_experts_total": 1000,
        "expert_record_bytes_max": MIB,
    }
    scratch_per_row = MIB // 8

    def __init__(self, desc, opts):
        if opts["io_direct"] and self.refuse_direct:
            raise UnsupportedError("/x: this file system has no direct reads")
        self.desc, self.opts = desc, opts
        self.vocab = desc["config"]["vocab_size"]
        self.calls, self.faults, self.delay, self.closed = [], [], 0.0, False
        self.slots = opts["n_slots"]
        self.script = None  # token ids to make the most probable, one after the other
        self.info = {"cpu_variant": "fake", **opts}

    def row(self, tokens):
        """Logits that depend on every token so far."""
        seed = zlib.crc32(np.asarray(tokens, dtype=np.int32).tobytes())
        row = np.random.default_rng(seed).standard_normal(self.vocab).astype(np.float32)
        if self.script:
            row[self.script[min(len(tokens), len(self.script)) - 1]] = 50
        return row

    @classmethod
    def plan(cls, desc, opts):
        return {**cls.sizes, "scratch_bytes": cls.scratch_per_row * opts["max_rows"]}

    def session(self):
        return FakeSession(self)

    def forward(self, sessions, ids, all_logits=False, trace_router=False):
        rows = [s._run(i, all_logits=True) for s, i in zip(sessions, ids)]
        return {"logits": np.concatenate(rows), "router": None}

    def set_slots(self, n):
        self.slots = self.info["n_slots"] = n
        return n

    def stats(self):
        return {"bytes_read": 1, "n_calls": len(self.calls)}

    def reset_stats(self):
        self.calls.clear()

    def close(self):
        self.closed = True


def crc32c(data, crc=0):
    return zlib.crc32(bytes(data), crc)


def make_core(**attributes):
    """Return a module-like object with its own Engine class, with class attributes replaced."""
    return SimpleNamespace(
        Engine=type("Engine", (FakeEngine,), attributes),
        Session=FakeSession,
        crc32c=crc32c,
        io_methods=lambda: ["pread", "fault"],
        cache_policies=lambda: ["lru", "clock", "lfu"],
        backends=lambda: ["cpu", "metal"],
        cpu_variants=lambda: ["ref"],
        cpu_variant=lambda: "ref",
        quant_formats=lambda: ["f32"],
        env_table=lambda: [("FLASHMOE_CPU", "force a CPU variant", None)],
        version="0",
        sleep=time.sleep,
    )
