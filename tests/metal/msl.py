"""Drive a CPU-compiled .metal library from Python (ctypes + NumPy).

`Library.run` takes NumPy arrays as buffers (written in place), struct bytes as constants, and
runs the grid on one OS thread.  A fault (missing binding, partial barrier, too much threadgroup
memory, shuffle from an inactive lane, ...) raises `KernelFault`.
"""

from __future__ import annotations

import contextlib
import ctypes as C
import functools
import json
import os
from pathlib import Path

import mslc
import numpy as np


class _Param(C.Structure):
    _fields_ = [("kind", C.c_ubyte), ("writable", C.c_ubyte), ("index", C.c_ushort),
                ("name", C.c_char_p), ("elem_size", C.c_uint), ("elem_align", C.c_uint),
                ("is_ref", C.c_ubyte)]  # fmt: skip


class _Kernel(C.Structure):
    _fields_ = [("name", C.c_char_p), ("invoke", C.c_void_p), ("params", C.POINTER(_Param)),
                ("n_params", C.c_int), ("max_threads", C.c_uint)]  # fmt: skip


class _Constant(C.Structure):
    _fields_ = [("name", C.c_char_p), ("index", C.c_int), ("value", C.c_void_p),
                ("size", C.c_uint), ("defined", C.POINTER(C.c_ubyte))]  # fmt: skip


class _Library(C.Structure):
    _fields_ = [("kernels", C.POINTER(_Kernel)), ("n_kernels", C.c_int),
                ("constants", C.POINTER(_Constant)), ("n_constants", C.c_int)]  # fmt: skip


class _Binding(C.Structure):
    _fields_ = [("ptr", C.c_void_p), ("len", C.c_size_t)]


class _Dispatch(C.Structure):
    _fields_ = [("grid", C.c_uint * 3), ("tg", C.c_uint * 3), ("buf", _Binding * 31),
                ("tgmem", C.c_size_t * 31)]  # fmt: skip


class Stats(C.Structure):
    """What one dispatch did: lanes run, fiber switches, simd operations, barriers, ms."""

    _fields_ = [("lanes", C.c_uint64), ("switches", C.c_uint64), ("simd_ops", C.c_uint64),
                ("divergent", C.c_uint64), ("barriers", C.c_uint64), ("ms", C.c_double)]  # fmt: skip


class KernelFault(Exception):
    """The runner stopped the kernel; the text says where and why."""


@functools.lru_cache(None)
def _runtime(san):
    rt = C.CDLL(str(mslc.runtime(san)), mode=C.RTLD_GLOBAL)
    rt.msl_run.argtypes = [C.POINTER(_Library), C.POINTER(_Kernel), C.POINTER(_Dispatch),
                           C.POINTER(Stats), C.c_char_p, C.c_size_t]  # fmt: skip
    return rt


def _three(n):
    n = tuple(np.atleast_1d(n)) if not isinstance(n, tuple) else n
    return n + (1,) * (3 - len(n))


@contextlib.contextmanager
def order(name):
    """Run order of lanes and simdgroups inside the block: "", "rev" or "randN"."""
    before = os.environ.get("MSL_ORDER")
    os.environ["MSL_ORDER"] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ["MSL_ORDER"]
        else:
            os.environ["MSL_ORDER"] = before


def library(name):
    """The compiled kernels of metal/kernels/NAME.metal: for the CPU, or with MSL_CUDA for a GPU."""
    if "MSL_CUDA" in os.environ:
        import msl_cuda

        return msl_cuda.Library(name)
    return Library(mslc.KERNELS / f"{name}.metal")


class Library:
    """A compiled .metal file. `san` must be the sanitizer that this process runs under."""

    def __init__(self, path, san=None, defines=(), include_dirs=None):
        san = os.environ.get("MSL_SAN", "") if san is None else san
        self.path = path
        self._rt = _runtime(san)
        self._so = C.CDLL(str(mslc.compile_run(path, san, defines, include_dirs)))
        self._so.msl_get_library.restype = C.POINTER(_Library)
        self._lib = self._so.msl_get_library()
        lib = self._lib.contents
        self._kernels = {lib.kernels[i].name.decode(): i for i in range(lib.n_kernels)}
        self._constants = [lib.constants[i] for i in range(lib.n_constants)]
        self.names = sorted(self._kernels)

    def _set_constants(self, values):
        left = dict(values)
        for c in self._constants:
            name = c.name.decode()
            C.memset(c.value, 0, c.size)
            c.defined[0] = name in left
            if name in left:
                value = np.asarray(left.pop(name))
                raw = value.astype({1: np.uint8, 4: value.dtype}[c.size]).tobytes()
                if len(raw) != c.size:
                    raw = np.asarray(int(value), np.uint32).tobytes()
                C.memmove(c.value, raw, c.size)
        if left:
            raise KeyError(f"no function constant named {sorted(left)}")

    def run(self, name, buffers, threads=None, groups=None, tg=1, tgmem=None, fc=None):
        """Run kernel `name` over a grid of `threads`, or of `groups` threadgroups of `tg`.

        Parameters
        ----------
        buffers : dict of int to ndarray, bytes or ctypes structure
            By buffer index.  An ndarray is used where it lies and may be written.
        fc : dict of str to value
            Function constants by name; all others are undefined and zero.
        """
        if "MSL_CUDA_RECORD" in os.environ:  # which variants a GPU run of these tests will need
            with open(os.environ["MSL_CUDA_RECORD"], "a") as f:
                f.write(json.dumps([Path(self.path).stem, fc or {}]) + "\n")
        kernel = self._lib.contents.kernels[self._kernels[name]]
        d, stats, keep = _Dispatch(), Stats(), []
        d.tg[:] = _three(tg)
        size = _three(threads) if threads else [a * b for a, b in zip(_three(groups), d.tg)]
        d.grid[:] = [int(s) for s in size]
        for i, b in buffers.items():
            if b is None:
                continue
            if isinstance(b, C.Structure):
                b = bytes(b)
            if isinstance(b, bytes):
                b = np.frombuffer(bytearray(b), np.uint8)
            if not b.flags.c_contiguous:
                raise ValueError(f"buffer {i} is not contiguous")
            keep.append(b)
            d.buf[i].ptr, d.buf[i].len = b.ctypes.data, b.nbytes
        for i, n in (tgmem or {}).items():
            d.tgmem[i] = n
        self._set_constants(fc or {})
        error = C.create_string_buffer(1024)
        if self._rt.msl_run(self._lib, C.byref(kernel), C.byref(d), C.byref(stats), error, 1024):
            raise KernelFault(error.value.decode())
        return stats
