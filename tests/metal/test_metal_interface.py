"""The host against Apple's published interface.

`fake/api/Metal/Metal.h` declares what the host uses. Each selector, argument type, return type and
enum value in it must be what metal-cpp (Apple's own C++ twin of the framework) says, so neither
the stand-in nor the host can rest on something invented. Then the host is parsed with Apple's target.
"""

import importlib.util
import os
import re
from pathlib import Path

import hostlib
import mslc
import pytest

METAL_CPP = Path(os.environ.get("FLASHMOE_METAL_CPP") or
                 mslc.REPO / "build/metal-cpp/mlx/include/metal_cpp")  # fmt: skip
HEADER = (hostlib.FAKE / "api" / "Metal" / "Metal.h").read_text()
published = pytest.mark.skipif(
    not (METAL_CPP / "Metal").is_dir(),
    reason="no metal-cpp headers: python tests/metal/fetch_metal_cpp.py",
)


# ---- our header


def objc_type(text):
    """`id<MTLBuffer>` -> Buffer *, NSUInteger -> UInteger, ...; const is not compared."""
    text = re.sub(r"\bconst\b", "", text).strip()
    if "(^)" in text:
        return "block"
    text = re.sub(r"id<(\w+)>", r"\1 *", text)
    base, stars = re.match(
        r"(\w+)\s*(\**)$", re.sub(r"\s+", " ", text).replace("* *", "**")
    ).groups()
    base = {"BOOL": "bool", "uint64_t": "uint64_t", "MTLCommandBufferHandler": "block"}.get(
        base, re.sub(r"^(NS|MTL)", "", base)
    )
    return base + stars


def declared():
    """{(class, selector): (return type, [argument types])} of our header."""
    out = {}
    for name, body in re.findall(
        r"@(?:protocol|interface) MTL(\w+)(?: <\w+>| : \w+)\n(.*?)@end", HEADER, re.S
    ):
        for method in re.findall(r"^- (.*?);", body, re.S | re.M):
            method = re.sub(r"\s+", " ", method)
            parts = re.findall(r"(\w+)(:)?(?:\(((?:[^()]|\([^()]*\))*)\)\w+)?", method)
            kind = re.match(r"\((.*?)\)", method).group(1)
            rest = method[len(kind) + 2 :]
            parts = re.findall(r"(\w+):\(((?:[^()]|\([^()]*\))*)\)\s*\w+", rest)
            selector = "".join(p[0] + ":" for p in parts) or rest.strip()
            out[name, selector] = (objc_type(kind), [objc_type(p[1]) for p in parts])
    return out


def declared_values():
    """Enum constants of our header."""
    return {n: int(v) for n, v in re.findall(r"^    (MTL\w+) = (\d+),", HEADER, re.M)}


# ---- metal-cpp


def cpp_type(text):
    text = re.sub(r"\b(const|class|struct|enum)\b", "", text).strip()
    if "(^" in text or "Handler" in text:
        return "block"
    return re.sub(r"\s+", "", re.sub(r"\w+::", "", text))


def split_params(text):
    out, depth, current = [], 0, ""
    for ch in text:
        depth += (ch in "(<") - (ch in ")>")
        if ch == "," and depth == 0:
            out.append(current)
            current = ""
        else:
            current += ch
    return [p.strip() for p in [*out, current] if p.strip()]


def cpp_param(text):
    block = re.match(r".*\(\^", text)
    return "block" if block else cpp_type(re.sub(r"\w+$", "", text.strip()))


