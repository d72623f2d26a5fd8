"""What cannot run here still calls what is there: every call in the GPU tests and benchmarks fits its signature."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "vllm_expert_prefetch"
FILES = [path for folder in ("tests/gpu", "benchmarks/gpu") for path in sorted((ROOT / folder).glob("*.py"))]
FILES += [ROOT / "tests" / "gpu_layer.py", ROOT / "tests" / "gpu_model.py"]


def callables_in(tree):
    """Name in the file -> the package's object, for all that it imports."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            module = importlib.import_module(node.module)
            for alias in node.names:  # one that is gone fails here
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return {name: value for name, value in found.items() if callable(value)}


def calls_that_do_not_fit(source):
    tree = ast.parse(source)
    known, wrong = callables_in(tree), []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known):
            continue
        if any(isinstance(value, ast.Starred) for value in node.args) or any(not word.arg for word in node.keywords):
            continue
        try:
            inspect.signature(known[node.func.id]).bind(*node.args, **{word.arg: word.value for word in node.keywords})
        except TypeError as error:
            wrong.append(f"line {node.lineno}: {node.func.id}: {error}")
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_call_fits_its_signature(path):
    assert calls_that_do_not_fit(path.read_text()) == []


def test_a_call_that_does_not_fit_is_found():
    source = f"from {PACKAGE}.memory.extent import Extent\nExtent.of(1)\nExtent(1)\nExtent(1, 2)\nExtent(1, shared=2)\n"
    assert calls_that_do_not_fit(source) == ["line 3: Extent: missing a required argument: 'shared'"]
