#!/usr/bin/env python3
"""Fetch Apple's metal-cpp headers (Apache-2.0) out of a pinned PyPI wheel into build/metal-cpp.

The wheel is never installed and nothing of it is linked or shipped: the headers are the published
interface that tests/metal/test_metal_interface.py compares the host with. Does nothing when they are there.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "mlx-metal==0.32.4"
TARGET = Path(__file__).resolve().parents[2] / "build" / "metal-cpp"
STAMP = TARGET / WHEEL  # written last


def main():
    if STAMP.exists():
        return
    with tempfile.TemporaryDirectory() as folder:
        cmd = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        cmd += ["--only-binary", ":all:", "--platform", "macosx_14_0_arm64"]
        cmd += ["--python-version", "312", "-d", folder, WHEEL]
        subprocess.run(cmd, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            names = [n for n in wheel.namelist() if "include/metal_cpp/" in n]
            wheel.extractall(TARGET, names)
    STAMP.touch()


if __name__ == "__main__":
    main()
