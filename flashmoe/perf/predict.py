"""The planner: tokens per second from bytes, the device's and the memory's speed, and a hit rate.

Decode, per token::

    slots     = (ram - trunk - state - scratch - overhead) / expert
    read      = (1 - hit) * layers * K * expert          bytes from the device
    io        = read / ssd
    moe       = (layers * K * expert + shared) / mem     routed and shared experts through memory
    rest      = (trunk - embedding - shared + state + KV) / mem
    ceiling   = 1 / max(io, moe + rest)                  nothing waits for anything but the slower
    expected  = 1 / (rest + max(io, moe))                reads overlap only the experts' compute

Prefill, per chunk of n rows: each layer reads the different experts its rows want, once, less the
resident share, while it computes ``n * flops``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from flashmoe.errors import ArgumentError
from flashmoe.perf.geometry import Geometry
from flashmoe.perf.hitrate import distinct_experts, lru_hit_rate

__all__ = ["FORMULA", "Hardware", "Prediction", "ceiling", "predict", "sweep_tokens_per_second"]

FORMULA = (__doc__ or "").split("\n\n", 1)[1].strip()
OVERHEAD_BYTES = 128 << 20
"""Interpreter, libraries, allocator: what a process holds besides the model (assumed)."""
SCRATCH_BYTES_PER_ROW = 256 << 10
"""Of one forward (assumed for a model that is not here; the engine's own plan is exact)."""


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the machine gives.  None: not known, and not limiting in the prediction."""

    ssd_gb_per_s: float  # random reads of an expert's size, around the page cache
    ram_bytes: int  # for the whole process
    mem_gb_per_s: float | None = None  # weights through the processor that computes (CPU or GPU)
    gflops: float | None = None  # matrix products over many rows; limits prefill

    def __post_init__(self) -> None:
        for name in ("ssd_gb_per_s", "ram_bytes", "mem_gb_per_s", "gflops"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ArgumentError(f"{name}={value} must be more than 0")


@dataclass(frozen=True, slots=True)
class Prediction:
    """Sizes [bytes], times [seconds] per token or prompt, and speeds [tokens per second]."""

    model: str
    bits: float
    experts_per_token: int
    trained_experts_per_token: int
    context: int
    trunk_bytes: int
    state_bytes: int
    scratch_bytes: int
    overhead_bytes: int
    expert_bytes: int
    experts_bytes: int
    n_slots: int
    n_experts: int
    n_slots_floor: int  # one token's experts: below, a recency cache finds nothing
    hit_rate: float
    hit_model: str
    routed_bytes_per_token: int
    read_bytes_per_token: float
    io_seconds: float
    moe_seconds: float
    rest_seconds: float
    decode_ceiling: float
    decode_expected: float
    prompt_tokens: int
    prefill_chunk: int
    prefill_read_bytes: float
    prefill_seconds: float
    prefill_tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)


def ceiling(routed_bytes: float, ssd_gb_per_s: float, hit_rate: float) -> float:
    """Return the tokens per second that the device allows, compute being free.

    >>> round(ceiling(4246732800, 17.3, 0.5), 1)
    8.1
    """
    missed = routed_bytes * (1 - hit_rate)
    return ssd_gb_per_s * 1e9 / missed if missed > 0 else float("inf")


def sweep_tokens_per_second(experts_bytes: float, ssd_gb_per_s: float, chunk: int) -> float:
    """Return the prefill speed when every chunk reads every expert once."""
    return chunk * ssd_gb_per_s * 1e9 / experts_bytes


def predict(
    g: Geometry,
    hw: Hardware,
    *,
    k: int | None = None,
    context: int = 4096,
    position: int | None = None,
    prompt_tokens: int = 512,
    prefill_chunk: int = 512,
    zipf: float = 0.0,
    hit_rate: float | None = None,
    hit_model: str | None = None,
    n_slots: int | None = None,
    scratch: int | None = None,
    overhead: int = OVERHEAD_BYTES,
) -> Prediction:
    """Predict decode and prefill of a model on a machine.

    Parameters
    ----------
    g : Geometry
    hw : Hardware
    k : int, optional
        Experts per token; as trained by default.
    context : int
        Tokens that the state is sized for.
    position : int, optional
        Tokens already in the sequence while decoding; `prompt_tokens` by default.
    prompt_tokens, prefill_chunk : int
    zipf : float
        Exponent of the experts' popularity; 0 is uniform.
    hit_rate, hit_model
        A known hit rate, such as a replayed trace's, and where it comes from.
    n_slots : int, optional
        Instead of what `hw.ram_bytes` allows.
    scratch, overhead : int
        Bytes besides trunk, state and slots.

    Raises
    ------
    ArgumentError
        The memory does not hold the trunk and the experts of one layer's choice.
    """
    k = g.experts_per_token if k is None else k
    if g.n_moe_layers and not 1 <= k <= g.n_experts:
        raise ArgumentError(f"experts_per_token={k}: 1 to {g.n_experts} are possible")
    position = prompt_tokens if position is None else position
    state = g.state_bytes(context, copies=3)
    rest_of_ram = prefill_chunk * SCRATCH_BYTES_PER_ROW if scratch is None else scratch
    fixed = g.trunk_bytes + state + rest_of_ram + overhead
    fit = int(hw.ram_bytes - fixed) // g.slot_bytes if g.slot_bytes else 0
    if n_slots is None:
        if g.n_moe_layers and fit < k:
            need = fixed + k * g.slot_bytes
            raise ArgumentError(
                f"{g.name}: {hw.ram_bytes / 2**30:.2f} GiB hold less than trunk, state and {k} "
                f"experts, {need / 2**30:.2f} GiB"
            )
        n_slots = min(fit, g.n_experts_total)
    if hit_rate is None:
        hit_rate = lru_hit_rate(n_slots, g.n_moe_layers, g.n_experts, k, zipf) if k else 1.0
        kind = "uniform" if zipf == 0 else f"Zipf {zipf:g}"
        hit_model = f"{kind} routing, least recently used leaves"
    routed = g.routed_bytes(k)
    read = (1 - hit_rate) * g.n_moe_layers * k * g.slot_bytes
    io = read / (hw.ssd_gb_per_s * 1e9)
    per_byte = 1 / (hw.mem_gb_per_s * 1e9) if hw.mem_gb_per_s else 0.0
    moe = (routed + g.shared_bytes) * per_byte
    through = 2 * g.recurrent_bytes + position * g.kv_bytes_per_token
    rest = (g.trunk_read_bytes - g.shared_bytes + through) * per_byte
    prefill_read, prefill = _prefill(
        g, hw, k, prompt_tokens, prefill_chunk, zipf, n_slots, moe + rest
    )
    return Prediction(
        model=g.name, bits=g.bits, experts_per_token=k,
        trained_experts_per_token=g.experts_per_token, context=context,
        trunk_bytes=g.trunk_bytes, state_bytes=state, scratch_bytes=rest_of_ram,
        overhead_bytes=overhead, expert_bytes=g.expert_bytes, experts_bytes=g.experts_bytes,
        n_slots=n_slots, n_experts=g.n_experts_total, n_slots_floor=g.n_moe_layers * k,
        hit_rate=hit_rate, hit_model=hit_model or "given", routed_bytes_per_token=routed,
        read_bytes_per_token=read, io_seconds=io, moe_seconds=moe, rest_seconds=rest,
        decode_ceiling=_per_second(max(io, moe + rest)),
        decode_expected=_per_second(rest + max(io, moe)),
        prompt_tokens=prompt_tokens, prefill_chunk=prefill_chunk,
        prefill_read_bytes=prefill_read, prefill_seconds=prefill,
        prefill_tokens_per_second=_per_second(prefill / prompt_tokens),
    )  # fmt: skip


def _per_second(seconds: float) -> float:
    return 1 / seconds if seconds > 0 else float("inf")


def _prefill(g: Geometry, hw: Hardware, k: int, n_tokens: int, chunk: int, zipf: float,
             n_slots: int, weights_seconds: float) -> tuple[float, float]:  # fmt: skip
    """Return bytes read and seconds; the cache is cold for the first chunk."""
    if n_tokens < 1 or chunk < 1:
        raise ArgumentError(f"{n_tokens} prompt tokens in chunks of {chunk}: 1 at least")
    read = seconds = 0.0
    for at in range(0, n_tokens, chunk):
        rows = min(chunk, n_tokens - at)
        wanted = distinct_experts(rows, g.n_experts, k, zipf) if k else 0.0
        resident = min(n_slots / g.n_experts_total, 1.0) if at and g.n_experts_total else 0.0
        bytes_now = g.n_moe_layers * wanted * (1 - resident) * g.slot_bytes
        compute = weights_seconds  # at least one pass over what a token needs
        if hw.gflops:
            compute = max(compute, rows * g.flops(k, at + rows / 2) / (hw.gflops * 1e9))
        read += bytes_now
        seconds += max(bytes_now / (hw.ssd_gb_per_s * 1e9), compute)
    return read, seconds
