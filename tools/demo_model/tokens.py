"""Turn text into flat token streams (`NAME.u16`, little-endian uint16, every document closed by <|endoftext|> = 0).

    python -m tools.demo_model.tokens real  TOKENIZER.json OUT_DIR CORPUS.jsonl
    python -m tools.demo_model.tokens synth TOKENIZER.json OUT_DIR story=200000 qa=300000 tool=300000 json=300000

Real sources: every 100th document goes to val_NAME.u16.  Generated kinds need no validation file; measurements draw
held-out seeds instead.
"""

import argparse
import json
import os
import random
from multiprocessing import Pool

import numpy as np

from .synth import generate

END = 0
_tokenizer = None


def _start(path):
    global _tokenizer
    from tokenizers import Tokenizer

    _tokenizer = Tokenizer.from_file(path)


def _encode(texts):
    ids = [np.array([*e.ids, END], dtype="<u2") for e in _tokenizer.encode_batch(texts, add_special_tokens=False)]
    return ids, sum(len(t.encode()) for t in texts)


def _generate(job):
    kind, first, last = job
    return _encode([generate(kind, seed) for seed in range(first, last)])


def split_document(text, limit=6000):
    """Cut a long text at paragraph borders into pieces of about `limit` characters."""
    pieces, current = [], ""
    for paragraph in text.split("\n\n"):
        if current and len(current) + len(paragraph) > limit:
            pieces.append(current)
            current = ""
        current += ("\n\n" if current else "") + paragraph
    return [*pieces, current] if current else pieces


def _write(path, parts):
    stream = np.concatenate(parts) if parts else np.zeros(0, "<u2")
    stream.tofile(path)
    return len(stream)


def pack_real(pool, out_dir, corpus):
    """Write one training and one validation stream per source of the corpus file."""
    docs = {}
    with open(corpus, encoding="utf-8") as f:
        for line in f:
            doc = json.loads(line)
            docs.setdefault(doc["src"], []).extend(split_document(doc["text"]))
    for source, texts in docs.items():
        random.Random(0).shuffle(texts)
        ids, n_bytes = [], 0
        for part, n in pool.imap(_encode, [texts[i:i + 64] for i in range(0, len(texts), 64)]):
            ids += part
            n_bytes += n
        _write(f"{out_dir}/val_{source}.u16", ids[::100])
        n = _write(f"{out_dir}/{source}.u16", [x for i, x in enumerate(ids) if i % 100])
        print(f"{source:20s} {len(texts):7d} docs {n_bytes / 1e6:7.2f} MB {n / 1e6:7.2f} Mtok", flush=True)


def pack_synth(pool, out_dir, kind, n_docs):
    """Write documents 0 .. n_docs-1 of a generated kind."""
    jobs = [(kind, i, min(i + 250, n_docs)) for i in range(0, n_docs, 250)]
    ids, n_bytes = [], 0
    for part, n in pool.imap(_generate, jobs, chunksize=4):
        ids += part
        n_bytes += n
    n = _write(f"{out_dir}/{kind}.u16", ids)
    print(f"{kind:20s} {n_docs:7d} docs {n_bytes / 1e6:7.2f} MB {n / 1e6:7.2f} Mtok", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["real", "synth"])
    parser.add_argument("tokenizer")
    parser.add_argument("out_dir")
    parser.add_argument("what", nargs="+", help="corpus file, or KIND=DOCUMENTS ...")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.makedirs(args.out_dir, exist_ok=True)
    with Pool(args.processes, _start, (args.tokenizer,)) as pool:
        for what in args.what:
            if args.mode == "real":
                pack_real(pool, args.out_dir, what)
            else:
                kind, n_docs = what.split("=")
                pack_synth(pool, args.out_dir, kind, int(n_docs))


if __name__ == "__main__":
    main()
