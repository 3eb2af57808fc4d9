"""Weight formats decoded and encoded the obvious way, as the judge of every codec.

Source: the layout in csrc/quant/quant.h; MLX's affine quantisation (scale from the range, bias at
the edge of larger magnitude).
"""

from __future__ import annotations

import numpy as np


def bf16_to_f64(bits: np.ndarray) -> np.ndarray:
    """Return the values of bfloat16 bit patterns (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def f64_to_bf16(x: np.ndarray) -> np.ndarray:
    """Return bfloat16 bit patterns of float32-representable numbers, ties to even."""
    u = np.asarray(x, np.float32).view(np.uint32)
    return ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype(np.uint16)


def unpack(row_bytes: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes of rows of a little-endian bit stream: (n_rows, n_bytes) -> (n_rows, n)."""
    stream = np.unpackbits(np.asarray(row_bytes, np.uint8), axis=1, bitorder="little")
    n = stream.shape[1] // bits
    return (stream.reshape(len(stream), n, bits).astype(np.int64) << np.arange(bits)).sum(-1)


def dequantise(
    row_bytes: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int
) -> np.ndarray:
    """Return float64 values ``scale * code + bias``; scales and biases are (n_rows, n_groups)."""
    q = unpack(row_bytes, bits).astype(np.float64)
    q = q.reshape(*scales.shape, -1)
    return (q * scales[..., None] + biases[..., None]).reshape(len(q), -1)


def quantise_group(w: np.ndarray, bits: int) -> tuple[np.ndarray, float, float]:
    """Quantise one group of float32 weights; return (codes, scale, bias), both bfloat16 values.

    Every step is one float32 operation, so that results are comparable bit for bit.
    """
    f = np.float32
    top = f((1 << bits) - 1)
    low, high = f(w.min()), f(w.max())
    below = abs(low) > abs(high)
    edge = low if below else high
    scale = max(f(f(high - low) / top), f(1e-7))
    if not below:
        scale = -scale
    edge_code = np.rint(f(edge / scale))
    bias = f(0)
    if edge_code != 0:
        scale, bias = f(edge / edge_code), edge
    scale = f(bf16_to_f64(f64_to_bf16(np.array([scale])))[0])
    bias = f(bf16_to_f64(f64_to_bf16(np.array([bias])))[0])
    q = np.clip(np.rint((w.astype(f) - bias) / scale), 0, top)
    return q.astype(np.int64), float(scale), float(bias)


def crc32c(data: bytes, crc: int = 0) -> int:
    """Return the CRC-32C, bit by bit."""
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
