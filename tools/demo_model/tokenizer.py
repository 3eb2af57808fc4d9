"""Train the byte-level BPE tokenizer: 6144 ids, NFC, the family's pre-tokenizer expression (one digit per piece).

    python -m tools.demo_model.tokenizer CORPUS.jsonl OUT_DIR

The rendered tokenizer.json has 9 added tokens.  Only the three that structure a conversation are "special";
tool-call and think markers are ordinary added tokens, as in the family, so decoding keeps them.
"""

import argparse
import json
import os
import random

from .chatformat import CHAT_TEMPLATE
from .synth import HELD_OUT_SEED, generate

VOCAB_SIZE = 6144
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
           r"\s*[\r\n]+|\s+(?!\S)|\s+")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MARKERS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
# share of the documents of a source that the BPE sees, so that no source dominates the merges
SHARE = {"sotu": .35, "moby-dick": 1, "austen": 1, "shakespeare+milton": .15, "web-bible": .3, "wordnet-glosses": .25,
         "postgresql-doc": .3, "python-doc": .3, "rust-books": .6, "rust-std": .3, "erlang-doc": .15, "sqlite-doc": .4,
         "django-doc": .3, "apache-doc": .3, "node-doc": .2, "devils-dictionary": 1, "jargon-file": .4}
SYNTHETIC = {"story": 7000, "qa": 3000, "tool": 1500, "json": 2000}


def training_texts(corpus):
    """Yield the texts the merges are learned from."""
    rng = random.Random(0)
    with open(corpus, encoding="utf-8") as f:
        for line in f:
            doc = json.loads(line)
            if rng.random() < SHARE.get(doc["src"], 0):
                yield doc["text"]
    for kind, n in SYNTHETIC.items():
        for i in range(n):
            yield generate(kind, HELD_OUT_SEED // 2 + i)


def unmark_special(tokenizer_json):
    """Make the tool and think markers ordinary added tokens (in place); the BPE trainer marks all as special."""
    for token in tokenizer_json["added_tokens"]:
        token["special"] = token["content"] in SPECIAL
    return tokenizer_json


def tokenizer_config():
    """The dict for tokenizer_config.json, chat template included."""
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>", "unk_token": None, "add_bos_token": False, "add_prefix_space": False,
            "clean_up_tokenization_spaces": False, "model_max_length": 4096, "chat_template": CHAT_TEMPLATE}


def main():
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus")
    parser.add_argument("out_dir")
    args = parser.parse_args()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(training_texts(args.corpus), trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=SPECIAL + MARKERS, min_frequency=5, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    os.makedirs(args.out_dir, exist_ok=True)
    with open(os.path.join(args.out_dir, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(unmark_special(json.loads(tokenizer.to_str())), f, ensure_ascii=False)
    with open(os.path.join(args.out_dir, "tokenizer_config.json"), "w", encoding="utf-8") as f:
        json.dump(tokenizer_config(), f, ensure_ascii=False, indent=1)


if __name__ == "__main__":
    main()
