"""Gated DeltaNet over whole sequences: chunked matrix products with exact gradients, no custom kernels.

Within a chunk of C tokens the recurrence is a unit lower triangular system (I + A) U = R.  Its inverse is built by
exact block doubling, log2(C) steps of two products each, and has a two-product backward, so autograd never walks
through the doubling.  Everything here runs in float32.
"""

import torch

CHUNK = 64


def _level_masks(n, device):
    """Masks of the block-doubling steps: level s couples the lower with the upper half of blocks of 2s rows."""
    i = torch.arange(n, device=device)
    masks, s = [], 1
    while s < n:
        same = (i[:, None] // (2 * s)) == (i[None] // (2 * s))
        masks.append(same & ((i[:, None] // s) > (i[None] // s)))
        s *= 2
    return masks


class UnitLowerInverse(torch.autograd.Function):
    """X = (I + A)^-1 for strictly lower triangular A [..., n, n]; dA = -X^T dX X^T below the diagonal."""

    @staticmethod
    def forward(ctx, a):
        masks = _level_masks(a.shape[-1], a.device)
        x = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device) - a * masks[0]
        for mask in masks[1:]:
            x = x - x @ ((a * mask) @ x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        xt = x.transpose(-1, -2)
        return -(xt @ grad @ xt).tril(-1)


def gated_delta_rule(q, k, v, g, beta, chunk=CHUNK):
    """Gated delta rule, all tokens at once.

    Parameters
    ----------
    q, k : tensor of shape (batch, tokens, key_heads, dk)
        Raw; normalised here (L2, and q scaled by dk**-0.5).
    v : tensor of shape (batch, tokens, value_heads, dv)
    g, beta : tensor of shape (batch, tokens, value_heads)
        Log decay (<= 0) and write strength (0..1).
    chunk : int
        Tokens per chunk; `tokens` must be a multiple.

    Returns
    -------
    tensor of shape (batch, tokens, value_heads, dv), float32
        Value head h reads key head h // (value_heads // key_heads).
    """
    batch, tokens, key_heads, dk = k.shape
    heads, dv = v.shape[2:]
    n, ratio = tokens // chunk, heads // key_heads
    q, k, v, g, beta = (x.float() for x in (q, k, v, g, beta))
    q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6) * dk**-0.5
    k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    q, k = (x.view(batch, n, chunk, key_heads, dk).permute(0, 3, 1, 2, 4) for x in (q, k))  # [b, hk, n, c, dk]
    v = v.view(batch, n, chunk, heads, dv).permute(0, 3, 1, 2, 4)
    g, beta = (x.view(batch, n, chunk, heads).permute(0, 3, 1, 2) for x in (g, beta))  # [b, h, n, c]

    decay = g.cumsum(-1)
    grown = decay.exp()
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    ratio_decay = (decay[..., :, None] - decay[..., None, :]).masked_fill(~lower, float("-inf")).exp()
    spread = (lambda x: x.repeat_interleave(ratio, 1)) if ratio > 1 else (lambda x: x)
    kk, qk = spread(k @ k.transpose(-1, -2)), spread(q @ k.transpose(-1, -2))
    k, q = spread(k), spread(q)
    inverse = UnitLowerInverse.apply((kk * ratio_decay * beta[..., None]).tril(-1))
    u = inverse @ (v * beta[..., None])
    w = inverse @ (k * (beta * grown)[..., None])
    qk = qk * ratio_decay
    last = decay[..., -1:]
    k_out = (k * (last - decay).exp()[..., None]).transpose(-1, -2)
    last = last.exp()[..., None]

    state = torch.zeros(batch, heads, dk, dv, device=q.device, dtype=torch.float32)
    states, writes = [], []
    for c in range(n):
        states.append(state)
        write = u[:, :, c] - w[:, :, c] @ state
        writes.append(write)
        state = state * last[:, :, c] + k_out[:, :, c] @ write
    out = (q * grown[..., None]) @ torch.stack(states, 2) + qk @ torch.stack(writes, 2)
    return out.permute(0, 2, 3, 1, 4).reshape(batch, tokens, heads, dv)


def gated_delta_recurrence(q, k, v, g, beta):
    """The same function, token by token: the plain definition that the tests and the GPU check compare with."""
    batch, tokens, key_heads, dk = k.shape
    heads, dv = v.shape[2:]
    q = q * torch.rsqrt((q * q).sum(-1, keepdim=True) + 1e-6) * dk**-0.5
    k = k * torch.rsqrt((k * k).sum(-1, keepdim=True) + 1e-6)
    q, k = (x.repeat_interleave(heads // key_heads, 2) for x in (q, k))
    state = q.new_zeros(batch, heads, dk, dv)
    out = []
    for t in range(tokens):
        state = state * g[:, t].exp()[..., None, None]
        error = (v[:, t] - (state * k[:, t, ..., None]).sum(-2)) * beta[:, t, ..., None]
        state = state + k[:, t, ..., None] * error[..., None, :]
        out.append((state * q[:, t, ..., None]).sum(-2))
    return torch.stack(out, 1)
