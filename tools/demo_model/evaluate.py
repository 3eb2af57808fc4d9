"""Measure the demo model: perplexity, exactness, expert load, fewer experts; through our engine or through torch.

    python -m tools.demo_model.evaluate MODEL_DIR --backend engine --k 1 2 4 8 16 --out results.json

MODEL_DIR may be the packed model or the BF16 checkpoint (torch reads the latter only).  Held-out text comes from
heldout/*.u16 beside this file (sources whose licence permits it) or from --val (a folder of val_*.u16); generated
held-out text and cases are drawn from seeds that training never uses.
"""

import argparse
import glob
import json
import math
import os
import time

import numpy as np

from .cases import judge, make_cases
from .synth import HELD_OUT_SEED, KINDS, generate

HELD_OUT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "heldout")
MAX_ANSWER = {"tool": 140, "unseen tool": 140, "json": 140, "qa": 60}


class EngineBackend:
    """flashmoe.Engine behind the interface that the measurements use (see torch_backend.TorchBackend)."""

    name = "engine"

    def __init__(self, folder, k=None):
        from flashmoe import Engine

        self.engine = Engine(folder, experts_per_token=k)

    def encode(self, text):
        from tokenizers import Tokenizer

        if not hasattr(self, "tokenizer"):
            self.tokenizer = Tokenizer.from_file(os.path.join(str(self.engine.path), "tokenizer.json"))
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def logits(self, ids):
        return np.asarray(self.engine.logits(ids))

    def generate(self, prompt, max_tokens, expected=None):
        """Greedy text; `expected` only helps the torch backend."""
        result = self.engine.generate(self.encode(prompt), max_tokens=max_tokens, temperature=0)
        return self.tokenizer.decode([t for t in result.token_ids if t not in (0, 2)], skip_special_tokens=False)

    def close(self):
        self.engine.close()


def log_loss(logits, targets):
    """Sum of -log P(target); logits (n, vocab), targets (n,)."""
    x = logits.astype(np.float64)
    top = x.max(-1)
    return float((np.log(np.exp(x - top[:, None]).sum(-1)) + top - x[np.arange(len(x)), targets]).sum())


def perplexity(backend, streams, window, windows):
    """{source: (perplexity, tokens)} over the first `windows` windows of each stream, and the pooled value."""
    result, loss_sum, count = {}, 0.0, 0
    for name, ids in streams.items():
        loss, n = 0.0, 0
        for at in range(0, min(len(ids) - 1, window * windows), window):
            piece = [int(i) for i in ids[at:at + window + 1]]
            if len(piece) > 1:
                loss += log_loss(backend.logits(piece[:-1]), np.array(piece[1:]))
                n += len(piece) - 1
        result[name] = {"perplexity": round(math.exp(loss / n), 3), "tokens": n}
        loss_sum, count = loss_sum + loss, count + n
    return result, round(math.exp(loss_sum / count), 3)


def exactness(backend, kind, n, failures=None):
    """Share of valid and of exactly right greedy answers on `n` held-out cases."""
    valid = exact = 0
    for case in make_cases(kind, n):
        text = backend.generate(case.prompt, MAX_ANSWER[kind], case.answer)
        ok, same = judge(case, text)
        valid, exact = valid + ok, exact + same
        if not same and failures is not None:
            failures.append({"kind": kind, "expected": case.answer, "got": text})
    return {"cases": n, "valid": round(valid / n, 3), "exact": round(exact / n, 3)}


def real_streams(folder):
    """val_NAME.u16 or NAME.u16 of a folder -> {NAME: ids}"""
    paths = glob.glob(os.path.join(folder, "val_*.u16")) or glob.glob(os.path.join(folder, "*.u16"))
    return {os.path.basename(p)[:-4].removeprefix("val_"): np.fromfile(p, "<u2") for p in sorted(paths)}


def generated_streams(backend, n_docs):
    """Held-out generated text, documents closed by <|endoftext|> as in training -> {kind: ids}"""
    result = {}
    for kind in KINDS:
        docs = [backend.encode(generate(kind, HELD_OUT_SEED + i)) + [0] for i in range(n_docs)]
        result[kind] = np.concatenate(docs)
    return result


def open_backend(name, folder, k):
    if name == "engine":
        return EngineBackend(folder, k)
    from .torch_backend import TorchBackend

    return TorchBackend(folder, k)


def measure(args, k, first):
    """All numbers for one number of active experts; the first (trained) K gets all kinds of cases."""
    started = time.time()
    backend = open_backend(args.backend, args.model, k)
    streams = real_streams(args.val)
    out, failures = {}, []
    out["real text"], out["real text, pooled"] = perplexity(backend, streams, args.window, args.windows)
    out["generated text"], _ = perplexity(backend, generated_streams(backend, args.docs), args.window, args.windows)
    for kind in args.kinds:
        n = args.cases if first else args.cases // 2
        if n:
            out[kind] = exactness(backend, kind, n, failures)
    if first and hasattr(backend, "expert_load"):
        pieces = [[int(i) for i in ids[:args.window]] for ids in [*streams.values(), *generated_streams(backend, 4).values()]]
        out["expert load"], out["experts in use"] = backend.expert_load(pieces)
        out["draft acceptance"] = {
            "real text": round(float(np.mean([backend.draft_acceptance(p) for p in pieces[:-len(KINDS)]])), 3),
            "generated text": round(float(np.mean([backend.draft_acceptance(p) for p in pieces[-len(KINDS):]])), 3)}
    if hasattr(backend, "close"):
        backend.close()
    out["seconds"] = round(time.time() - started, 1)
    return out, failures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model")
    add("--backend", choices=["engine", "torch"], default="engine")
    add("--k", type=int, nargs="*", default=[], help="active experts per token; the default is the trained number alone")
    add("--val", default=HELD_OUT, help="folder of held-out .u16 streams")
    add("--cases", type=int, default=100, help="cases per kind at the trained K, half of it elsewhere")
    add("--kinds", nargs="*", default=list(MAX_ANSWER), help="kinds of cases")
    add("--docs", type=int, default=20, help="generated held-out documents per kind")
    add("--window", type=int, default=1024)
    add("--windows", type=int, default=64, help="at most so many windows per source at the trained K")
    add("--out", help="JSON file for all numbers")
    args = parser.parse_args()
    with open(os.path.join(args.model, "config.json")) as f:
        config = json.load(f)
    trained = config.get("text_config", config)["num_experts_per_tok"]
    results = {"backend": args.backend, "trained K": trained, "K": {}}
    for k in [trained, *(k for k in args.k if k != trained)]:
        out, failures = measure(args, k, k == trained)
        results["K"][k] = out
        if k == trained:
            results["failures"] = failures
        print(f"K = {k}:", {n: v for n, v in out.items() if n not in ("real text", "expert load")}, flush=True)
        if args.out:
            with open(args.out, "w") as f:
                json.dump(results, f, indent=1)
                f.write("\n")


if __name__ == "__main__":
    main()
