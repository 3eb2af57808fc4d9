#!/usr/bin/env python3
"""Run the kernels on an NVIDIA GPU: the interface of msl.Library over the CUDA driver.

Two steps, since the machine with the GPU may have no clang:
    msl_cuda.py pack DIR     record which variants the kernel tests use, compile each to a cubin
    msl_cuda.py test DIR     on the GPU machine: run those tests (pytest), every buffer exact-sized
    msl_cuda.py bench DIR    on the GPU machine: expert matvec at 397B shapes against copy speed
`MSL_CUDA_TOOL="compute-sanitizer --tool memcheck"` puts a tool before `test`.
"""

from __future__ import annotations

import ctypes as C
import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
TESTS = ["test_metal_mat.py", "test_metal_ops.py", "test_metal_mixers.py"]
SELECT = "not sanitizers and not rev and not rand7"
KERNEL_FC = {"matvec", "matunits", "matmul", "attention", "delta"}  # files that look at function constants


def variant(name, fc):
    """File name of a variant: kernels of a file specialised for function constants."""
    fc = {k: int(v) for k, v in sorted(fc.items()) if name in KERNEL_FC}
    return f"{name}-{hashlib.sha256(json.dumps(fc).encode()).hexdigest()[:12]}.cubin", fc


# ---- the driver


@functools.lru_cache(None)
def driver():
    cu = C.CDLL("libcuda.so.1")
    device, context = C.c_int(), C.c_void_p()
    check(cu, cu.cuInit(0))
    check(cu, cu.cuDeviceGet(C.byref(device), 0))
    check(cu, cu.cuDevicePrimaryCtxRetain(C.byref(context), device))
    check(cu, cu.cuCtxSetCurrent(context))
    return cu


def check(cu, status):
    if status:
        text = C.c_char_p()
        cu.cuGetErrorString(status, C.byref(text))
        raise RuntimeError(f"CUDA: {(text.value or b'unknown').decode()} ({status})")


def call(name, *args):
    cu = driver()
    check(cu, getattr(cu, name)(*args))


def alloc(n):
    p = C.c_uint64()
    call("cuMemAlloc_v2", C.byref(p), C.c_size_t(n))
    return p.value


class Args(C.Structure):
    """msl_cargs of runtime/msl_cuda_glue.h."""

    _fields_ = [("b", C.c_uint64 * 31), ("pad", C.c_uint64), ("bytes", C.c_ubyte * 64 * 31),
                ("off", C.c_uint * 31), ("grid", C.c_uint * 3), ("tail", C.c_uint * 2)]  # fmt: skip

    def set_bytes(self, i, raw):
        """The struct of binding i; what is longer than a slot is bound as a buffer only."""
        C.memmove(self.bytes[i], bytes(raw[:64]), min(len(raw), 64))


def three(n):
    n = tuple(int(i) for i in np.atleast_1d(n))
    return n + (1,) * (3 - len(n))


def mappings(addresses):
    """Whole writable mappings of this process that hold the addresses."""
    found = set()
    for line in Path("/proc/self/maps").read_text().splitlines():
        lo, hi = (int(x, 16) for x in line.split()[0].split("-"))
        if line.split()[1].startswith("rw") and any(lo <= a < hi for a in addresses):
            found.add((lo, hi))
    return sorted(found)


@functools.lru_cache(None)
def function(directory, name, fc, kernel):
    file, _ = variant(name, dict(fc))
    module, fn = C.c_void_p(), C.c_void_p()
    call("cuModuleLoadData", C.byref(module), (Path(directory) / file).read_bytes())
    call("cuModuleGetFunction", C.byref(fn), module, f"{kernel}__k".encode())
    return fn


def launch(fn, args, groups, tg):
    params = (C.c_void_p * 1)(C.cast(C.byref(args), C.c_void_p))
    call("cuLaunchKernel", fn, *groups, *tg, 0, None, params, None)


