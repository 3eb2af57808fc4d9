"""Before spending GPU time: do the kernels agree with plain definitions in float64, and how large is the error?

    python -m tools.demo_model.check_gpu

Prints ||out - ref|| / ||ref|| of the DeltaNet output and its five gradients, and of the logits of a fresh full model.
Works without a GPU too (then it checks the chunked form on the CPU).
"""

import torch

from .config import ModelConfig
from .gdn import gated_delta_recurrence, gated_delta_rule
from .model import LanguageModel


def relative(a, b):
    """||a - b|| / ||b|| as float, in float64 on the CPU."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm()).item()


def delta_inputs(seed=0, batch=2, tokens=256, key_heads=2, heads=4, dk=64, dv=64):
    """Random q, k, v, g, beta (float64); 50 equal keys in a row, the hard case for the triangular inverse."""
    r = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(batch, tokens, key_heads, dk, generator=r, dtype=torch.float64) for _ in range(2))
    k[:, 40:90] = k[:, 40:41]
    v = torch.randn(batch, tokens, heads, dv, generator=r, dtype=torch.float64)
    g, beta = (torch.rand(batch, tokens, heads, generator=r, dtype=torch.float64) for _ in range(2))
    return q, k, v, -0.5 * g, beta


def run(function, inputs, device, dtype):
    """-> [output, five gradients] of a fixed scalar of the output"""
    x = [t.detach().clone().to(device, dtype).requires_grad_() for t in inputs]
    out = function(*x)
    (out * torch.linspace(-1, 1, out.shape[-1], device=device, dtype=out.dtype)).sum().backward()
    return [out, *(t.grad for t in x)]


def check_delta(device):
    """Relative errors per float32 matmul precision."""
    inputs = delta_inputs()
    reference = run(gated_delta_recurrence, inputs, "cpu", torch.float64)
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        result = run(gated_delta_rule, inputs, device, torch.float32)
        print("delta rule", device, precision, " ".join(f"{relative(a, b):.1e}" for a, b in zip(result, reference)))


def check_model(device):
    """Logits: device under BF16 autocast against CPU float32."""
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig())
    for name, p in model.named_parameters():
        if p.dim() >= 2 and "conv1d" not in name:
            p.data.mul_(2)
    ids = torch.randint(0, model.c.vocab_size, (2, 192))
    with torch.no_grad():
        reference = model(ids)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            out = model.to(device)(ids.to(device))
    print("logits", device, f"{relative(out, reference):.1e}")


if __name__ == "__main__":
    where = "cuda" if torch.cuda.is_available() else "cpu"
    check_delta(where)
    check_model(where)
