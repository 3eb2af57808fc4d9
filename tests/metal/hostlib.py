"""Build the shipped Metal host with the stand-in framework, and drive the backends through ctypes.

The library holds the C core's storeys 0-3 (base, quant, cpu, backend), metal/*.m and the stand-in:
`Backend("cpu")` and `Backend("metal")` run the same calls.
"""

from __future__ import annotations

import ctypes as C
import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mslc

sys.path.insert(0, str(mslc.REPO / "metal"))
import contextlib

import embed

FAKE = mslc.HERE / "fake"
CORE = ["base", "quant", "cpu", "backend"]
OBJC_FLAGS = [
    "-fobjc-runtime=gcc",
    "-fblocks",
    "-fno-objc-arc",
    "-fobjc-exceptions",
    "-fexceptions",
    "-fconstant-string-class=NSConstantString",
    "-D_NATIVE_OBJC_EXCEPTIONS",
    "-DGNUSTEP",
    "-DGNUSTEP_BASE_LIBRARY=1",
    "-DGNU_RUNTIME=1",
]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]


MAC = sys.platform == "darwin"  # the real framework: the backend tests then run on the real GPU


@functools.lru_cache(None)
def gnustep():
    """Include and link flags of GNUstep with gcc's Objective-C runtime; on a Mac of the frameworks."""
    if MAC:
        return [], ["-framework", "Metal", "-framework", "Foundation"]
    gcc = subprocess.run(["gcc", "-print-file-name=include"], capture_output=True, text=True)
    include = gcc.stdout.strip()
    link = mslc.CACHE / "gccobjc"
    link.mkdir(parents=True, exist_ok=True)
    if not (link / "objc").exists():  # only this folder of gcc's headers: clang has its own others
        with contextlib.suppress(FileExistsError):
            (link / "objc").symlink_to(f"{include}/objc")
    lib = os.path.dirname(include)
    # BlocksRuntime first: GNUstep exports a _Block_copy that copies nothing
    libs = ["-L", lib, "-lBlocksRuntime", "-lgnustep-base", "-lobjc"]
    return ["-isystem", str(link), "-isystem", "/usr/include/GNUstep"], libs


def sources():
    out = [p for d in CORE for p in sorted((mslc.REPO / "csrc" / d).glob("*.c"))]
    out += sorted((mslc.REPO / "metal").glob("*.m"))
    if MAC:
        return out
    return out + sorted(FAKE.glob("*.m")) + sorted(FAKE.glob("*.c"))


def compile_object(path, san, text=None):
    """One object file, cached by its preprocessed text."""
    include = ["-I", mslc.REPO / "csrc", "-I", mslc.REPO / "metal", "-I", FAKE / "api", "-I",
               FAKE / "include", "-I", FAKE, "-I", mslc.HERE / "runtime"]  # fmt: skip
    # the CPU's fast variants take long to optimise, and nothing here needs them fast
    fast = path.parent.name == "cpu" and path.name != "kernels_ref.c"
    flags = [mslc.CC, "-std=gnu11", "-O0" if fast else "-O1", "-g", "-fPIC", "-DFM_HAVE_METAL",
             '-DFM_VERSION="test"']  # fmt: skip
    if str(path).endswith(".m"):
        flags += ["-fno-objc-arc"] if MAC else OBJC_FLAGS
        flags += [*gnustep()[0], *WARNINGS]
    if MAC:
        include = include[:4]  # Apple's headers, not the stand-in's
    if san:
        flags += [f"-fsanitize={san}", "-fno-omit-frame-pointer"]
    cmd = [*flags, *include]
    before = mslc.run_tool([*cmd, "-E", path], f"preprocessing {path}").stdout

    def build(tmp):
        mslc.run_tool([*cmd, "-c", path, "-o", tmp], f"compiling {path}")

    return mslc.cached(["object", *cmd, before], ".o", build)


