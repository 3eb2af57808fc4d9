"""CRC-32C of buffers: the core's, or without it the same in NumPy (slow, for source trees)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["crc32c"]

_POLY = 0x82F63B78
_LANES = 4096


@functools.cache
def _table() -> np.ndarray:
    t = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        t = np.where(t & 1, (t >> 1) ^ np.uint32(_POLY), t >> 1).astype(np.uint32)
    return t


def _apply(matrix: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return the GF(2) product of a 32 x 32 matrix (as 32 columns) with every element of `v`."""
    out = np.zeros_like(v)
    for bit in range(32):
        out ^= np.where((v >> np.uint32(bit)) & np.uint32(1), matrix[bit], np.uint32(0))
    return out


@functools.lru_cache(maxsize=64)
def _shift(n_bytes: int) -> np.ndarray:
    """Return the matrix that feeds `n_bytes` zero bytes to a CRC register."""
    result = np.uint32(1) << np.arange(32, dtype=np.uint32)
    step = result.copy()
    for _ in range(8):  # one byte
        step = np.where(step & 1, (step >> 1) ^ np.uint32(_POLY), step >> 1).astype(np.uint32)
    while n_bytes:
        if n_bytes & 1:
            result = _apply(step, result)
        step = _apply(step, step)
        n_bytes >>= 1
    return result


def _numpy_crc32c(data: Any, crc: int = 0) -> int:
    a = np.frombuffer(data, np.uint8)
    reg = np.uint32(crc ^ 0xFFFFFFFF)
    t = _table()
    lane = a.size // _LANES
    if lane:
        lanes = np.ascontiguousarray(a[: lane * _LANES].reshape(_LANES, lane).T)
        regs = np.zeros(_LANES, np.uint32)
        regs[0] = reg
        for row in lanes:
            regs = t[(regs ^ row) & 0xFF] ^ (regs >> np.uint32(8))
        n = lane
        while regs.size > 1:
            regs = _apply(_shift(n), regs[0::2]) ^ regs[1::2]
            n *= 2
        reg = regs[0]
    value, table = int(reg), t.tolist()
    for byte in a[lane * _LANES :].tolist():
        value = table[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


@functools.cache
def _implementation() -> Callable[..., int]:
    try:
        from flashmoe import _core

        return _core.crc32c
    except (ImportError, AttributeError):
        return _numpy_crc32c


def crc32c(data: Any, crc: int = 0) -> int:
    """Return the CRC-32C of a contiguous buffer, continuing from `crc`.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    return int(_implementation()(data, crc))
