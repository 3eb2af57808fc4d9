"""Golden values of the demo model: logits from the NumPy float64 oracle, checked against transformers (float32).

    python -m tools.demo_model.goldens BF16_DIR tests/golden/demo

Needs torch and transformers; the test suite only reads the result.
"""

import argparse
import datetime
import glob
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np

PROMPTS = {
    "story": "Once upon a time there was a",
    "chat": "<|im_start|>user\nWhat is the capital of Italy?<|im_end|>\n<|im_start|>assistant\n",
    "prose": "It is the duty of the Congress to",
}
GREEDY = 12  # tokens continued from each prompt


def transformers_logits(folder, sequences):
    """float32 logits of Qwen3_5MoeForCausalLM.from_pretrained -> list of arrays, and the missing/unexpected keys."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager",
                                                       output_loading_info=True)
    with torch.no_grad():
        logits = [model.eval()(torch.tensor([ids])).logits[0].numpy() for ids in sequences]
    return logits, type(model).__name__, {k: sorted(info[k]) for k in ("missing_keys", "unexpected_keys")}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out")
    args = parser.parse_args()
    root = Path(__file__).resolve().parents[2]
    sys.path.insert(0, str(root / "tests"))
    import tokenizers
    import torch
    import transformers
    from oracle import model as oracle_model

    tokenizer = tokenizers.Tokenizer.from_file(f"{args.model}/tokenizer.json")
    arrays, sequences, oracles = {}, [], []
    for name, text in PROMPTS.items():
        oracle = oracle_model.load(args.model)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        rows = list(oracle.forward(np.array(ids)))
        tokens = []
        for _ in range(GREEDY):
            tokens.append(int(rows[-1].argmax()))
            rows += list(oracle.forward(np.array(tokens[-1:])))
        arrays[f"{name}.ids"] = np.array(ids, np.int32)
        arrays[f"{name}.greedy_tokens"] = np.array(tokens, np.int32)
        arrays[f"{name}.logits_f64"] = np.array(rows, np.float64).astype(np.float32)
        sequences.append(ids + tokens)
        oracles.append(arrays[f"{name}.logits_f64"])
        print(repr(text), "->", repr(tokenizer.decode(tokens, skip_special_tokens=False)))
    hf, cls, info = transformers_logits(args.model, sequences)
    difference = max(float(np.abs(a - b).max()) for a, b in zip(hf, oracles))
    two_best = [np.sort(r, -1)[len(i) - GREEDY - 1:-1] for r, i in zip(oracles, sequences)]
    os.makedirs(args.out, exist_ok=True)
    np.savez_compressed(f"{args.out}/golden.npz", **arrays)
    sha = {os.path.basename(p): hashlib.sha256(Path(p).read_bytes()).hexdigest()
           for p in sorted(glob.glob(f"{args.model}/*.safetensors"))}
    record = {
        "command": "python -m tools.demo_model.goldens", "date": datetime.date.today().isoformat(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__,
                     "tokenizers": tokenizers.__version__},
        "transformers_class": cls, "transformers_loading": info, "prompts": PROMPTS,
        "transformers_vs_oracle": difference, "largest_logit": float(max(np.abs(o).max() for o in oracles)),
        "greedy_gap": float(min((r[:, -1] - r[:, -2]).min() for r in two_best)), "sha256": sha}
    with open(f"{args.out}/golden.json", "w") as f:
        json.dump(record, f, indent=1)
        f.write("\n")
    print("transformers vs oracle", difference, info)


if __name__ == "__main__":
    main()
