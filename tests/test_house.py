"""The house: arrows between folders point one way, and nothing shadows a library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODEL_FILES = sorted((ROOT / "modeling_anira").glob("*.py"))
SCRIPTS = sorted(
    path for folder in ("train", "evaluate", "release", "benchmarks") for path in (ROOT / folder).glob("*.py")
)


def imports(path: Path) -> list[tuple[int, str]]:
    """(number of leading dots, top-level module) of every import in a file, also inside functions."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, (node.module or "").split(".")[0]))
    return found


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_model_files_travel_alone(path):
    """They become remote code: flat relative imports, and nothing but torch, transformers and its hub client."""
    allowed = {"torch", "transformers", "huggingface_hub"} | set(sys.stdlib_module_names)
    for dots, module in imports(path):
        assert dots <= 1
        if dots:
            assert (path.parent / f"{module}.py").exists(), f"`from . import {module}` is not copied with a checkpoint"
        else:
            assert module in allowed, module


@pytest.mark.parametrize("path", MODEL_FILES, ids=lambda path: path.name)
def test_model_files_do_nothing_that_remote_code_should_not(path):
    forbidden = {"subprocess", "socket", "urllib", "http", "requests", "pickle", "marshal", "ctypes", "shutil", "os"}
    assert not {module for _, module in imports(path)} & forbidden
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"eval", "exec", "compile", "open", "__import__", "print"}


@pytest.mark.parametrize("path", sorted((ROOT / "datasets_scripts").glob("*.py")), ids=lambda path: path.name)
def test_tasks_know_no_other_folder(path):
    ours = {folder.name for folder in ROOT.iterdir() if folder.is_dir()} - {"datasets_scripts", "evaluate"}
    assert not {module for _, module in imports(path)} & ours


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_scripts_import_no_folder_that_is_not_installed(path):
    """`evaluate/results.py` once imported `train.recipe`, which pytest finds, as it has the root on its path, and a
    command does not."""
    assert not {module for _, module in imports(path)} & {"train", "release", "benchmarks", "tests"}


def test_the_evaluate_library_is_not_shadowed():
    assert not (ROOT / "evaluate" / "__init__.py").exists()
    assert not (ROOT / "train" / "__init__.py").exists()
    code = "import importlib.util as u; print(u.find_spec('evaluate').origin)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "site-packages" in found
