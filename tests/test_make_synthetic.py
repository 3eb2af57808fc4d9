"""The generator of random checkpoints gives what it says."""

from __future__ import annotations

import make_synthetic
import numpy as np
import pytest
from oracle import model as oracle

from flashmoe.checkpoint import open_checkpoint
from flashmoe.checkpoint.formats import role_bytes

SMALL = {"layers": 4, "hidden": 128, "experts": 4, "top_k": 2, "width": 64, "vocab": 256}


@pytest.mark.parametrize("form", ["hf", "mlx", "packed"])
def test_forms(tmp_path, form):
    sizes = make_synthetic.make(tmp_path / "m", form=form, **SMALL)
    d = open_checkpoint(tmp_path / "m")
    assert d.origin == form
    e = d.experts[0]
    assert sum(n for r in (e.gate, e.up, e.down) for n in role_bytes(r)) == sizes["expert_bytes"]
    assert sizes["all_experts_bytes"] == 16 * sizes["expert_bytes"]
    if form != "packed":
        logits = oracle.load(tmp_path / "m").forward([1, 2, 3])
        assert np.isfinite(logits).all()
        assert logits.std() > 1e-3
