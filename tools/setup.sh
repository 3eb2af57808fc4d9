#!/bin/sh
# Makes .venv with flashmoe in it: `sh tools/setup.sh`, or `sh tools/setup.sh test` with what the
# tests need, installed in place. Needs Python 3.10 or newer and a C and C++ compiler; on Debian and
# Ubuntu what is missing is installed when this runs as root or through sudo.
set -eu
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"

missing() {
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 || echo python3-venv
    "$python" -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || echo python3-dev
    command -v c++ >/dev/null || echo g++
    command -v cc >/dev/null || echo gcc
}

command -v "$python" >/dev/null || { echo "flashmoe: no $python; install Python 3.10 or newer" >&2; exit 1; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "flashmoe: $python is older than 3.10; set PYTHON=" >&2; exit 1; }
packages=$(missing | tr '\n' ' ')
if [ -n "$packages" ]; then
    if ! command -v apt-get >/dev/null; then
        echo "flashmoe: missing: $packages(macOS: xcode-select --install)" >&2
        exit 1
    fi
    as_root=""
    [ "$(id -u)" = 0 ] || as_root=sudo
    $as_root apt-get update
    DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y --no-install-recommends $packages
fi

[ -x .venv/bin/python ] || "$python" -m venv .venv
if [ "${1:-}" = test ]; then
    .venv/bin/python -m pip install --quiet -e '.[test]'
    # where the Metal tests can run: Darwin's libc headers and Apple's interface, which they parse
    if command -v clang-19 >/dev/null; then
        { .venv/bin/python -m pip install --quiet ziglang==0.17.1 &&
            .venv/bin/python tests/metal/fetch_metal_cpp.py; } ||
            echo "setup: not fetched: the tests of Metal's interface will skip and say how"
    fi
else
    .venv/bin/python -m pip install --quiet .
fi
