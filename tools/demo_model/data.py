"""Draws training batches from the token streams in a fixed mixture."""

import glob
import os

import numpy as np
import torch

# shares of generated text that trained the shipped weights; the rest is real text
SYNTHETIC = {"tool": 0.22, "story": 0.14, "qa": 0.11, "json": 0.09, "invented": 0.0, "opening": 0.0}
# most that one source may take of the real share (archaic or fragmentary sources are held back)
CAP = {"wordnet-glosses": 0.10, "shakespeare+milton": 0.05, "web-bible": 0.06, "sotu": 0.16, "austen": 0.10,
       "moby-dick": 0.03}


class Streams:
    """Token streams of a directory.

    Attributes
    ----------
    train : dict of str to int32 tensor on `device`
    val : dict of str to int32 tensor, real sources only
    weights : dict of str to float, probability that a window comes from the source
    """

    def __init__(self, folder, device, seed=0, mixture=None):
        self.train, self.val, self.device = {}, {}, device
        for path in sorted(glob.glob(os.path.join(folder, "*.u16"))):
            name = os.path.basename(path)[:-4]
            stream = torch.from_numpy(np.fromfile(path, dtype="<u2").astype(np.int32))
            if name.startswith("val_"):
                self.val[name[4:]] = stream
            elif len(stream) > 4096:
                self.train[name] = stream.to(device)
        synthetic = {k: v for k, v in (mixture or SYNTHETIC).items() if k in self.train}
        real = {k: len(v) for k, v in self.train.items() if k not in SYNTHETIC}
        total = sum(real.values())
        real = {k: min(v / total, CAP.get(k, 1.0)) for k, v in real.items()}
        share = (1 - sum(synthetic.values())) / (sum(real.values()) or 1)
        self.weights = synthetic | {k: v * share for k, v in real.items()}
        self.starts = {k: torch.cat([torch.zeros(1, dtype=torch.long, device=device), (v == 0).nonzero()[:, 0] + 1])
                       for k, v in self.train.items()}
        self.names = list(self.weights)
        self.generator = torch.Generator().manual_seed(seed + 1)

    def batch(self, rows, tokens, extra=1):
        """`rows` windows of `tokens + extra` ids, int64 [rows, tokens + extra].

        Generated text always starts at a document (as in use, where the prompt opens the context), real text in half
        of the cases.
        """
        g, n = self.generator, tokens + extra
        weights = torch.tensor([self.weights[k] for k in self.names])
        counts = torch.multinomial(weights, rows, replacement=True, generator=g).bincount(minlength=len(self.names))
        windows = []
        for name, count in zip(self.names, counts.tolist()):
            if not count:
                continue
            stream, starts = self.train[name], self.starts[name]
            at = starts[torch.randint(0, len(starts), (count,), generator=g).to(self.device)]
            if name not in SYNTHETIC:
                anywhere = torch.randint(0, len(stream), (count,), generator=g).to(self.device)
                at = torch.where((torch.rand(count, generator=g) < 0.5).to(self.device), at, anywhere)
            at = at.clamp(max=len(stream) - n)
            windows.append(stream[at[:, None] + torch.arange(n, device=self.device)])
        order = torch.randperm(rows, generator=g).to(self.device)
        return torch.cat(windows)[order].long()
