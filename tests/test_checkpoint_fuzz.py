"""Mutated checkpoints are refused politely; the driver is fuzz/fuzz_checkpoint.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent / "fuzz"))
import fuzz_checkpoint


def test_some_mutations():
    outcomes = fuzz_checkpoint.fuzz(400)
    assert outcomes["ModelFileError"] > 100
    assert outcomes["UnsupportedError"] > 5
    assert outcomes["accepted"] > 20  # some cases are not mutated at all


@pytest.mark.slow
def test_ten_thousand_mutations():
    assert sum(fuzz_checkpoint.fuzz(10_000, seed=1_000_000).values()) == 10_000
