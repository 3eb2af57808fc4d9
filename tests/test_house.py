"""The rules of the house that a machine can check (CONTRIBUTING.md says why)."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
C_FILES = sorted(p for d in ("csrc", "metal") for p in (ROOT / d).rglob("*.[chm]*") if p.is_file())
C_FILES = [p for p in C_FILES if p.suffix in (".c", ".h", ".cpp", ".m", ".metal")]
HEADERS = [p for p in C_FILES if p.suffix == ".h" and "kernels" not in p.parent.parts]
PYTHON = sorted((ROOT / "flashmoe").rglob("*.py"))

# folder -> folders its includes may name; storeys of the core, top to bottom
MAY_INCLUDE = {
    "base": {"base"},
    "quant": {"quant", "base"},
    "io": {"io", "base"},
    "cpu": {"cpu", "base", "quant"},
    "backend": {"backend", "cpu", "base", "quant"},
    "metal": {"metal", "backend", "base", "quant"},
    "store": {"store", "backend", "cpu", "io", "quant", "base"},
    "model": {"model", "store", "backend", "quant", "base"},
    "engine": {"engine", "model", "store", "backend", "cpu", "io", "quant", "base", "flashmoe.h"},
    "bind": {"bind", "flashmoe.h", "engine", "model", "store", "backend", "cpu", "io", "quant",
             "base"},
    "csrc": {"base"},  # flashmoe.h itself
}  # fmt: skip


def code_of(text: str) -> str:
    """Return C text without comments and without what is in string literals."""
    pattern = r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"'
    return re.sub(pattern, lambda m: '""' if m[0][0] == '"' else " ", text, flags=re.S)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


# ---- each rule: (folder, file name, text) -> what is wrong ----


def wrong_includes(folder, name, text):
    found = []
    for include in re.findall(r'^\s*#\s*(?:include|import)\s+"([^"]+)"', text, re.M):
        top = include.split("/")[0]
        if folder == "metal" and "/" not in include:
            continue  # its own headers lie beside it
        if top not in MAY_INCLUDE[folder]:
            found.append(f"{folder}/ must not include {include!r}")
        if "/" not in include and include != "flashmoe.h":
            found.append(f"{include!r} is not written from the csrc/ root")
    return found


def wrong_calls(folder, name, text):
    """The library never exits, aborts or prints, and one file reads the environment."""
    banned = (
        r"\b(exit|_exit|abort|quick_exit|printf|fprintf|vprintf|puts|putchar|fputs|perror)\s*\("
    )
    code = code_of(text)
    found = [f"calls {call}" for call in re.findall(banned, code)]
    if name != "env.c" and re.search(r"\b(secure_)?getenv\s*\(", code):
        found.append("calls getenv; base/env.c is the only place")
    return found


def wrong_switches(folder, name, text):
    """Only the folder that owns a list may tell its entries apart."""
    code, found = code_of(text), []
    owners = {
        r"FM_QUANT_AFFINE\d": ("quant", "cpu", "metal"),
        r"case\s+FM_QUANT_\w+": ("quant", "cpu", "metal"),
        r"FM_(?:ARCH|BACKEND|CPU)_(?!LIST|COUNT|VERSION|\w*_H\b|IMPL_H\b)[A-Z]\w*": (),
        r"fm_arch_(?:qwen|mixtral|olmoe|glm)\w+": ("model",),
        r"fm_io_method_\w+": ("io",),
    }
    for pattern, folders in owners.items():
        if folder not in folders:
            found += [f"{hit} outside its list" for hit in re.findall(pattern, code)]
    if re.search(r'\bstrcmp\s*\(\s*[^,"()]+,\s*"', re.sub(r"/\*.*?\*/", "", text, flags=re.S)):
        found.append("compares with a name; look it up in the list")
    return found


RULES = [wrong_includes, wrong_calls, wrong_switches]


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds_everywhere(rule):
    wrong = [
        f"{relative(p)}: {w}"
        for p in C_FILES
        if p.suffix != ".metal" and p.parent.name in MAY_INCLUDE
        for w in rule(p.parent.name, p.name, p.read_text())
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("rule", "folder", "text"),
    [
        (wrong_includes, "io", '#include "store/experts.h"\n'),
        (wrong_includes, "quant", '#include "io/io.h"\n'),
        (wrong_includes, "store", '#  include "model/router.h"\n'),
        (wrong_includes, "base", '#include "mem.h"\n'),
        (wrong_calls, "store", "if (x) { exit (1); }"),
        (wrong_calls, "base", "printf(s);"),
        (wrong_calls, "cpu", 'v = getenv("HOME");'),
        (wrong_switches, "model", "if (q == FM_QUANT_AFFINE4) {}"),
        (wrong_switches, "engine", "switch (q) { case FM_QUANT_F16: break; }"),
        (wrong_switches, "engine", "if (a == &fm_arch_qwen3_moe)"),
        (wrong_switches, "store", "fm_io_method_pread.open()"),
        (wrong_switches, "engine", 'if (strcmp(name, "metal") == 0)'),
    ],
)
def test_a_planted_violation_is_found(rule, folder, text):
    assert rule(folder, "planted.c", text)


@pytest.mark.parametrize(
    "text",
    ["/* exit(1) */ int x;", 'f("printf(%d)");', "snprintf(b, n, f); // abort()", "fm_exit(1);"],
)
def test_harmless_text_passes(text):
    assert not wrong_calls("base", "x.c", text)


def test_folders_are_known():
    known = {*MAY_INCLUDE, "kernels"}
    assert {p.parent.name for p in C_FILES} <= known


def test_sizes():
    """800 lines at most, 250 for a header, 400 for Python, 200 for a subcommand.

    ``cpu/vec_*.h`` are kernel bodies, compiled once per variant, not headers.
    """
    wrong = []
    for path in [*C_FILES, *PYTHON]:
        limit = 250 if path.suffix == ".h" else 400 if path.suffix == ".py" else 800
        limit = 200 if path.parent.name == "cli" else limit
        limit = 600 if path.name.startswith("vec_") else limit
        n_lines = path.read_text().count("\n")
        if n_lines > limit:
            wrong.append(f"{relative(path)}: {n_lines} lines, {limit} at most")
    assert not wrong, "\n".join(wrong)


def test_file_names_are_unique():
    names = Counter(p.name for p in C_FILES if p.parent.name != "bind")
    assert not [n for n, count in names.items() if count > 1]


def test_c_files_say_what_they_are():
    """The first line is a comment: what the file owns; a header may say it for its source."""
    wrong = [
        relative(p)
        for p in C_FILES
        if p.read_text()[:2] not in ("/*", "//") and not p.with_suffix(".h").is_file()
    ]
    assert not wrong


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (apt-get install gcc)")
def test_headers_compile_alone(tmp_path):
    """In one run per language: each header is the first include of a file of its own."""
    wrong, groups = [], {"c": [], "cc": []}
    for header in HEADERS:
        text = header.read_text()
        if header.is_relative_to(ROOT / "metal") or "not self-contained" in text:
            continue  # Objective-C needs a Mac's headers; template bodies say so in their head
        is_cxx = "pybind11" in text or header.parent.name == "bind"
        source = tmp_path / f"{header.parent.name}_{header.stem}.{'cc' if is_cxx else 'c'}"
        source.write_text(f'#include "{header.relative_to(ROOT / "csrc")}"\nint {header.stem}_;\n')
        groups["cc" if is_cxx else "c"].append(source)
    flags = ["-fsyntax-only", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(
        ["cc", "-std=gnu11", *flags, *map(str, groups["c"])], capture_output=True, text=True
    )
    if done.returncode:
        wrong.append(done.stderr)
    assert len(groups["c"]) > 20
    assert not wrong, "\n".join(wrong)


def test_python_keeps_out_of_the_cores_inside():
    """Only tests and benchmarks may use `_core.internals`."""
    wrong = [relative(p) for p in PYTHON if "internals" in p.read_text()]
    assert not wrong


def test_python_layers():
    """Readers and packing know no engine; nothing but the command knows the command."""
    wrong = []
    for path in PYTHON:
        package = path.relative_to(ROOT / "flashmoe").parts[0]
        text = path.read_text()
        if package in ("checkpoint", "pack", "config.py") and re.search(
            r"flashmoe\.(engine|session|prepare|generation)", text
        ):
            wrong.append(f"{relative(path)} imports the engine")
        if package not in ("cli", "__main__.py") and "flashmoe.cli" in text:
            wrong.append(f"{relative(path)} imports the command line")
    assert not wrong, "\n".join(wrong)


def test_version_is_in_one_place():
    import flashmoe
    from flashmoe import _core

    assert _core.version == flashmoe.__version__
    assert "version =" not in (ROOT / "pyproject.toml").read_text().split("[tool", 1)[0]
