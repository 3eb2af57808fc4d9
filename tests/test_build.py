"""What the build does only on Apple silicon, as far as another system can tell."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree")
def test_metal_joins_the_build_with_its_shaders(monkeypatch, tmp_path):
    pytest.importorskip("Cython")
    pytest.importorskip("pybind11")
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", lambda **kw: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    built = runpy.run_path("setup.py")
    if "metal_source.c" in " ".join(built["CORE_SOURCES"]):
        pytest.skip("this is Apple silicon: the build itself shows it")
    assert "FM_HAVE_METAL" not in dict(built["MACROS"])
    built["add_metal"]()
    sources = built["CORE_SOURCES"]
    assert {Path(s).name for s in sources if s.endswith(".m")} == {
        p.name for p in (ROOT / "metal").glob("*.m")
    }
    (shaders,) = (Path(s) for s in sources if s.endswith("metal_source.c"))
    text = shaders.read_text()
    for kernel in (ROOT / "metal/kernels").glob("*.metal"):
        assert f"---- {kernel.name}" in text
    assert dict(built["MACROS"])["FM_HAVE_METAL"] == "1"
    assert "Metal" in built["LINK_ARGS"]