def build(san="", metal=None):
    """The library; `metal` names another folder of host files (planted mistakes)."""
    text = embed.as_c(embed.source(mslc.KERNELS))

    def write(tmp):
        tmp.write_text(text)

    files = [*sources(), mslc.cached(["embedded", text], ".c", write)]
    metal = metal or os.environ.get("FLASHMOE_METAL_HOST")
    if metal:
        metal = Path(metal)
        files = [metal / f.name if f.parent.name == "metal" and f.suffix == ".m" else f
                 for f in files]  # fmt: skip
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda f: compile_object(f, san), files))
    rt = [] if MAC else [mslc.runtime(san), f"-Wl,-rpath,{mslc.CACHE}"]

    def link(tmp):
        cmd = [mslc.CC, "-shared", "-o", tmp, *objects, *rt]
        cmd += [*gnustep()[1], "-lm", "-lpthread", "-ldl"]
        mslc.run_tool(cmd + ([f"-fsanitize={san}", "-shared-libsan"] if san else []), "linking")

    return mslc.cached(["hostlib", *map(str, objects), *rt], ".so", link)


# ---- the structs of csrc/backend/backend.h and csrc/cpu/kernels.h

P, I64, I32, F32, INT = C.c_void_p, C.c_int64, C.c_int32, C.c_float, C.c_int


def struct(name, /, **fields):
    return type(name, (C.Structure,), {"_fields_": list(fields.items())})


Mat = struct("Mat", format=INT, scale_format=INT, group=I32, n_rows=I64, n_cols=I64, codes=P,
             scales=P, biases=P, codes_stride=I64, scales_stride=I64)  # fmt: skip
MatmulItem = struct("MatmulItem", W=C.POINTER(Mat), bias=P, y=P, ldy=I64, add=C.c_bool)
Span = struct("Span", row0=I64, n=I64, pos0=I64)
RopeArgs = struct("RopeArgs", x=P, ld=I64, ld_head=I64, n_heads=I64, rot=I64, inv_freq=P,
                  spans=P, n_spans=INT)  # fmt: skip
Kv = struct("Kv", k=P, v=P, capacity=I64, format=INT)
AttnArgs = struct("AttnArgs", n_heads=I64, n_kv_heads=I64, head_dim=I64, scale=F32, q=P, gate=P,
                  ld_q=I64, ld_q_head=I64, y=P, ld_y=I64)  # fmt: skip
AttentionArgs = struct("AttentionArgs", a=AttnArgs, k=P, v=P, ld_kv=I64, spans=P, kv=P, n_spans=INT)
ConvArgs = struct("ConvArgs", m=P, y=P, ldm=I64, ldy=I64, n_ch=I64, kern=I64, w=P, spans=P,
                  hist_in=P, hist_out=P, n_spans=INT)  # fmt: skip
DeltaArgs = struct("DeltaArgs", n_k_heads=I64, n_v_heads=I64, dk=I64, dv=I64, qkv=P, z=P, a=P, b=P,
                   A_log=P, dt_bias=P, norm_w=P, eps=F32, y=P, ld_qkv=I64, ld_z=I64, ld_ab=I64,
                   ld_y=I64)  # fmt: skip
DeltaBatch = struct("DeltaBatch", a=DeltaArgs, spans=P, S_in=P, S_out=P, n_spans=INT)
RouteArgs = struct("RouteArgs", n_experts=I64, k=I64, sigmoid=INT, renorm=INT, eps=F32, scale=F32,
                   n_group=I64, topk_group=I64, bias=P)  # fmt: skip
ExpertJob = struct("ExpertJob", gate=Mat, up=Mat, down=Mat, rows=P, n=I64, out0=I64)
ExpertArgs = struct("ExpertArgs", x=P, n_x=I64, jobs=P, n_jobs=INT, gate=P, up=P, out=P)
CombineArgs = struct("CombineArgs", y=P, n=I64, hidden=I64, part=P, start=P, index=P, weight=P,
                     n_parts=I64)  # fmt: skip
ExpertLater = struct("ExpertLater", x=P, n_x=I64, gate=Mat, up=Mat, down=Mat, gate_y=P, up_y=P,
                     out=P, n_jobs=I64, n_parts=I64, table=P)  # fmt: skip
