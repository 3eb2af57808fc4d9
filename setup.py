"""Builds the C core as a static library, `_core` (pybind11) over it, and `sampling` (Cython).

One static library keeps one flag set per language: a C++ extension with C sources in it would
hand -std=c++17 to the C compiler, which clang refuses.  Only `_core` links the core; a second copy
in `sampling` would have its own kernel table and error message.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
import sysconfig
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import Extension, setup
from setuptools.command.build_clib import build_clib

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "flashmoe/__init__.py").read_text(), re.M)[1]

CORE_SOURCES = sorted(s for s in glob("csrc/*/*.c") if not s.startswith("csrc/bind/"))
HEADERS = sorted(glob("csrc/*.h") + glob("csrc/*/*.h"))
# No contraction: where the compiler may fuse scale * code + bias, results differ by processor.
C_FLAGS = ["-std=gnu11", "-O2", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"]
C_FLAGS += ["-fPIC", "-pthread"]
CXX_FLAGS = ["-O2", "-fvisibility=hidden", "-Wall", "-Wextra"]
MACROS = [("FM_VERSION", f'"{VERSION}"')]
# Only CI builds with FLASHMOE_WERROR=1: a newer compiler's new warning must not stop a user.
if os.environ.get("FLASHMOE_WERROR") == "1":
    C_FLAGS.append("-Werror")
    CXX_FLAGS.append("-Werror")
# FLASHMOE_BOUNDSCHECK=1 builds the sampler with bounds checks, to run its tests on.
BOUNDSCHECK = os.environ.get("FLASHMOE_BOUNDSCHECK") == "1"
LINK_ARGS = ["-pthread"]
INCLUDE_DIRS = ["csrc"]


def add_metal():
    """Put the Metal backend into the build, its shaders as text: Apple silicon only."""
    sys.path.insert(0, str(ROOT / "metal"))
    import embed

    shaders = Path("build/metal/metal_source.c")
    shaders.parent.mkdir(parents=True, exist_ok=True)
    text = embed.as_c(embed.source())
    if not shaders.exists() or shaders.read_text() != text:
        shaders.write_text(text)
    CORE_SOURCES.extend([*sorted(glob("metal/*.m")), str(shaders)])
    HEADERS.extend(sorted(glob("metal/*.h")))
    INCLUDE_DIRS.append("metal")
    MACROS.append(("FM_HAVE_METAL", "1"))
    LINK_ARGS.extend(["-framework", "Metal", "-framework", "Foundation"])


if sys.platform == "darwin" and platform.machine() == "arm64":
    add_metal()


class BuildCore(build_clib):
    """build_clib that compiles only what is out of date, in a folder that outlives the command."""

    def finalize_options(self):
        super().finalize_options()
        # pip builds in a fresh folder every time; C objects depend on no Python, so keep them here
        key = hashlib.sha256(repr([os.environ.get(v) for v in ("CC", "CFLAGS")] + C_FLAGS).encode())
        self.build_temp = f"build/core/{sysconfig.get_platform()}-{key.hexdigest()[:8]}"
        self.build_clib = f"{self.build_temp}/lib"

    def build_libraries(self, libraries):
        newest = max(os.path.getmtime(h) for h in [*HEADERS, "setup.py"])
        for name, info in libraries:
            objects = self.compiler.object_filenames(info["sources"], output_dir=self.build_temp)
            stale = [
                source
                for source, obj in zip(info["sources"], objects)
                if not os.path.exists(obj)
                or os.path.getmtime(obj) < max(newest, os.path.getmtime(source))
            ]
            self.compiler.compile(
                stale,
                output_dir=self.build_temp,
                macros=info["macros"],
                include_dirs=info["include_dirs"],
                extra_postargs=info["cflags"],
            )
            self.compiler.create_static_lib(objects, name, output_dir=self.build_clib)


core = (
    "flashmoe_core",
    {
        "sources": CORE_SOURCES,
        "include_dirs": INCLUDE_DIRS,
        "macros": MACROS,
        "cflags": C_FLAGS,
    },
)
extensions = [
    Pybind11Extension(
        "flashmoe._core",
        sorted(glob("csrc/bind/*.cpp")),
        include_dirs=["csrc"],
        define_macros=MACROS,
        cxx_std=17,
        extra_compile_args=CXX_FLAGS,
        extra_link_args=LINK_ARGS,
        depends=[*CORE_SOURCES, *HEADERS, *sorted(glob("csrc/bind/*.h"))],
    ),
    *cythonize(
        [Extension("flashmoe.sampling", ["flashmoe/sampling.pyx"], extra_compile_args=["-O3"])],
        build_dir="build/cython",
        force=BOUNDSCHECK,
        compiler_directives={
            "language_level": 3,
            "boundscheck": BOUNDSCHECK,
            "wraparound": False,
            "initializedcheck": BOUNDSCHECK,
            "cdivision": True,
        },
    ),
]

if sys.platform == "win32":
    raise SystemExit("flashmoe: Windows is not supported; use Linux, macOS or WSL")

ParallelCompile(default=os.cpu_count()).install()
setup(libraries=[core], ext_modules=extensions, cmdclass={"build_clib": BuildCore})