class Library:
    """Kernels of one file. Buffers are copied to allocations of their exact size, so that a
    memory checker sees one element past the end; memory named by a table is registered."""

    def __init__(self, name):
        self.name, self.directory = name, os.environ["MSL_CUDA"]

    def run(self, kernel, buffers, threads=None, groups=None, tg=1, tgmem=None, fc=None):
        assert not tgmem
        fn = function(self.directory, self.name, tuple(sorted((fc or {}).items())), kernel)
        tg = three(tg)
        groups = three(groups) if groups else tuple(-(-t // g) for t, g in zip(three(threads), tg))
        args, kept, tables = Args(), [], []
        for i, b in buffers.items():
            if isinstance(b, C.Structure):
                b = bytes(b)
            if isinstance(b, bytes):
                words = np.frombuffer(b + bytes(-len(b) % 8), np.uint64)
                tables += [int(w) for w in words]
                args.set_bytes(i, b)
                b = np.frombuffer(bytearray(b), np.uint8)
            kept.append((i, b, b.ctypes.data, b.ctypes.data + b.nbytes))
        spans = []  # overlapping host ranges share an allocation
        for _, _, lo, hi in sorted(kept, key=lambda k: k[2]):
            if spans and lo < spans[-1][1]:
                spans[-1][1] = max(spans[-1][1], hi)
            else:
                spans.append([lo, hi])
        made = {}
        for lo, hi in spans:
            made[lo, hi] = alloc(hi - lo)
            call("cuMemcpyHtoD_v2", C.c_uint64(made[lo, hi]), C.c_void_p(lo), C.c_size_t(hi - lo))
        for i, _, lo, _ in kept:
            at = next(s for s in made if s[0] <= lo < s[1])
            args.b[i] = made[at] + lo - at[0]
        size = three(threads) if threads else tuple(g * t for g, t in zip(groups, tg))
        args.grid[:] = size
        pinned = mappings(tables)
        for lo, hi in pinned:
            call("cuMemHostRegister_v2", C.c_void_p(lo), C.c_size_t(hi - lo), 3)
        launch(fn, args, groups, tg)
        call("cuCtxSynchronize")
        for lo, _ in pinned:
            call("cuMemHostUnregister", C.c_void_p(lo))
        for (lo, hi), p in made.items():
            call("cuMemcpyDtoH_v2", C.c_void_p(lo), C.c_uint64(p), C.c_size_t(hi - lo))
            call("cuMemFree_v2", C.c_uint64(p))


# ---- commands


def compile_variant(job):
    import mslc

    name, fc, out = job
    ptx = out.with_suffix(".ptx")
    source = (HERE if name == "copy" else mslc.KERNELS) / f"{name}.metal"
    mslc.compile_cuda(source, ptx, fc)
    mslc.run_tool(["ptxas", "-arch=sm_90", "-O3", ptx, "-o", out], f"ptxas {ptx}")
    ptx.unlink()
    ptx.with_suffix(".cu").unlink()


def pack(directory):
    """Compile every variant that the tests and the bench use."""
    from concurrent.futures import ThreadPoolExecutor

    directory.mkdir(parents=True, exist_ok=True)
    log = directory / "variants.log"
    log.unlink(missing_ok=True)
    cmd = [sys.executable, "-m", "pytest", "-q", "-c", HERE / "child.ini", "--confcutdir", HERE]
    cmd += ["-p", "no:cacheprovider", "-k", SELECT, *[HERE / t for t in TESTS]]
    subprocess.run([str(c) for c in cmd], env={**os.environ, "MSL_CUDA_RECORD": str(log)},
                   check=True)  # fmt: skip
    from msl_cuda_bench import KERNELS, bench_constants

    wanted = {}
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    rows += [(k, bench_constants(b, g)) for k in KERNELS.values() for b in (2, 4) for g in (0, 1)]
    rows += [("copy", {})]
    for name, fc in rows:
        file, fc = variant(name, fc)
        wanted[file] = (name, fc, directory / file)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_variant, wanted.values()))
    print(f"{len(wanted)} variants in {directory}")


def test(directory):
    """The kernel tests on the GPU."""
    tool = shlex.split(os.environ.get("MSL_CUDA_TOOL", ""))
    cmd = [*tool, sys.executable, "-m", "pytest", "-q", "--tb=short", "-c", HERE / "child.ini"]
    cmd += ["--confcutdir", HERE, "-p", "no:cacheprovider"]
    cmd += ["-k", os.environ.get("MSL_CUDA_SELECT", SELECT), *[HERE / t for t in TESTS]]
    env = {**os.environ, "MSL_CUDA": str(directory), "MSL_CHILD": "1"}
    return subprocess.run([str(c) for c in cmd], env=env).returncode


def main():
    command, directory = sys.argv[1], Path(sys.argv[2]).resolve()
    sys.path.insert(0, str(HERE))
    if command == "bench":
        import msl_cuda_bench

        return msl_cuda_bench.bench(directory)
    return {"pack": pack, "test": test}[command](directory)


if __name__ == "__main__":
    sys.exit(main())