Caps = struct("Caps", unified_memory=C.c_bool, asynchronous=C.c_bool, pipelined=C.c_bool,
              any_memory=C.c_bool, max_bytes=C.c_size_t, max_buffer_bytes=C.c_size_t, device=C.c_char_p,
              kv_formats=C.c_uint32)  # fmt: skip
Opts = struct("Opts", name=C.c_char_p, pool=P, numeric=INT)
Error = struct("Error", status=INT, err=INT, path=C.c_char_p, message=C.c_char_p)

_OPS = {
    "close": (None, []),
    "caps": (Caps, []),
    "alloc": (INT, [C.c_size_t, INT, C.POINTER(P)]),
    "free": (None, [P, C.c_size_t, INT]),
    "begin": (INT, []),
    "flush": (None, []),
    "sync": (INT, []),
    "embed": (INT, [C.POINTER(Mat), P, I64, P, I64]),
    "rmsnorm": (INT, [P, I64, P, F32, P, I64, I64, I64]),
    "matmul": (INT, [P, I64, I64, C.POINTER(MatmulItem), INT]),
    "clip": (INT, [P, I64, F32]),
    "rope": (INT, [C.POINTER(RopeArgs)]),
    "attention": (INT, [C.POINTER(AttentionArgs)]),
    "conv": (INT, [C.POINTER(ConvArgs)]),
    "delta": (INT, [C.POINTER(DeltaBatch)]),
    "swiglu": (INT, [P, P, P, I64]),
    "route": (INT, [C.POINTER(RouteArgs), P, I64, P, P]),
    "experts": (INT, [C.POINTER(ExpertArgs)]),
    "combine": (INT, [C.POINTER(CombineArgs)]),
    "add_gated": (INT, [P, P, P, I64, I64]),
    "find_nonfinite": (INT, [P, I64, I64, C.POINTER(I64)]),
    "tell": (INT, [C.POINTER(C.c_uint64)]),
    "hold": (INT, [C.POINTER(C.c_uint64)]),
    "experts_later": (INT, [C.POINTER(ExpertLater)]),
    "mark_nonfinite": (INT, [P, I64, I64, P]),
    "await": (INT, [C.c_uint64]),
    "set_jobs": (INT, [C.POINTER(ExpertLater), P, INT]),
    "post": (None, [C.c_uint64]),
}
Vtable = struct("Vtable", version=INT, name=C.c_char_p,
                **{k: C.CFUNCTYPE(r, P, *a) for k, (r, a) in _OPS.items()})  # fmt: skip


Counters = struct("Counters", **dict.fromkeys(
    ("command_buffers", "encoders", "dispatches", "waits", "upload_bytes", "encode_ns", "events",
     "awaits"), C.c_uint64))  # fmt: skip


class Handle(C.Structure):
    _fields_ = [("v", C.POINTER(Vtable))]


