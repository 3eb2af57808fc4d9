"""Fixtures that several test files use."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).resolve().parent))  # oracle/ and fake_core


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def noise_model() -> Path:
    """The untrained model that comes along."""
    return ROOT / "flashmoe" / "demo_noise"


@pytest.fixture
def fake(monkeypatch):
    """Replace the core; returns a function that sets the fake engine's class attributes.

    What this process already holds, which grows with every test before, is set too: plans of fake
    sizes shall be the same in any order of tests.
    """
    import fake_core

    import flashmoe.engine
    import flashmoe.memory
    import flashmoe.prepare

    monkeypatch.setattr(flashmoe.memory, "resident_bytes", lambda: 100 << 20)

    def install(**attributes):
        core = fake_core.make_core(**attributes)
        monkeypatch.setattr(flashmoe.engine, "_core", core)
        monkeypatch.setattr(flashmoe.prepare, "_core", core)
        return core

    install()
    return install
