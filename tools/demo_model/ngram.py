"""A dense interpolated Kneser-Ney 5-gram model: the baseline that the demo model has to beat.

    python -m tools.demo_model.ngram --train STREAMS --val FILE.u16 [FILE.u16 ...]

"Dense" = it stores every n-gram of the training tokens, nothing is pruned.  One discount per order, estimated from
the counts of counts (Ney, Essen and Kneser 1994); lower orders count distinct left contexts, not tokens.
"""

import argparse
import glob
import json
import os

import numpy as np

BITS = 13  # ids < 8192; five of them need 65 bits, so n-grams are keyed by (interned context, id)


class KneserNey:
    """P(w | up to order-1 previous tokens).

    An n-gram is keyed by (number of its first n-1 tokens as an (n-1)-gram, last token), so every order needs one
    sorted int64 array.
    """

    def __init__(self, streams, order=5, vocab=6144):
        """`streams`: list of uint16/int arrays; n-grams do not cross from one to the next."""
        self.order, self.vocab, self.keys, self.counts = order, vocab, [], []
        ids = np.concatenate([np.append(s.astype(np.int64), -1) for s in streams])  # -1 = border
        number = np.full(len(ids), -1, np.int64)  # number of the n-gram that ends at each position, -1 = none
        for n in range(order):
            previous = np.append(-1, number[:-1])
            ok = (ids >= 0) & (previous >= 0) if n else ids >= 0
            keys, inverse, counts = np.unique((previous[ok] << BITS) | ids[ok] if n else ids[ok],
                                              return_inverse=True, return_counts=True)
            shorter, number = number, np.full(len(ids), -1, np.int64)
            number[ok] = inverse
            if n:  # lower orders count how many different tokens stand to the left of the n-gram
                suffix = np.zeros(len(keys), np.int64)
                suffix[inverse] = shorter[ok]
                self.counts[n - 1] = np.bincount(suffix, minlength=len(self.keys[n - 1])).astype(float)
            self.keys.append(keys)
            self.counts.append(counts.astype(float))
        self._summarise()

    def _summarise(self):
        """Discount per order; per context the sum of counts and the number of different continuations."""
        self.discount, self.total, self.kinds = [], [], []
        for n, counts in enumerate(self.counts):
            once, twice = (counts == 1).sum(), (counts == 2).sum()
            self.discount.append(once / (once + 2 * twice) if once else 0.5)
            context = self.keys[n] >> BITS if n else np.zeros(len(counts), np.int64)
            size = len(self.keys[n - 1]) if n else 1
            self.total.append(np.bincount(context, counts, minlength=size))
            self.kinds.append(np.bincount(context, counts > 0, minlength=size))

    def probability(self, ids):
        """P of every token of `ids` (from the second on) given the ones before it -> float array (len - 1,)"""
        ids = np.asarray(ids, np.int64)
        p = np.full(len(ids), 1.0 / self.vocab)
        context, found = np.zeros(len(ids), np.int64), np.ones(len(ids), bool)
        previous = []
        for n in range(self.order):
            key = (context << BITS) | ids if n else ids
            at = np.minimum(np.searchsorted(self.keys[n], key), len(self.keys[n]) - 1)
            hit = found & (self.keys[n][at] == key)
            total = np.where(found, self.total[n][context], 0)
            seen = total > 0
            safe = np.where(seen, total, 1)
            count = np.where(hit, self.counts[n][at], 0)
            discount = self.discount[n]
            backoff = discount * self.kinds[n][context] / safe
            p = np.where(seen, np.maximum(count - discount, 0) / safe + backoff * p, p)
            previous.append(np.where(hit, at, -1))
            # the context of order n+1 at position t is the n-gram that ends at t-1
            before = np.concatenate([[-1], previous[n][:-1]])
            found = before >= 0
            context = np.where(found, before, 0)
        return p[1:]

    def perplexity(self, ids):
        return float(np.exp(-np.log(self.probability(ids)).mean()))


def load_streams(folder, skip=()):
    """Training streams of a folder (everything but val_*)."""
    paths = sorted(glob.glob(os.path.join(folder, "*.u16")))
    names = [os.path.basename(p)[:-4] for p in paths]
    return {n: np.fromfile(p, "<u2") for n, p in zip(names, paths) if not n.startswith("val_") and n not in skip}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, help="folder of .u16 streams")
    parser.add_argument("--val", nargs="+", required=True)
    parser.add_argument("--out", help="JSON file for the numbers")
    args = parser.parse_args()
    streams = load_streams(args.train)
    model = KneserNey(list(streams.values()))
    print("tokens", sum(map(len, streams.values())), "n-grams", [len(k) for k in model.keys])
    result = {"tokens": sum(map(len, streams.values())), "n_grams": [len(k) for k in model.keys], "perplexity": {}}
    for path in args.val:
        ids, name = np.fromfile(path, "<u2"), os.path.basename(path)[:-4].removeprefix("val_")
        result["perplexity"][name] = round(model.perplexity(ids), 2)
        print(f"{name:24s} {len(ids):7d} tokens  perplexity {result['perplexity'][name]}")
    if args.out:
        with open(args.out, "w") as f:
            json.dump(result, f, indent=1)


if __name__ == "__main__":
    main()
