"""The same kernels as CUDA: compiled wherever ptxas is, run and timed where a GPU is.

pytest tests/metal/test_metal_cuda.py -m slow        on a machine with an NVIDIA GPU
"""

import ctypes as C
import os
import shutil
import subprocess
import sys
from pathlib import Path

import msl_cuda
import pytest
from conftest import HERE, in_child
from msl_cuda_bench import bench_constants

LIBDEVICE = Path("/usr/local/cuda/nvvm/libdevice/libdevice.10.bc")
toolkit = pytest.mark.skipif(
    not (shutil.which("ptxas") and LIBDEVICE.exists()), reason="no CUDA toolkit (ptxas, libdevice)"
)


def has_gpu():
    try:
        return C.CDLL("libcuda.so.1").cuInit(0) == 0
    except OSError:
        return False


gpu = pytest.mark.skipif(not has_gpu(), reason="no NVIDIA GPU")


@toolkit
@in_child
@pytest.mark.parametrize("name", ["matvec", "matunits", "matmul", "rows", "attention", "delta", "topk"])
def test_compiles(name, tmp_path):
    fc = {**bench_constants(4, 1), "FC_DIM": 128}
    file, fc = msl_cuda.variant(name, fc)
    msl_cuda.compile_variant((name, fc, tmp_path / file))
    assert (tmp_path / file).stat().st_size > 1000


@gpu
@in_child
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["", "memcheck", "racecheck", "synccheck"])
def test_on_gpu(tool, tmp_path_factory):
    """Every kernel test on the GPU, plain and under compute-sanitizer."""
    folder = Path(os.environ.get("MSL_CUDA_PACKED") or tmp_path_factory.getbasetemp() / "cuda")
    if not list(folder.glob("*.cubin")):
        msl_cuda.pack(folder)
    env = dict(os.environ)
    if tool:
        env["MSL_CUDA_TOOL"] = f"compute-sanitizer --error-exitcode 9 --tool {tool}"
    cmd = [sys.executable, str(HERE / "msl_cuda.py"), "test", str(folder)]
    assert subprocess.run(cmd, env=env, cwd=HERE).returncode == 0
