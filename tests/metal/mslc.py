#!/usr/bin/env python3
"""Compile a .metal file for the CPU runner, only type-check it, or write PTX for an NVIDIA GPU.

Usage: mslc.py FILE.metal [-o OUT] [--check | --cuda] [--san address|thread|undefined]

The check pass uses real, distinct address spaces and C++14, as Metal's compiler does; the run
pass puts everything into one flat memory.  Results are cached by the hash of all inputs.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from msl_rewrite import BUILTINS, MslError, rewrite

HERE = Path(__file__).resolve().parent
REPO = HERE.parents[1]
KERNELS = Path(os.environ.get("FLASHMOE_METAL_KERNELS", REPO / "metal" / "kernels"))
INCLUDE_DIRS = [REPO / "metal", KERNELS]
CACHE = Path(os.environ.get("FLASHMOE_METAL_CACHE", REPO / "build" / "metal-tests"))
VERSION = "" if sys.platform == "darwin" else "-19"
CXX = os.environ.get("MSL_CXX", "clang++" + VERSION)
CC = os.environ.get("MSL_CC", "clang" + VERSION)
SANITIZERS = ("", "address", "thread", "undefined")
UNDEF = "".join(
    f"#undef {w}\n" for w in ["double", "constant", "kernel", "device", "thread", "threadgroup"]
)


def run_tool(cmd, what):
    result = subprocess.run([str(c) for c in cmd], capture_output=True, text=True)
    if result.returncode:
        text = (result.stderr or result.stdout).strip()
        raise MslError(f"{what} failed:\n{text[-6000:]}")
    return result


@functools.lru_cache(None)
def tool_digest():
    """Hash of the tool itself, so that a changed shim invalidates what was built with it."""
    h = hashlib.sha256()
    files = [HERE / "mslc.py", HERE / "msl_rewrite.py"]
    for path in files + sorted((HERE / "include").iterdir()) + sorted((HERE / "runtime").iterdir()):
        h.update(path.read_bytes())
    return h.hexdigest()


def preprocess(path, defines=(), include_dirs=None):
    """Text of `path` after #include, #if and macros, with line markers."""
    cmd = [CXX, "-E", "-x", "c++", "-std=c++20", "-nostdinc", "-nostdinc++", "-undef"]
    cmd += ["-DMSL_PREPROCESS", "-I", HERE / "include", "-I", Path(path).parent]
    for d in INCLUDE_DIRS if include_dirs is None else include_dirs:
        cmd += ["-I", d]
    cmd += [f"-D{d}" for d in defines]
    return run_tool([*cmd, path], "preprocessing").stdout


def quoted(unit):
    """The C++ tables (kernels, parameters, constants) of a run-pass library."""
    out = [UNDEF, '#include "msl_glue.h"']
    for n, k in enumerate(unit.kernels):
        rows = ",".join(f'{{{p.kind},{int(p.writable)},{p.index},"{p.name}"}}' for p in k.params)
        out.append(f"static msl_param P{n}[] = {{ {rows or '{0}'} }};")
        out.append(f"static void I{n}() {{ msl_glue::call({k.name}, P{n}); }}")
        out.append(f"static bool F{n} = msl_glue::fill({k.name}, P{n});")
    rows = ",".join(
        f'{{"{k.name}",I{n},P{n},{len(k.params)},{k.max_threads}}}'
        for n, k in enumerate(unit.kernels)
    )
    out.append(f"static const msl_kernel KS[] = {{ {rows}{',' if rows else ''}{{0,0,0,0,0}} }};")
    rows = "".join(
        f'{{"{name}",{index},&{name}.v,sizeof({name}.v),(unsigned char*)&{name}.defined}},'
        for _, name, index in unit.constants
    )
    out.append(f"static const msl_fconst FC[] = {{ {rows} {{0,-1,0,0,0}} }};")
    out.append(
        'extern "C" __attribute__((visibility("default"))) const msl_library *msl_get_library()'
        f"{{ static msl_library L = {{ KS, {len(unit.kernels)}, FC, {len(unit.constants)} }};"
        " return &L; }"
    )
    return "\n".join(out) + "\n"


def cuda_entry(unit):
    """One __global__ function per kernel, taking the bindings by value."""
    enum = "enum { " + ",".join("MSL_B_" + b for b in BUILTINS) + " };\n"
    out = [UNDEF, enum, '#include "msl_cuda_glue.h"\n']
    for k in unit.kernels:
        args = "".join(f", msl_glue::P{{{p.kind},{p.index}}}" for p in k.params)
        bounds = f" __attribute__((launch_bounds({k.max_threads})))" if k.max_threads else ""
        out.append(
            f'extern "C" __attribute__((__global__)){bounds} void {k.name}__k(msl_cargs a)'
            f" {{ msl_glue::call({k.name}, a{args}); }}\n"
        )
    return "".join(out)


def cached(key, suffix, build):
    """Path of a built file; `build(tmp)` is called only when the cache lacks it."""
    CACHE.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256("\0".join([tool_digest(), *map(str, key)]).encode()).hexdigest()[:24]
    path = CACHE / (digest + suffix)
    if not path.exists():
        tmp = CACHE / f"{digest}.{os.getpid()}{suffix}"
        build(tmp)
        os.replace(tmp, path)
    return path


def flags_common():
    return [CXX, "-nostdinc++", "-isystem", HERE / "include", "-I", HERE / "runtime",
            "-Wno-user-defined-literals", "-Wno-reserved-user-defined-literal",
            "-fno-exceptions", "-fno-rtti"]  # fmt: skip


