"""`qwen3_5_moe` in plain torch, for training.  Parameter names are transformers' names (prefix `model.`), plus `mtp.*`.

Routed experts are computed densely and masked by the routing weights: with E * I = 2048 that costs less than sorting
tokens, and torch.compile sees nothing but matrix products.  Norm weights are zero-centred (1 + w) except
`linear_attn.norm`, as in the family.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .gdn import CHUNK, gated_delta_rule


class Routing(NamedTuple):
    """What a MoE layer reports for the losses and the log."""

    balance: torch.Tensor  # scalar; E/K * sum_e load_e * mean_prob_e, 1.0 = even
    z: torch.Tensor        # scalar; mean squared log-sum-exp of the router logits
    load: torch.Tensor     # [E] share of tokens that use expert e


def _rms(x, eps):
    y = x.float()
    return y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)


class RMSNorm(nn.Module):
    """x / rms(x) * (1 + weight)"""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x):
        return (_rms(x, self.eps) * (1.0 + self.weight.float())).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """x / rms(x) * weight * silu(z)"""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x, z):
        return (self.weight * _rms(x, self.eps) * F.silu(z.float())).to(z.dtype)


def linear(n_in, n_out):
    return nn.Linear(n_in, n_out, bias=False)


class GatedDeltaNet(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.k_size = c.linear_num_key_heads * c.linear_key_head_dim
        self.v_size = c.linear_num_value_heads * c.linear_value_head_dim
        heads, channels, kernel = c.linear_num_value_heads, 2 * self.k_size + self.v_size, c.linear_conv_kernel_dim
        self.in_proj_qkv = linear(c.hidden_size, channels)
        self.in_proj_z = linear(c.hidden_size, self.v_size)
        self.in_proj_b = linear(c.hidden_size, heads)
        self.in_proj_a = linear(c.hidden_size, heads)
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels, bias=False, padding=kernel - 1)
        self.dt_bias = nn.Parameter(torch.ones(heads))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(0.01, 16).log())
        self.norm = GatedRMSNorm(c.linear_value_head_dim, c.rms_norm_eps)
        self.out_proj = linear(self.v_size, c.hidden_size)

    def forward(self, x):  # [b, t, H] -> [b, t, H]
        c, (batch, tokens, _) = self.c, x.shape
        dk, dv, kernel = c.linear_key_head_dim, c.linear_value_head_dim, c.linear_conv_kernel_dim
        mixed, z, b, a = self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)
        taps, padded = self.conv1d.weight.to(mixed.dtype)[:, 0], F.pad(mixed, (0, 0, kernel - 1, 0))
        mixed = F.silu(sum(padded[:, i:i + tokens] * taps[:, i] for i in range(kernel)))
        q, k, v = mixed.split([self.k_size, self.k_size, self.v_size], -1)
        with torch.autocast(x.device.type, enabled=False):
            g = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias)
            beta = b.float().sigmoid()
            q, k = q.reshape(batch, tokens, -1, dk), k.reshape(batch, tokens, -1, dk)
            v = v.reshape(batch, tokens, -1, dv)
            pad = -tokens % CHUNK
            if pad:
                q, k, v = (F.pad(t, (0, 0, 0, 0, 0, pad)) for t in (q, k, v))
                g, beta = (F.pad(t, (0, 0, 0, pad)) for t in (g, beta))
            out = gated_delta_rule(q, k, v, g, beta)[:, :tokens]
            out = self.norm(out.reshape(-1, dv), z.reshape(-1, dv)).view(batch, tokens, -1)
        return self.out_proj(out)


class GatedAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        d = c.head_dim
        self.q_proj = linear(c.hidden_size, c.num_attention_heads * d * 2)  # per head: query, then gate
        self.k_proj = linear(c.hidden_size, c.num_key_value_heads * d)
        self.v_proj = linear(c.hidden_size, c.num_key_value_heads * d)
        self.o_proj = linear(c.num_attention_heads * d, c.hidden_size)
        self.q_norm, self.k_norm = RMSNorm(d, c.rms_norm_eps), RMSNorm(d, c.rms_norm_eps)

    @staticmethod
    def rotate(x, cos, sin):
        """Rotate the first cos.shape[-1] dimensions of each head, pairs (i, i + half)."""
        turned, rest = x[..., :cos.shape[-1]], x[..., cos.shape[-1]:]
        a, b = turned.chunk(2, -1)
        return torch.cat([turned * cos[:, None] + torch.cat([-b, a], -1) * sin[:, None], rest], -1)

    def forward(self, x, cos, sin):  # [b, t, H] -> [b, t, H]
        batch, tokens, _ = x.shape
        d = self.c.head_dim
        q, gate = self.q_proj(x).view(batch, tokens, -1, 2 * d).chunk(2, -1)
        v = self.v_proj(x).view(batch, tokens, -1, d)
        q = self.rotate(self.q_norm(q), cos, sin).to(v.dtype)
        k = self.rotate(self.k_norm(self.k_proj(x).view(batch, tokens, -1, d)), cos, sin).to(v.dtype)
        groups = q.shape[2] // k.shape[2]
        q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, tokens, -1)
        return self.o_proj(out * torch.sigmoid(gate.reshape(batch, tokens, -1)))


class Router(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(c.num_experts, c.hidden_size))


class Experts(nn.Module):
    """Fused expert weights: gate_up_proj [E, 2I, H] (gate rows first), down_proj [E, H, I]."""

    def __init__(self, c):
        super().__init__()
        e, i, h = c.num_experts, c.moe_intermediate_size, c.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down_proj = nn.Parameter(torch.empty(e, h, i))


class MLP(nn.Module):
    def __init__(self, size, inner):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = linear(size, inner), linear(size, inner), linear(inner, size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SparseMoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, self.k = c, c.num_experts_per_tok
        self.gate, self.experts = Router(c), Experts(c)
        self.shared_expert = MLP(c.hidden_size, c.shared_expert_intermediate_size)
        self.shared_expert_gate = linear(c.hidden_size, 1)

    def forward(self, x):  # [b, t, H] -> ([b, t, H], Routing)
        n_experts, inner, shape = self.c.num_experts, self.c.moe_intermediate_size, x.shape
        x = x.reshape(-1, shape[-1])
        with torch.autocast(x.device.type, enabled=False):  # routing decisions in float32
            logits = F.linear(x.float(), self.gate.weight.float())
            prob = logits.softmax(-1)
            top, ids = prob.topk(self.k, -1)
            weights = torch.zeros_like(prob).scatter(-1, ids, top / top.sum(-1, keepdim=True))  # [n, E]
            load = (weights > 0).float().mean(0)
            balance = n_experts / self.k * (load.detach() * prob.mean(0)).sum()
            z = torch.logsumexp(logits, -1).pow(2).mean()
        gate_up = F.linear(x, self.experts.gate_up_proj.reshape(n_experts * 2 * inner, -1)).view(-1, n_experts, 2, inner)
        act = F.silu(gate_up[:, :, 0]) * gate_up[:, :, 1] * weights.to(gate_up.dtype)[..., None]
        out = F.linear(act.reshape(-1, n_experts * inner),
                       self.experts.down_proj.permute(1, 0, 2).reshape(-1, n_experts * inner))
        out = out + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return out.view(shape), Routing(balance, z, load)


class Block(nn.Module):
    def __init__(self, c, full_attention):
        super().__init__()
        self.full_attention = full_attention
        if full_attention:
            self.self_attn = GatedAttention(c)
        else:
            self.linear_attn = GatedDeltaNet(c)
        self.mlp = SparseMoE(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x, cos, sin):
        h = self.input_layernorm(x)
        x = x + (self.self_attn(h, cos, sin) if self.full_attention else self.linear_attn(h))
        y, routing = self.mlp(self.post_attention_layernorm(x))
        return x + y, routing


class TextModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, kind == "full_attention") for kind in c.layer_types)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class MTP(nn.Module):
    """Drafts token t+2 from the final hidden state at t and the token at t+1; shares embedding and head."""

    def __init__(self, c):
        super().__init__()
        self.fc = linear(2 * c.hidden_size, c.hidden_size)
        self.pre_fc_norm_embedding = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.pre_fc_norm_hidden = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.layers = nn.ModuleList([Block(c, True)])
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class LanguageModel(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.model, self.lm_head = TextModel(c), linear(c.hidden_size, c.vocab_size)
        self.mtp = MTP(c) if c.mtp_num_hidden_layers else None
        residual = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj")
        for name, p in self.named_parameters():
            if p.dim() >= 2 and "conv1d" not in name:
                nn.init.normal_(p, 0, 0.02)
            if name.endswith(residual):
                p.data.mul_(1 / math.sqrt(2 * c.num_hidden_layers))
        rot = int(c.head_dim * c.partial_rotary_factor)
        freq = 1.0 / (c.rope_theta ** (torch.arange(0, rot, 2).float() / rot))
        self.register_buffer("freq", freq, persistent=False)

    def set_experts_per_token(self, k):
        for block in self.model.layers:
            block.mlp.k = k

    def _angles(self, tokens, device):
        angle = torch.arange(tokens, device=device).float()[:, None] * self.freq
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    def hidden(self, ids):
        """ids [b, t] -> (final normed hidden [b, t, H], list of Routing per layer)"""
        x = self.model.embed_tokens(ids)
        if torch.is_autocast_enabled(ids.device.type):
            x = x.to(torch.get_autocast_dtype(ids.device.type))
        cos, sin = self._angles(ids.shape[1], ids.device)
        routings = []
        for block in self.model.layers:
            x, routing = block(x, cos, sin)
            routings.append(routing)
        return self.model.norm(x), routings

    def draft_hidden(self, hidden, next_ids):
        """MTP: hidden [b, t, H] of positions t and token ids [b, t] of positions t+1 -> (hidden for t+2, Routing)"""
        m = self.mtp
        e = self.model.embed_tokens(next_ids).detach().to(hidden.dtype)
        x = m.fc(torch.cat([m.pre_fc_norm_embedding(e), m.pre_fc_norm_hidden(hidden)], -1))
        x, routing = m.layers[0](x, *self._angles(next_ids.shape[1], next_ids.device))
        return m.norm(x), routing

    def forward(self, ids):
        """ids [b, t] -> logits [b, t, vocab]"""
        return self.lm_head(self.hidden(ids)[0])


def parameter_counts(model):
    """Parameters in total, in routed experts, and active per token (without embedding rows and MTP)."""
    c = model.c
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    mtp = sum(v for n, v in sizes.items() if n.startswith("mtp."))
    experts = sum(v for n, v in sizes.items() if ".experts." in n and not n.startswith("mtp."))
    total = sum(sizes.values())
    active = total - mtp - sizes["model.embed_tokens.weight"] - experts + experts * c.num_experts_per_tok // c.num_experts
    return {"total": total, "mtp": mtp, "routed_experts": experts, "active_per_token": active}
