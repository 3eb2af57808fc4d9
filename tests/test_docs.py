"""What the documents say is run: snippets, doctests, commands, links."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import flashmoe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
MODULES = ["flashmoe"] + [
    m.name
    for m in pkgutil.walk_packages(flashmoe.__path__, "flashmoe.")
    if not m.name.endswith(("__main__", "._core", ".sampling"))
]
DOCUMENTS = [
    p
    for p in sorted(ROOT.rglob("*.md"))
    if not {"build", ".venv", "node_modules", ".git"} & set(p.relative_to(ROOT).parts)
]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
def test_readme_python_runs(number, tmp_path):
    code = blocks(README, "python")[number]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_doctests(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.failed == 0


def test_every_public_thing_has_a_docstring():
    """Modules, what `__all__` lists, and the methods of the classes that users get."""
    missing = []
    for name in MODULES:
        module = importlib.import_module(name)
        if not module.__doc__:
            missing.append(name)
        for item in getattr(module, "__all__", []):
            thing = getattr(module, item)
            if getattr(thing, "__module__", name) != name or not callable(thing):
                continue
            if not thing.__doc__:
                missing.append(f"{name}.{item}")
            is_class = isinstance(thing, type) and item in flashmoe.__all__
            for attribute, value in vars(thing).items() if is_class else ():
                is_code = callable(value) or isinstance(value, property)
                if is_code and not attribute.startswith("_") and not value.__doc__:
                    missing.append(f"{name}.{item}.{attribute}")
    assert not missing, "\n".join(missing)


def test_readme_commands_exist():
    """Every `flashmoe ...` line names a known command and known options."""
    from typer.main import get_command

    from flashmoe.cli import app

    commands = get_command(app).commands
    lines = [line.split("#")[0] for block in blocks(README, "sh") for line in block.splitlines()]
    used = [m[1] for line in lines if (m := re.search(r"(?:^|/|&& )flashmoe (.*)", line))]
    assert len(used) >= 6
    for use in used:
        name = use.split()[0]
        assert name in commands, use
        known = {flag for p in commands[name].params for flag in (*p.opts, *p.secondary_opts)}
        assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", use)) <= known, use


def test_ci_runs_the_commands_of_the_readme():
    setup = [
        line for block in blocks(README, "sh") for line in block.splitlines() if "setup" in line
    ]
    assert len(setup) == 2
    ci = (ROOT / ".ci/run").read_text()
    assert all(line in ci for line in setup)


def test_command_reference_is_up_to_date():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import make_cli_docs
    finally:
        sys.path.pop(0)
    text = make_cli_docs.render()
    assert (ROOT / "docs/cli.md").read_text() == text, "run python tools/make_cli_docs.py"


def test_links_lead_somewhere():
    wrong = []
    for document in DOCUMENTS:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in target and not (document.parent / target).exists():
                wrong.append(f"{document.relative_to(ROOT)}: {target}")
    assert not wrong, "\n".join(wrong)


def test_sizes_of_the_documents():
    assert README.count("\n") <= 150
    assert (ROOT / "CONTRIBUTING.md").read_text().count("\n") <= 120


def test_changelog_names_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text or f"## [{flashmoe.__version__}]" in text


@pytest.mark.parametrize("stub", ["_core", "sampling"])
def test_stubs_list_what_is_there(stub):
    module = importlib.import_module(f"flashmoe.{stub}")
    tree = ast.parse((ROOT / f"flashmoe/{stub}.pyi").read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            assert hasattr(module, node.name)
        elif isinstance(node, ast.ClassDef):
            cls = getattr(module, node.name)
            for item in node.body:
                name = item.target.id if isinstance(item, ast.AnnAssign) else item.name
                assert hasattr(cls, name), f"{node.name}.{name}"


def test_noise_model_is_what_its_script_makes(tmp_path, noise_model):
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/make_noise_model.py"), str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    made = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    kept = {p.name: p.read_bytes() for p in noise_model.iterdir()}
    assert made.keys() == kept.keys()
    for name in made.keys() - {"tokenizer.json"}:  # its layout is the library's affair
        assert made[name] == kept[name], name
