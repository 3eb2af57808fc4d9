"""Float64 NumPy oracles of the Metal kernels, and the formats they read. Imports nothing of ours."""

import numpy as np

F = np.float64


# ---- number formats


def to_plain(x, fmt):
    """Bytes of plain numbers as uint8 [..., n * size], and the values they hold (float64)."""
    x = np.asarray(x, np.float32)
    if fmt == "f32":
        return x.view(np.uint8), x.astype(F)
    if fmt == "f16":
        h = x.astype(np.float16)
        return h.view(np.uint8), h.astype(F)
    bits = x.view(np.uint32).astype(np.uint64)
    top = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # round to even
    return top.view(np.uint8), (top.astype(np.uint32) << 16).view(np.float32).astype(F)


def pack_codes(codes, bits):
    """Little-endian bit stream per row: code j in bits j*b .. j*b+b-1; uint8 [rows, n*b/8]."""
    rows, n = codes.shape
    stream = ((codes[:, :, None] >> np.arange(bits)) & 1).astype(np.uint8).reshape(rows, n * bits)
    return np.packbits(stream, axis=1, bitorder="little")


class Matrix:
    """A weight matrix in a format: byte areas as the kernels read them, and its float64 values."""

    def __init__(self, rng, n_out, n_cols, fmt, group=64, scale="bf16"):
        self.fmt, self.group, self.scale, self.shape = fmt, group, scale, (n_out, n_cols)
        if not fmt.startswith("affine"):
            self.codes, self.values = to_plain(rng.standard_normal(self.shape), fmt)
            self.scales = self.biases = np.zeros((n_out, 4), np.uint8)
            return
        bits = int(fmt[6:])
        codes = rng.integers(0, 1 << bits, self.shape)
        n_groups = n_cols // group
        spread = rng.uniform(0.5, 2.0, (n_out, n_groups)) * rng.choice([-1, 1], (n_out, n_groups))
        self.scales, s = to_plain(spread / (1 << bits), scale)
        self.biases, b = to_plain(-spread * rng.uniform(0.3, 0.7, s.shape), scale)
        self.codes = pack_codes(codes, bits)
        self.values = codes * np.repeat(s, group, 1) + np.repeat(b, group, 1)

    def aligned(self, skip=0):
        """Copy the areas into fresh memory, `skip` bytes past a 64-byte boundary."""
        for name in ("codes", "scales", "biases"):
            setattr(self, name, at_offset(getattr(self, name), skip))
        return self


def at_offset(x, skip):
    """A copy of `x` that ends at the end of its memory and starts `skip` past a 64-byte border."""
    raw = np.zeros(x.nbytes + 64 + skip, np.uint8)
    start = -raw.ctypes.data % 64 + skip
    out = raw[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


# ---- formulas


def sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + e), e / (1 + e))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def rmsnorm(x, w, eps):
    x = np.asarray(x, F)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * np.asarray(w, F)


def attention(q, k, v, gate, pos0, scale):
    """q, gate [n, heads, hd]; k, v [kv, cached, hd]; row t sees positions <= pos0 + t."""
    q, k, v = (np.asarray(z, F) for z in (q, k, v))
    n, heads, _ = q.shape
    out = np.empty(q.shape)
    for t in range(n):
        for h in range(heads):
            g = h // (heads // k.shape[0])
            s = k[g, : pos0 + t + 1] @ q[t, h] * scale
            p = np.exp(s - s.max())
            out[t, h] = p @ v[g, : pos0 + t + 1] / p.sum()
    return out if gate is None else out * sigmoid(np.asarray(gate, F))


def conv(m, w, hist):
    """m [n, ch], w [ch, kern], hist [kern-1, ch] -> y, new hist."""
    full = np.concatenate([np.asarray(hist, F), np.asarray(m, F)])
    kern, n = w.shape[1], m.shape[0]
    y = sum(full[j : j + n] * np.asarray(w, F)[:, j] for j in range(kern))
    return silu(y), full[n:]


def delta(qkv, z, a, b, a_log, dt_bias, norm_w, S, hk, dk, dv, eps):
    """Everything of the op `delta` for one sequence: y [n, hv*dv], S [hv, dk, dv]."""
    qkv, z, a, b, S = (np.asarray(t, F) for t in (qkv, z, a, b, S))
    n, hv = a.shape
    q = qkv[:, : hk * dk].reshape(n, hk, dk)
    k = qkv[:, hk * dk : 2 * hk * dk].reshape(n, hk, dk)
    v = qkv[:, 2 * hk * dk :].reshape(n, hv, dv)
    q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6) / np.sqrt(dk)
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    alpha = np.exp(-np.exp(np.asarray(a_log, F)) * softplus(a + dt_bias))
    beta = sigmoid(b)
    S, out = S.copy(), np.empty((n, hv, dv))
    for t in range(n):
        for h in range(hv):
            kk, qq = k[t, h // (hv // hk)], q[t, h // (hv // hk)]
            S[h] *= alpha[t, h]
            S[h] += np.outer(kk, beta[t, h] * (v[t, h] - kk @ S[h]))
            out[t, h] = qq @ S[h]
    y = rmsnorm(out, norm_w, eps) * silu(z.reshape(n, hv, dv))
    return y.reshape(n, -1), S, out.reshape(n, -1)


def route(logits, k, sigmoid_score=False, renorm=True, eps=0.0, scale=1.0, bias=None,
          n_group=1, topk_group=1):  # fmt: skip
    """One row: ids by falling choice score, equal scores by rising id; float64 weights."""
    logits = np.asarray(logits, F)
    p = sigmoid(logits) if sigmoid_score else np.exp(logits - logits.max())
    score = p if sigmoid_score else logits
    choice = score + (0 if bias is None else np.asarray(bias, F))
    if n_group > 1:
        by_group = choice.reshape(n_group, -1)
        best = np.sort(by_group, 1)[:, -2:].sum(1)
        keep = np.argsort(-best, kind="stable")[:topk_group]
        choice = np.where(np.isin(np.arange(n_group), keep)[:, None], by_group, -np.inf).ravel()
    ids = np.argsort(-choice, kind="stable")[:k]
    w = p[ids]
    if renorm:
        w = w / (w.sum() + eps)
    elif not sigmoid_score:
        w = w / p.sum()
    return ids, w * scale
