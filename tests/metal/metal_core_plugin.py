"""A pytest plugin: run the core's own tests on the Metal backend (`pytest -p metal_core_plugin`).

Loads the core that hostlib built (METAL_CORE_PATH) in place of `flashmoe._core` and makes every
engine open the backend named by METAL_CORE_BACKEND. With METAL_CORE_ROWS=1 only the row kernels run, which make a
batch equal to its members bit for bit. Otherwise matrices of more than 4 rows go through tiles,
whose 8x8 products sum in an order that the hardware does not tell: then two cuts of one prompt agree
only as far as each agrees with float64.
"""

import ctypes as C
import importlib.util
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import mslc

path = os.environ.get("METAL_CORE_PATH")
if path:
    san = os.environ.get("MSL_SAN", "")
    C.CDLL(str(mslc.runtime(san)), mode=C.RTLD_GLOBAL)
    os.environ["FAKE_METAL_COMPILE"] = f"{sys.executable} {mslc.HERE / 'mslc.py'} --embedded" + (
        f" --san {san}" if san else ""
    )
    spec = importlib.util.spec_from_file_location("flashmoe._core", path)
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    sys.modules["flashmoe._core"] = core
    C.CDLL(path).fm_metal_timeout_set(600)  # the runner is slow, and may share its machine
else:  # a Mac's own
    core = importlib.import_module("flashmoe._core")
sys.path.insert(0, str(mslc.REPO / "tests"))
import engines

if os.environ.get("METAL_CORE_ROWS"):
    tune = (C.c_int * 3).in_dll(C.CDLL(path), "fm_metal_tune")
    tune[:] = [2**31 - 1] * 3
else:
    engines.CHUNK_BOUND = engines.BOUND  # seen: 3e-4, where the CPU's chunks differ by 2e-4 at most
    engines.SAME_BITS = False
engines.STAND_IN = bool(path) and "METAL_CORE_ALL" not in os.environ
core.cpu_variants = lambda: ["ref"]  # no product is the CPU's here: one variant stands for all

Plain = core.Engine
backend = os.environ.get("METAL_CORE_BACKEND", "metal")


class Engine(Plain):
    def __init__(self, desc, opts):
        super().__init__(desc, {"backend": backend, **opts})


core.Engine = Engine
