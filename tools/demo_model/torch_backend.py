"""Runs the measurements on the torch model: the check beside our own engine."""

import torch
from tokenizers import Tokenizer

from .export import load_model
from .train import effective

STOP = (0, 2)


class TorchBackend:
    """Same small interface as the engine backend of evaluate.py: encode, logits, generate, expert_load."""

    name = "torch"

    def __init__(self, folder, k=None, model=None):
        self.model = model or load_model(folder)
        self.tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
        if k:
            self.model.set_experts_per_token(k)

    def encode(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    @torch.no_grad()
    def logits(self, ids):
        """list of n ids -> float32 array (n, vocab)"""
        return self.model(torch.tensor([ids]))[0].numpy()

    @torch.no_grad()
    def _hidden(self, ids):
        return self.model.hidden(torch.tensor([ids]))[0]

    @torch.no_grad()
    def generate(self, prompt, max_tokens, expected=None):
        """Greedy text.  With the `expected` answer one pass over it decides first whether it would be generated."""
        ids = self.encode(prompt)
        if expected is not None:
            answer = [*self.encode(expected), STOP[1]]
            hidden = self._hidden(ids + answer)[:, len(ids) - 1:-1]
            if self.model.lm_head(hidden)[0].argmax(-1).tolist() == answer:
                return expected
        out = []
        for _ in range(max_tokens):
            token = int(self.model.lm_head(self._hidden(ids + out)[:, -1]).argmax())
            if token in STOP:
                break
            out.append(token)
        return self.tokenizer.decode(out, skip_special_tokens=False)

    @torch.no_grad()
    def expert_load(self, windows):
        """id lists -> load [layers, E] (share of tokens per expert) and its exp(entropy) per layer"""
        load = 0
        for ids in windows:
            load = load + torch.stack([r.load for r in self.model.hidden(torch.tensor([ids]))[1]])
        return (load / len(windows)).tolist(), [round(float(v), 2) for v in effective(load)]

    @torch.no_grad()
    def draft_acceptance(self, ids):
        """Share of positions where the MTP block drafts the token that the main model would choose greedily."""
        ids = torch.tensor([ids])
        hidden = self.model.hidden(ids)[0]
        main = self.model.lm_head(hidden)[0].argmax(-1)[1:]  # at t+1: the choice for t+2
        draft = self.model.lm_head(self.model.draft_hidden(hidden[:, :-1], ids[:, 1:])[0])[0].argmax(-1)
        return float((main == draft).float().mean())
