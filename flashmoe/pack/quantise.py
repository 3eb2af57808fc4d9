"""Round-to-nearest affine quantisation, bit for bit what ``csrc/quant/quant_affine.c`` does.

Values are ``scale * code + bias``.  The edge of a group that is larger in magnitude is hit exactly,
codes are chosen against the rounded scale and bias that decoding will use, and a group of zeros
decodes to exact zeros.

Notes
-----
Source: MLX's affine quantisation (scale from the range, bias at the larger edge), MIT; there the
codes are chosen against the unrounded scale.
"""

from __future__ import annotations

import numpy as np

from flashmoe.errors import ModelFileError

__all__ = ["dequantise", "pack_codes", "quantise", "to_float32", "unpack_codes"]

SCALE_FORMAT = "bf16"
_BF16_MAX = np.uint32(0x7F7F0000).view(np.float32)
_BLOCK = 1 << 17  # weights worked on at once: the temporaries stay in the second-level cache
_TINY = np.float32(1e-7)


def to_float32(raw: np.ndarray, fmt: str) -> np.ndarray:
    """Return float32 values of the bytes of a plain format.

    Parameters
    ----------
    raw : ndarray of shape (n_bytes,), uint8
    fmt : {"f32", "f16", "bf16"}
    """
    if fmt == "f32":
        return raw.view("<f4").astype(np.float32, copy=False)
    if fmt == "f16":
        return raw.view("<f2").astype(np.float32)
    return (raw.view("<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)


def _round_bf16(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (bfloat16 bits, their float32 values), ties to even; never infinity."""
    bits = np.clip(x, -_BF16_MAX, _BF16_MAX).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    half = (bits >> np.uint32(16)).astype(np.uint16)
    return half, (half.astype(np.uint32) << np.uint32(16)).view(np.float32)


def quantise(
    x: np.ndarray, bits: int, group: int, what: str = "tensor"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Quantise rows to nearest.

    Parameters
    ----------
    x : ndarray of shape (n_rows, n_cols), float32
        n_cols is a multiple of `group`.
    bits : {2, 3, 4, 5, 6, 8}
    group : int
        Weights per scale.
    what : str
        Names the matrix in the error.

    Returns
    -------
    codes : ndarray of shape (n_rows, n_cols * bits // 8), uint8
        One little-endian bit stream per row.
    scales, biases : ndarray of shape (n_rows, n_cols // group), uint16
        The bits of bfloat16 numbers.

    Raises
    ------
    ModelFileError
        A weight is not finite.
    """
    n_rows, n_cols = x.shape
    codes = np.empty((n_rows, n_cols * bits // 8), np.uint8)
    scales = np.empty((n_rows, n_cols // group), np.uint16)
    biases = np.empty_like(scales)
    step = max(1, _BLOCK // n_cols)
    for r in range(0, n_rows, step):
        part = slice(r, min(n_rows, r + step))
        q, s, b = _block(x[part].reshape(-1, group), bits, what)
        codes[part] = pack_codes(q.reshape(-1, n_cols), bits)
        scales[part] = s.reshape(-1, n_cols // group)
        biases[part] = b.reshape(-1, n_cols // group)
    return codes, scales, biases


def _block(x: np.ndarray, bits: int, what: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    max_code = np.float32((1 << bits) - 1)
    low, high = x.min(axis=1), x.max(axis=1)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ModelFileError(f"{what}: a weight is NaN or infinite")
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        below = np.abs(low) > np.abs(high)
        edge = np.where(below, low, high)
        scale = np.maximum((high - low) / max_code, _TINY)
        scale = np.where(below, scale, -scale)
        edge_code = np.rint(edge / scale)
        hit = edge_code != 0
        scale = np.where(hit, edge / np.where(hit, edge_code, np.float32(1)), scale)
        bias = np.where(hit, edge, np.float32(0))
        s16, scale = _round_bf16(scale)
        b16, bias = _round_bf16(bias)
        q = x - bias[:, None]
        q /= scale[:, None]
        np.rint(q, out=q)
        np.clip(q, 0, max_code, out=q)
    return q.astype(np.uint8), s16, b16


def pack_codes(q: np.ndarray, bits: int) -> np.ndarray:
    """Return the bit streams of rows of codes.

    Parameters
    ----------
    q : ndarray of shape (n_rows, n_cols), uint8
        n_cols is a multiple of 8.
    bits : int

    Returns
    -------
    ndarray of shape (n_rows, n_cols * bits // 8), uint8
    """
    n_rows, n_cols = q.shape
    if bits == 8:
        return q
    if bits in (2, 4):
        out = q[:, 0 :: 8 // bits].copy()
        for j in range(1, 8 // bits):
            out |= q[:, j :: 8 // bits] << np.uint8(bits * j)
        return out
    word = np.zeros((n_rows, n_cols // 8), np.uint64)
    for j in range(8):
        word |= q[:, j::8].astype(np.uint64) << np.uint64(bits * j)
    as_bytes = word.astype("<u8").view(np.uint8).reshape(n_rows, n_cols // 8, 8)
    return as_bytes[:, :, :bits].reshape(n_rows, n_cols * bits // 8)


def unpack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Return the codes of bit streams; the inverse of :func:`pack_codes`."""
    n_rows = codes.shape[0]
    groups = codes.reshape(n_rows, -1, bits)
    word = np.zeros((*groups.shape[:2], 8), np.uint8)
    word[:, :, :bits] = groups
    w = word.view("<u8")[:, :, 0]
    out = np.empty((*w.shape, 8), np.uint8)
    for j in range(8):
        out[:, :, j] = (w >> np.uint64(bits * j)) & np.uint64((1 << bits) - 1)
    return out.reshape(n_rows, -1)


def dequantise(
    codes: np.ndarray, scales: np.ndarray, biases: np.ndarray, bits: int
) -> np.ndarray:
    """Return the float32 values of quantised rows.

    Parameters
    ----------
    codes : ndarray of shape (n_rows, n_bytes), uint8
    scales, biases : ndarray of shape (n_rows, n_groups), float32
    bits : int
    """
    q = unpack_codes(codes, bits).astype(np.float32)
    n_rows, n_groups = scales.shape
    w: np.ndarray = q.reshape(n_rows, n_groups, -1) * scales[:, :, None] + biases[:, :, None]
    return w.reshape(n_rows, -1)
