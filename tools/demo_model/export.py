"""Write and read the BF16 checkpoint in the family's layout (fused experts, prefix `model.language_model.`).

    python -m tools.demo_model.export SHARDS_DIR TOKENIZER.json OUT_DIR [--card MODEL_CARD.md ...]

joins the shards of a training run and adds tokenizer, chat template and generation config.
"""

import argparse
import glob
import json
import os
import shutil

import torch
from safetensors.torch import load_file, save_file

from .config import ModelConfig
from .model import LanguageModel
from .tokenizer import tokenizer_config, unmark_special

SHARD_BYTES = 15 * 2**20
GENERATION = {"bos_token_id": None, "eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": True, "temperature": 0.7,
              "top_p": 0.9, "top_k": 40}


def to_family(state):
    """Training state dict -> checkpoint names and dtypes: BF16, but A_log and linear_attn.norm float32."""
    out = {}
    for name, value in state.items():
        new = "model.language_model." + name[len("model."):] if name.startswith("model.") else name
        keep = name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))
        out[new] = value.detach().to("cpu", torch.float32 if keep else torch.bfloat16).contiguous()
    return out


def from_family(tensors):
    """Checkpoint names -> training names, float32."""
    return {name.replace("model.language_model.", "model.", 1): value.float() for name, value in tensors.items()}


def write_shards(tensors, out_dir):
    """Save as few shards of at most 15 MiB as possible, evenly filled, with their index."""
    size = {k: v.numel() * v.element_size() for k, v in tensors.items()}
    count = -(-sum(size.values()) // SHARD_BYTES)
    shards, filled = [{} for _ in range(count)], [0] * count
    for name in sorted(tensors, key=lambda k: (-size[k], k)):
        i = filled.index(min(filled))
        shards[i][name] = tensors[name]
        filled[i] += size[name]
    os.makedirs(out_dir, exist_ok=True)
    for old in glob.glob(os.path.join(out_dir, "model-*.safetensors")):
        os.remove(old)
    where = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        save_file(shard, os.path.join(out_dir, name), metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, name))
    with open(os.path.join(out_dir, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": sum(size.values())}, "weight_map": dict(sorted(where.items()))}, f, indent=1)


def load_tensors(folder):
    """All tensors of a checkpoint directory by name."""
    tensors = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        tensors.update(load_file(path))
    return tensors


def load_model(folder, device="cpu"):
    """Checkpoint directory -> LanguageModel in float32, evaluation mode."""
    with open(os.path.join(folder, "config.json")) as f:
        model = LanguageModel(ModelConfig.from_checkpoint(json.load(f)))
    model.load_state_dict(from_family(load_tensors(folder)))
    return model.to(device).eval()


def write_metadata(out_dir, config, tokenizer_path, extra_files=()):
    """Everything of a checkpoint but the weights."""
    with open(tokenizer_path, encoding="utf-8") as f:
        tokenizer = unmark_special(json.load(f))
    documents = {"config.json": config.checkpoint_config(), "generation_config.json": GENERATION,
                 "tokenizer_config.json": tokenizer_config()}
    for name, value in documents.items():
        with open(os.path.join(out_dir, name), "w", encoding="utf-8") as f:
            json.dump(value, f, ensure_ascii=False, indent=2)
            f.write("\n")
    with open(os.path.join(out_dir, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(tokenizer, f, ensure_ascii=False)
    for path in extra_files:
        shutil.copy(path, out_dir)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shards_dir")
    parser.add_argument("tokenizer")
    parser.add_argument("out_dir")
    parser.add_argument("--extra", nargs="*", default=[], help="files to copy beside the weights")
    args = parser.parse_args()
    with open(os.path.join(args.shards_dir, "config.json")) as f:
        config = ModelConfig.from_checkpoint(json.load(f))
    write_shards(load_tensors(args.shards_dir), args.out_dir)
    write_metadata(args.out_dir, config, args.tokenizer, args.extra)


if __name__ == "__main__":
    main()