def check(path, defines=(), include_dirs=None):
    """Type-check with address spaces; raises MslError with the compiler's text."""
    source = preprocess(path, defines, include_dirs)
    text, _ = rewrite(source, "check")

    def build(tmp):
        cpp = tmp.with_suffix(".cpp")
        cpp.write_text("#include <metal_stdlib>\n" + text)
        cmd = [*flags_common(), "-std=c++14", "-DMSL_CHECK", "-fsyntax-only", "-Wall", "-Wextra"]
        cmd += ["-Werror=c++17-extensions", "-Werror=c++20-extensions", "-Werror=uninitialized"]
        cmd += ["-Werror=unused-variable", "-Wno-unused-function", "-Wno-unused-parameter", cpp]
        run_tool(cmd, "the check pass")
        tmp.write_text("ok\n")

    return cached(["check", source], ".ok", build)


def compile_run(path, san="", defines=(), include_dirs=None, opt=None):
    """Build the CPU library of a .metal file; returns the path of the shared object."""
    if san not in SANITIZERS:
        raise ValueError(f"sanitizer {san!r}: one of {SANITIZERS}")
    source = preprocess(path, defines, include_dirs)
    text, unit = rewrite(source, "run")
    opt = opt or ("-O1" if san else "-O2")

    def build(tmp):
        cpp = tmp.with_suffix(".cpp")
        cpp.write_text("#include <metal_stdlib>\n" + text + "\n" + quoted(unit))
        cmd = [*flags_common(), "-std=c++20", opt, "-gline-tables-only", "-march=native", "-w"]
        cmd += ["-Xclang", "-ffloat16-excess-precision=none", "-fno-math-errno", "-fPIC"]
        cmd += ["-shared", "-fvisibility=hidden", "-o", tmp, cpp]
        if san:
            cmd += [f"-fsanitize={san}", "-fno-omit-frame-pointer", "-shared-libsan"]
        if san == "undefined":
            cmd += ["-fno-sanitize-recover=undefined"]
        run_tool(cmd, "compiling")

    return cached(["run", san, opt, source], ".so", build)


def compile_cuda(path, out, values=None, defines=(), include_dirs=None):
    """Write PTX for sm_90; function constants take `values` (by name), else 0."""
    defines = (*defines, "FM_OWN_UNITS")  # include/msl_cuda_simd.h has them
    text, unit = rewrite(preprocess(path, defines, include_dirs), "cuda", values)
    begin, end = (f"#pragma clang force_cuda_host_device {w}\n" for w in ("begin", "end"))
    cu = Path(out).with_suffix(".cu")
    cu.write_text(
        f"#define MSL_CUDA\n{begin}#include <metal_stdlib>\n{text}\n{cuda_entry(unit)}{end}"
    )
    cmd = [*flags_common()[:6], "-x", "cuda", "--cuda-device-only", "--cuda-gpu-arch=sm_90"]
    cmd += ["-nocudainc", "-nocudalib", "--no-cuda-version-check", "-std=c++20", "-O3", "-w"]
    cmd += ["-Wno-c++11-narrowing"]
    cmd += ["-Xclang", "-target-feature", "-Xclang", "+ptx80", "-Xclang", "-mlink-builtin-bitcode"]
    cmd += ["-Xclang", "/usr/local/cuda/nvvm/libdevice/libdevice.10.bc"]
    run_tool([*cmd, "-I", HERE / "runtime", "-S", "-o", out, cu], "compiling for CUDA")
    return Path(out)


def runtime(san=""):
    """Build the runner's own library (fibers, barriers, simdgroups)."""
    source = (HERE / "runtime" / "msl_rt.cpp").read_text()

    def build(tmp):
        cmd = [CXX, "-O2" if not san else "-O1", "-g", "-fPIC", "-shared", "-std=c++17"]
        cmd += ["-Wall", "-Wextra", "-Werror", "-I", HERE / "runtime", "-o", tmp]
        if san:
            cmd += [f"-fsanitize={san}", "-shared-libsan"]
        run_tool([*cmd, HERE / "runtime" / "msl_rt.cpp"], "building the runner")

    return cached(["runtime", san, source], ".so", build)


@functools.lru_cache(None)
def sanitizer_library(san):
    """Path of clang's shared sanitizer runtime, for LD_PRELOAD."""
    short = {"address": "asan", "thread": "tsan", "undefined": "ubsan_standalone"}[san]
    name = f"libclang_rt.{short}-{os.uname().machine}.so"
    found = run_tool([CXX, f"-print-file-name={name}"], "finding the sanitizer").stdout.strip()
    if not os.path.isabs(found):
        raise MslError(f"{name} is not installed (package libclang-rt-19-dev)")
    return found


def missing():
    """Name of a tool that is not installed, or None."""
    return next((t for t in (CXX, CC) if not shutil.which(t)), None)


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("file")
    ap.add_argument("-o", "--out")
    ap.add_argument("--check", action="store_true")
    ap.add_argument("--cuda", action="store_true")
    ap.add_argument("--embedded", action="store_true", help="check, compile, print the library")
    ap.add_argument("--san", default="", choices=SANITIZERS)
    ap.add_argument("-D", dest="defines", action="append", default=[])
    args = ap.parse_args(argv)
    try:
        if args.cuda:
            compile_cuda(args.file, args.out, defines=args.defines)
        elif args.embedded:  # as a device compiles the text that it is handed
            check(args.file, args.defines, include_dirs=[])
            print(compile_run(args.file, args.san, args.defines, include_dirs=[]))
        elif args.check:
            check(args.file, args.defines)
        else:
            made = compile_run(args.file, args.san, args.defines)
            shutil.copy(made, args.out) if args.out else print(made)
    except MslError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
