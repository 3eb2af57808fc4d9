"""Muon for the matrices of the hidden layers, AdamW for embeddings, head, routers, norms and scalars."""

import torch


def orthogonalize(x):
    """Newton-Schulz iteration: x [..., m, n] -> a matrix with singular values near 1 (Jordan et al., Muon)."""
    y = x.bfloat16() if x.is_cuda else x.float()
    tall = y.shape[-2] > y.shape[-1]
    y = y.mT if tall else y
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        q = y @ y.mT
        y = 3.4445 * y + (-4.7750 * q + 2.0315 * q @ q) @ y
    return (y.mT if tall else y).float()


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised update; leading dimensions (experts) are a batch, equal shapes run together."""

    def __init__(self, params, lr, weight_decay, momentum=0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                by_shape.setdefault(tuple(p.shape[-2:]), []).append((p, update))
            for (rows, cols), items in by_shape.items():
                updates = orthogonalize(torch.cat([u.reshape(-1, rows, cols) for _, u in items]))
                scale = group["lr"] * max(1, rows / cols) ** 0.5
                at = 0
                for p, u in items:
                    n = u.numel() // (rows * cols)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(updates[at:at + n].reshape(p.shape), alpha=-scale)
                    at += n


def make_optimizers(named_params, lr_muon=0.006, lr_adam=3e-3, weight_decay=0.1, fused=False):
    """Split (name, parameter) pairs by kind -> [AdamW, Muon]; scalars and norms are not decayed."""
    matrices, tables, scalars = [], [], []
    for name, p in named_params:
        if p.dim() < 2:
            scalars.append(p)
        elif any(part in name for part in ("conv1d", "embed_tokens", "lm_head", "mlp.gate.", "shared_expert_gate")):
            tables.append(p)
        else:
            matrices.append(p)
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": scalars, "weight_decay": 0.0}]
    groups = [g for g in groups if g["params"]]
    adam = torch.optim.AdamW(groups, lr=lr_adam, betas=(0.9, 0.95), eps=1e-10, fused=fused)
    return [adam, Muon(matrices, lr_muon, weight_decay)]
