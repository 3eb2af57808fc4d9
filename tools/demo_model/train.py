"""Train the demo model.  The schedule follows the wall clock, so a run always ends on time with its rate decayed.

    python -m tools.demo_model.train --data STREAMS --out OUT --minutes 9 [--save ck.pt] [--resume ck.pt|OUT_DIR]
                                     [--part trunk|mtp] [--decay 0.45]

OUT receives BF16 shards with an index (each <= 15 MiB), config.json, metrics.json and log.txt, and again every
`--eval-every` seconds, so that a run that is cut off still leaves a model.  `--part mtp` trains the MTP block on the
frozen main model.
"""

import argparse
import json
import math
import os
import time

import torch
import torch.nn.functional as F

from .config import ModelConfig
from .data import Streams
from .export import from_family, load_tensors, to_family, write_shards
from .model import LanguageModel, parameter_counts
from .optim import make_optimizers

BALANCE, ROUTER_Z, CLIP = 0.01, 1e-3, 1.0  # loss weights of the router terms, gradient norm


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", required=True, help="folder of .u16 streams")
    add("--out", required=True)
    add("--minutes", type=float, required=True, help="from process start, compiling included")
    add("--part", choices=["trunk", "mtp"], default="trunk")
    add("--resume", help="checkpoint of --save (with optimizer) or an output folder (weights only)")
    add("--save", help="where to keep a float32 checkpoint with optimizer state")
    add("--tokens", type=int, default=131072, help="tokens per step")
    add("--micro", type=int, default=65536, help="tokens per forward pass")
    add("--window", type=int, default=1024)
    add("--warmup", type=float, default=0.02, help="share of the run")
    add("--decay", type=float, default=0.45, help="share of the run; 0 = constant rate")
    add("--lr-muon", type=float, default=0.006)
    add("--lr-adam", type=float, default=3e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--mixture", type=json.loads, help='synthetic shares, e.g. \'{"tool": 0.3}\'')
    add("--compile", type=int, default=1)
    add("--steps", type=int, default=10**9)
    add("--seed", type=int, default=0)
    add("--eval-every", type=float, default=110, help="seconds")
    add("--config", type=json.loads, default={}, help="overrides of ModelConfig")
    return parser.parse_args()


class Log:
    def __init__(self, folder):
        os.makedirs(folder, exist_ok=True)
        self.file = open(os.path.join(folder, "log.txt"), "a")

    def __call__(self, *words):
        line = " ".join(str(w) for w in words)
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def effective(load):
    """exp(entropy) of each row of `load` [layers, E]: how many experts are effectively in use."""
    p = load / load.sum(-1, keepdim=True)
    return torch.exp(-(p * (p + 1e-9).log()).sum(-1))


@torch.no_grad()
def validation(model, streams, window, autocast, rows=16):
    """Perplexity per real source on the first `rows` windows of its validation stream."""
    model.eval()
    result, device = {}, next(model.parameters()).device
    for name, stream in streams.items():
        n = min(rows, (len(stream) - 1) // window)
        if n:
            ids = torch.stack([stream[i * window:(i + 1) * window + 1] for i in range(n)]).long().to(device)
            with autocast():
                logits = model(ids[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            result[name] = round(math.exp(loss.item()), 2)
    model.train()
    return result


def losses(model, ids, part, autocast):
    """ids [b, window + 2] -> (cross entropy, balance, z, load [layers, E])"""
    with autocast():
        if part == "trunk":
            hidden, routing = model.hidden(ids[:, :-2])
            logits, labels = model.lm_head(hidden), ids[:, 1:-1]
        else:
            with torch.no_grad():
                hidden = model.hidden(ids[:, :-2])[0]
            hidden, routing = model.draft_hidden(hidden, ids[:, 1:-1])
            logits, labels, routing = F.linear(hidden, model.lm_head.weight.detach()), ids[:, 2:], [routing]
    ce = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
    mean = lambda name: torch.stack([getattr(r, name) for r in routing]).mean()
    return ce, mean("balance"), mean("z"), torch.stack([r.load for r in routing])


def rate(share, warmup, decay):
    """Learning-rate factor at `share` (0..1) of the run: linear up, flat, linear down."""
    if share < warmup:
        return min(1.0, share / warmup + 0.02)
    return 1.0 if share < 1 - decay else max(0.02, (1 - share) / decay)


class Run:
    """Model, optimizers and data of one training run."""

    def __init__(self, args, log):
        self.args, self.log, self.started = args, log, time.time()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")
        self.config = ModelConfig(**args.config)
        self.model = LanguageModel(self.config).to(self.device)
        self.plain = LanguageModel(self.config).to(self.device)  # never compiled: for validation shapes
        self.seen = 0
        named = [(n, p) for n, p in self.model.named_parameters() if n.startswith("mtp.") == (args.part == "mtp")]
        for n, p in self.model.named_parameters():
            p.requires_grad_(n.startswith("mtp.") == (args.part == "mtp"))
        self.params = [p for _, p in named]
        self.optimizers = make_optimizers(named, args.lr_muon, args.lr_adam, args.weight_decay, self.device == "cuda")
        if args.resume:
            self.resume(args.resume)
        self.base = [[g.setdefault("base_lr", g["lr"]) for g in o.param_groups] for o in self.optimizers]
        self.streams = Streams(args.data, self.device, args.seed + self.seen % 100003, args.mixture)
        log("parameters", parameter_counts(self.model), "device", self.device)
        log("mixture", {k: (round(w, 3), round(len(self.streams.train[k]) / 1e6, 2)) for k, w in self.streams.weights.items()})
        if args.compile and self.device == "cuda":
            for block in [*self.model.model.layers, *self.model.mtp.layers]:
                block.compile(dynamic=False)
        self.load = torch.zeros(self.config.num_hidden_layers if args.part == "trunk" else 1, self.config.num_experts,
                                device=self.device)

    def autocast(self):
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device == "cuda")

    def resume(self, path):
        if os.path.isdir(path):
            self.model.load_state_dict(from_family(load_tensors(path)))
            with open(os.path.join(path, "metrics.json")) as f:
                self.seen = json.load(f)["tokens"]
        else:
            saved = torch.load(path, map_location=self.device)
            self.model.load_state_dict(saved["model"])
            self.seen = saved["tokens"]
            if saved["part"] == self.args.part:
                for optimizer, state in zip(self.optimizers, saved["optimizers"]):
                    optimizer.load_state_dict(state)
        self.log("resumed", path, "at tokens", self.seen)

    def save(self, metrics):
        write_shards(to_family(self.model.state_dict()), self.args.out)
        for name, value in (("config.json", self.config.checkpoint_config()), ("metrics.json", metrics)):
            with open(os.path.join(self.args.out, name), "w") as f:
                json.dump(value, f, indent=1)
        if self.args.save:
            torch.save({"model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
                        "tokens": self.seen, "part": self.args.part}, self.args.save)

    def step(self, factor):
        """One optimizer step; returns (loss, balance, gradient norm) as tensors."""
        args = self.args
        for optimizer, rates in zip(self.optimizers, self.base):
            for group, base in zip(optimizer.param_groups, rates):
                group["lr"] = base * factor
        rows = args.micro // args.window
        passes = max(1, args.tokens // args.micro)
        total, even = 0.0, 0.0
        for _ in range(passes):
            ids = self.streams.batch(rows, args.window, extra=2)
            ce, balance, z, load = losses(self.model, ids, args.part, self.autocast)
            ((ce + BALANCE * balance + ROUTER_Z * z) / passes).backward()
            total, even = total + ce.detach() / passes, even + balance.detach() / passes
        norm = torch.nn.utils.clip_grad_norm_(self.params, CLIP)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.load.mul_(0.95).add_(load.detach(), alpha=0.05)
        self.seen += rows * args.window * passes
        return total, even, norm

    def warm_up(self):
        """Compile outside the schedule: one forward and backward pass, no step."""
        ids = self.streams.batch(self.args.micro // self.args.window, self.args.window, extra=2)
        ce, balance, z, _ = losses(self.model, ids, self.args.part, self.autocast)
        (ce + BALANCE * balance + ROUTER_Z * z).backward()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.log(f"ready after {time.time() - self.started:.1f} s, loss {ce.item():.3f}")

    def train(self):
        args, log = self.args, self.log
        self.warm_up()
        begin = last_eval = time.time()
        budget, first, step, curve = args.minutes * 60 - (begin - self.started), self.seen, 0, []
        while True:
            share = max((time.time() - begin) / budget, step / args.steps)
            if share >= 1:
                break
            factor = rate(share, args.warmup, args.decay)
            loss, balance, norm = self.step(factor)
            step += 1
            if step % 20 == 0 or step < 4:
                used = effective(self.load)
                seconds = time.time() - begin
                curve.append([self.seen, round(float(loss), 4)])
                log(f"step {step} {seconds:.0f} s loss {float(loss):.4f} balance {float(balance):.3f} norm {float(norm):.2f} "
                    f"rate {factor:.3f} Mtok {self.seen / 1e6:.1f} ktok/s {(self.seen - first) / 1e3 / seconds:.0f} "
                    f"experts in use min {used.min():.1f} mean {used.mean():.1f}")
            if time.time() - last_eval > args.eval_every:
                self.checkpoint(curve, step, begin)
                last_eval = time.time()
        self.checkpoint(curve, step, begin)
        log(f"done after {time.time() - self.started:.0f} s")

    def checkpoint(self, curve, step, begin):
        """Save weights and metrics; log validation perplexities of the main model."""
        self.plain.load_state_dict(self.model.state_dict())
        val = validation(self.plain, self.streams.val, self.args.window, self.autocast)
        geometric = math.exp(sum(math.log(v) for v in val.values()) / max(1, len(val)))
        self.log(f"validation geometric mean {geometric:.2f}", val)
        self.save({"part": self.args.part, "steps": step, "tokens": self.seen, "seconds": round(time.time() - begin, 1),
                   "validation": val, "curve": curve, "mixture": self.streams.weights,
                   "experts_in_use": [round(float(v), 2) for v in effective(self.load)]})


def main():
    args = parse_args()
    Run(args, Log(args.out)).train()


if __name__ == "__main__":
    main()