def methods():
    """{(class, selector): [(return type, [argument types]), ...]} of metal-cpp."""
    bridge = (METAL_CPP / "Metal" / "MTLHeaderBridge.hpp").read_text()
    selectors = dict(re.findall(r'_MTL_PRIVATE_DEF_SEL\(\s*(\w+)\s*,\s*"([^"]+)"', bridge))
    out = {}
    files = sorted((METAL_CPP / "Metal").glob("MTL*.hpp"))
    plain = dict(re.findall(r"using (\w+) = (uint\d+_t);", "".join(p.read_text() for p in files)))
    for path in files:
        for kind, cls, params, body in re.findall(
            r"_MTL_INLINE ([^\n{;]+?)\s*MTL::(\w+)::\w+\(([^\n]*)\)(?: const)?\n\{(.*?)\n\}",
            path.read_text(), re.S):  # fmt: skip
            sent = re.search(
                r"sendMessage(?:Safe)?<.*?>\(\s*this,\s*_MTL_PRIVATE_SEL\((\w+)\)", body
            )
            if sent and sent.group(1) in selectors and "function" not in params:
                types = [cpp_type(kind), *(cpp_param(p) for p in split_params(params))]
                types = [plain.get(t, t) for t in types]
                made = (types[0], types[1:])
                out.setdefault((cls, selectors[sent.group(1)]), []).append(made)
    return out


PARENTS = {"ComputeCommandEncoder": ["CommandEncoder"]}


@published
def test_every_method_is_published():
    known, wrong = methods(), []
    for (cls, selector), mine in declared().items():
        found = [t for c in [cls, *PARENTS.get(cls, [])] for t in known.get((c, selector), [])]
        if mine not in found:
            wrong.append(f"{cls} {selector}: {mine}, published {found}")
    assert len(declared()) >= 30
    assert not wrong, "\n".join(wrong)


@published
def test_every_constant_is_published():
    text = "\n".join(p.read_text() for p in sorted((METAL_CPP / "Metal").glob("MTL*.hpp")))
    for name, value in declared_values().items():
        found = re.findall(rf"\b{name[3:]} = ([^,\n]+),", text)
        assert found, name
        assert value in [
            eval(f, {"__builtins__": {}}) for f in found if re.match(r"[\d <]+$", f)
        ], name


@published
def test_a_wrong_declaration_is_noticed(monkeypatch):
    """The comparison itself: each planted slip in our header must fail it."""
    slips = [
        ("gpuAddress", "gpuAdress"),
        ("- (uint64_t)gpuAddress", "- (NSUInteger)gpuAddress"),
        ("usage:(MTLResourceUsage)usage", "usages:(MTLResourceUsage)usage"),
        ("atIndex:(NSUInteger)index", "atIndex:(uint64_t)index"),
        ("(MTLCompileOptions *)options", "(NSString *)options"),
    ]
    for old, new in slips:
        monkeypatch.setattr("test_metal_interface.HEADER", HEADER.replace(old, new))
        with pytest.raises(AssertionError):
            test_every_method_is_published()


def test_host_uses_only_declared_selectors():
    """-Werror with our header: an undeclared selector or a wrong argument does not compile."""
    for path in sorted((mslc.REPO / "metal").glob("*.m")):
        hostlib.compile_object(path, "")


@pytest.mark.parametrize("path", sorted((mslc.REPO / "metal").glob("*.m")), ids=lambda p: p.name)
def test_parses_for_apple_silicon(path):
    """clang -fsyntax-only for arm64-apple-macos14, warnings as errors, Apple's runtime and libc."""
    zig = importlib.util.find_spec("ziglang")
    if not zig:
        pytest.skip("no Darwin libc headers: pip install ziglang==0.17.1")
    libc = Path(zig.origin).parent / "lib" / "libc" / "include" / "any-darwin-any"
    cmd = [mslc.CC, "-target", "arm64-apple-macos14", "-fsyntax-only", "-std=gnu11", "-fblocks"]
    cmd += ["-fobjc-runtime=macosx", "-fno-objc-arc", "-nostdlibinc", *hostlib.WARNINGS]
    cmd += ["-Wconversion", "-Wno-sign-conversion", "-isystem", libc, "-I", mslc.REPO / "csrc"]
    cmd += ["-I", mslc.REPO / "metal", "-I", hostlib.FAKE / "api", "-I", hostlib.FAKE / "apple"]
    mslc.run_tool([*cmd, path], f"parsing {path.name}")