class BackendError(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


@functools.lru_cache(None)
def library(san=None, metal=None):
    san = os.environ.get("MSL_SAN", "") if san is None else san
    os.environ["FAKE_METAL_COMPILE"] = f"{sys.executable} {mslc.HERE / 'mslc.py'} --embedded" + (
        f" --san {san}" if san else ""
    )
    if not MAC:
        C.CDLL(str(mslc.runtime(san)), mode=C.RTLD_GLOBAL)  # kernels look for their runner there
    lib = C.CDLL(str(build(san, metal)))
    lib.fm_last_error.restype = C.POINTER(Error)
    return lib


class Backend:
    """A backend and the arrays in its memory. Ops are called by name with the vtable's arguments.

    With METAL_COMPARE in the environment the CPU judges every op of the others.
    """

    def __init__(self, name, san=None, metal=None, threads=1):
        self.lib = library(san, metal)
        self.name, self._arrays = name, []
        self._pool, self._handle = P(), C.POINTER(Handle)()
        self._check(self.lib.fm_pool_open(threads, C.byref(self._pool)))
        opts = Opts(name=name.encode(), pool=self._pool)
        if name != "cpu" and os.environ.get("METAL_COMPARE"):
            os.environ["FLASHMOE_COMPARE"] = "cpu"
        opened = self.lib.fm_backend_open(C.byref(opts), C.byref(self._handle))
        os.environ.pop("FLASHMOE_COMPARE", None)
        self._check(opened)
        self.v = self._handle.contents.v.contents

    def _check(self, status):
        if status:
            raise BackendError(status, self.lib.fm_last_error().contents.message.decode())

    def __getattr__(self, op):
        if op not in _OPS:
            raise AttributeError(op)
        fn, result = getattr(self.v, op), _OPS[op][0]

        def call(*args):
            out = fn(C.cast(self._handle, P), *args)
            return self._check(out) if result is INT else out

        return call

    def empty(self, shape, dtype="f4", usage=3, skip=0):
        """An array in backend memory, `skip` bytes past a page border; freed by close."""
        import numpy as np

        n = int(np.prod(shape)) * np.dtype(dtype).itemsize
        p = P()
        self.alloc(n + skip, usage, C.byref(p))
        self._arrays.append((p, n + skip, usage))
        raw = (C.c_uint8 * (n + skip)).from_address(p.value)
        return np.frombuffer(raw, np.uint8)[skip:].view(dtype).reshape(shape)

    def array(self, x, usage=3, skip=0):
        out = self.empty(x.shape, x.dtype, usage, skip)
        out[...] = x
        return out

    def close(self):
        if self._handle:
            while self._arrays:
                self.free(*self._arrays.pop())
            self.v.close(C.cast(self._handle, P))
            self._handle = None
            self.lib.fm_pool_close(self._pool)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def address(x):
    """Data pointer of an array, or None."""
    return None if x is None else x.ctypes.data


def pointers(arrays):
    """A C array of data pointers."""
    return (P * len(arrays))(*[a.ctypes.data for a in arrays])


# ---- the whole core with Metal in it, as a Python module


def build_core(san=""):
    """`flashmoe._core` with the Metal host and the stand-in linked in; returns its path."""
    import sysconfig

    import pybind11

    text = embed.as_c(embed.source(mslc.KERNELS))
    embedded = mslc.cached(["embedded", text], ".c", lambda tmp: tmp.write_text(text))
    csrc = mslc.REPO / "csrc"
    files = [p for p in sorted(csrc.glob("*/*.c")) if p.parent.name != "bind"] + [embedded]
    files += [p for p in sources() if "csrc" not in p.parts]
    planted = os.environ.get("FLASHMOE_METAL_PIPELINE")  # a copy of pipeline.c with a mistake
    if planted:
        files = [Path(planted) if p.name == "pipeline.c" else p for p in files]
    flags = [f"-fsanitize={san}", "-fno-omit-frame-pointer"] if san else []
    cxx = [mslc.CXX, *flags, "-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", '-DFM_VERSION="test"',
           "-I", csrc, "-I", pybind11.get_include(),
           "-I", sysconfig.get_paths()["include"]]  # fmt: skip

    def compile_cxx(path):
        before = mslc.run_tool([*cxx, "-E", path], f"preprocessing {path}").stdout

        def build(tmp):
            mslc.run_tool([*cxx, "-c", path, "-o", tmp], f"compiling {path}")

        return mslc.cached(["object", *cxx, before], ".o", build)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda f: compile_object(f, san), files))
        objects += list(pool.map(compile_cxx, sorted((csrc / "bind").glob("*.cpp"))))
    rt = mslc.runtime(san)

    def link(tmp):
        cmd = [
            mslc.CXX,
            *flags,
            *(["-shared-libsan"] if san else []),
            "-shared",
            "-o",
            tmp,
            *objects,
            rt,
            f"-Wl,-rpath,{rt.parent}",
        ]
        mslc.run_tool([*cmd, *gnustep()[1], "-lm", "-lpthread", "-ldl"], "linking the core")

    return mslc.cached(["core", *map(str, objects), rt], ".so", link)
