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
KERNEL_FC = {"matvec", "matmul", "attention", "delta"}  # files that look at function constants


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

    _fields_ = [("b", C.c_uint64 * 31), ("off", C.c_uint * 31), ("grid", C.c_uint * 3)]


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
                tables += [int(w) for w in words if w > 1 << 32]
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
    mslc.compile_cuda(mslc.KERNELS / f"{name}.metal", ptx, fc)
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
    wanted = {}
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    for name, fc in rows + [("matvec", bench_constants(b, g)) for b in (2, 4) for g in (0, 1)]:
        file, fc = variant(name, fc)
        wanted[file] = (name, fc, directory / file)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_variant, wanted.values()))
    print(f"{len(wanted)} variants in {directory}")


def test(directory):
    """The kernel tests on the GPU."""
    tool = shlex.split(os.environ.get("MSL_CUDA_TOOL", ""))
    cmd = [*tool, sys.executable, "-m", "pytest", "-q", "-c", HERE / "child.ini", "-x"]
    cmd += ["--confcutdir", HERE, "-p", "no:cacheprovider"]
    cmd += ["-k", os.environ.get("MSL_CUDA_SELECT", SELECT), *[HERE / t for t in TESTS]]
    env = {**os.environ, "MSL_CUDA": str(directory), "MSL_CHILD": "1"}
    return subprocess.run([str(c) for c in cmd], env=env).returncode


def bench_constants(bits, gated):
    return {"FC_FORMAT": bits, "FC_GROUP": 64, "FC_SCALE": 17, "FC_VEC": 1, "FC_GATED": gated}


def elapsed(work, n):
    """Seconds per call of work(i), by events; the best of 3 rounds of n calls."""
    events = [C.c_void_p(), C.c_void_p()]
    for e in events:
        call("cuEventCreate", C.byref(e), 0)
    best = 1e9
    for _ in range(4):
        call("cuEventRecord", events[0], None)
        for i in range(n):
            work(i)
        call("cuEventRecord", events[1], None)
        call("cuEventSynchronize", events[1])
        ms = C.c_float()
        call("cuEventElapsedTime_v2" if hasattr(driver(), "cuEventElapsedTime_v2")
             else "cuEventElapsedTime", C.byref(ms), *events)  # fmt: skip
        best = min(best, ms.value / 1e3 / n)
    return best


def bench(directory):
    """GB/s of 10 experts' gate+up and down at 397B shapes; 12 sets of experts, so never in L2."""
    from metal_args import CONST, args, table

    os.environ["MSL_CUDA"] = str(directory)
    hidden, width, k, sets = 4096, 1024, 10, 12
    n = 2 << 30
    src, dst = alloc(n), alloc(n)
    t = elapsed(lambda i: call("cuMemcpyDtoDAsync_v2", C.c_uint64(dst), C.c_uint64(src),
                               C.c_size_t(n), None), 4)  # fmt: skip
    copy = 2 * n / t / 1e9
    print(json.dumps({"copy_GBps_read_plus_write": round(copy)}))
    x, y = alloc(4 * hidden * k), alloc(4 * hidden * k)
    for bits in (4, 2):
        for gated, n_out, n_cols in ((1, width, hidden), (0, hidden, width)):
            codes, scales = n_cols * bits // 8, n_cols // 64 * 2
            per = n_out * (codes + 2 * scales) * (1 + gated)
            weights = [alloc(per * k) for _ in range(sets)]
            ready = []
            for w in weights:
                call("cuMemsetD8_v2", C.c_uint64(w), 0, C.c_size_t(per * k))
                items = []
                for e in range(k):
                    at = w + e * per
                    part = [at, at + n_out * codes, at + n_out * (codes + scales)]
                    up = [p + per // 2 for p in part] if gated else part
                    items.append(args("fm_metal_item", codes=part[0], scales=part[1],
                                      biases=part[2], up_codes=up[0], up_scales=up[1],
                                      up_biases=up[2], y=y + 4 * e * n_out, n_out=n_out,
                                      ldy=n_out, n=1))  # fmt: skip
                m = args("fm_mat_args", n_cols=n_cols, ldx=n_cols, codes_stride=codes,
                         scales_stride=scales)  # fmt: skip
                a = Args()
                for i, raw in enumerate((table(items), bytes(m))):
                    a.b[i] = alloc(len(raw))
                    call("cuMemcpyHtoD_v2", C.c_uint64(a.b[i]), raw, C.c_size_t(len(raw)))
                a.b[2] = a.b[3] = x
                ready.append(a)
            rows = CONST["FM_MV_ROWS"] * CONST["FM_MV_SIMDGROUPS"]
            fc = tuple(sorted(bench_constants(bits, gated).items()))
            fn = function(str(directory), "matvec", fc, "mat_vec")
            groups, tg = (-(-n_out // rows), k, 1), (32 * CONST["FM_MV_SIMDGROUPS"], 1, 1)
            t = elapsed(lambda i, r=ready, f=fn, g=groups, z=tg: launch(f, r[i % sets], g, z), 48)
            for w in weights:
                call("cuMemFree_v2", C.c_uint64(w))
            print(json.dumps({"bits": bits, "matrix": "gate+up" if gated else "down",
                              "experts": k, "us": round(t * 1e6, 1),
                              "GBps": round(per * k / t / 1e9),
                              "of_copy": round(per * k / t / 1e9 / copy, 3)}))  # fmt: skip


def main():
    command, directory = sys.argv[1], Path(sys.argv[2]).resolve()
    sys.path.insert(0, str(HERE))
    return {"pack": pack, "test": test, "bench": bench}[command](directory)


if __name__ == "__main__":
    sys.exit(main())
