"""Import direction and size of the source: each file or folder of the package has one rule, and no file is without."""

from pathlib import Path

import pytest
from processes import run_python
from source_rules import PACKAGE, Rule, imports_of, long_functions, python_files, violations

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / PACKAGE
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Lowest first: a rule names only what stands above it.
RULES = {
    "__init__": Rule(),
    "residency": Rule(only_standard_library=True),
    "locks": Rule(only_standard_library=True),
    "native": Rule(["residency"], torch="late"),
    "config": Rule(["residency"]),
    "memory": Rule(["native", "config", "locks"], torch="yes"),
    "cache": Rule(["native", "residency", "config", "memory"], torch="yes"),
    "metrics": Rule(["config", "cache", "locks"], torch="yes"),
    "tracing": Rule(["config", "cache"], torch="yes"),
    "planning": Rule(["native", "residency", "config", "memory", "cache", "tracing"]),
    "prediction": Rule(["native", "residency", "config"], torch="yes"),
    "lookahead": Rule(["config", "memory", "cache", "metrics", "prediction"], torch="yes"),
    "calibration": Rule(["residency", "config", "prediction"], torch="yes"),
    "demo": Rule(torch="yes"),
    "bench": Rule(["metrics", "planning"], late_parts=["demo"], vllm="late"),
    "serving": Rule(
        [
            *["native", "residency", "config", "memory", "cache", "metrics", "tracing", "planning", "prediction"],
            "lookahead",
            "locks",
        ],
        torch="yes",
        vllm="yes",
    ),
    "studies": Rule(["config", "prediction", "lookahead", "serving"], torch="yes", vllm="late"),
    "plugin": Rule(late_parts=["serving"]),
    "ray_serve": Rule(),
    "cli": Rule(
        ["native", "residency", "config", "metrics", "tracing", "planning", "locks"],
        late_parts=["memory", "cache", "prediction", "lookahead", "calibration", "demo", "bench", "serving", "studies"],
        torch="late",
        vllm="late",
    ),
}
WITHOUT_TORCH = (
    "plugin",
    "config",
    "native.library",
    "residency",
    "planning.sizing",
    "planning.plan",
    "planning.replayed",
    "planning.simulate",
    "tracing.trace",
    "metrics.collector",
    "metrics.counters",
    "cli.main",
)

SHIPPED = python_files(SOURCE, ROOT / "benchmarks", ROOT / ".ci", ROOT / "deploy")


def each(files):
    return pytest.mark.parametrize("path", files, ids=lambda path: str(path.relative_to(ROOT)))


def part_of(path):
    """The file or folder right below the package."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def test_every_file_has_a_rule():
    assert {part_of(path) for path in python_files(SOURCE)} <= RULES.keys()


def test_rules_name_only_what_is_lower():
    for index, (part, rule) in enumerate(RULES.items()):
        assert {*rule.parts, *rule.late_parts} <= set(list(RULES)[:index]), part


@each(python_files(SOURCE))
def test_nothing_imports_upwards(path):
    part = part_of(path)
    assert violations(path.read_text(), part, RULES[part]) == []


def test_only_serving_imports_vllm_when_it_is_imported():
    importing = {
        part_of(path)
        for path in python_files(SOURCE)
        for found in imports_of(path.read_text())
        if found.module.split(".")[0] == "vllm" and found.at_module_level
    }
    assert importing <= {"serving"}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_importing_it_loads_neither_torch_nor_vllm(module):
    output = run_python(f"""
        import sys
        import {PACKAGE}.{module}
        print(sorted({{"torch", "vllm", "transformers"}} & sys.modules.keys()))
    """)
    assert output.strip() == "[]"


@each(SHIPPED)
def test_no_file_is_too_long_to_read_at_once(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES


@each(SHIPPED + python_files(ROOT / "tests"))
def test_no_function_is_too_long_to_read_at_once(path):
    assert long_functions(path.read_text(), MAX_FUNCTION_LINES) == []


LOW = Rule(["residency"], only_standard_library=True)
MIDDLE = Rule(["residency"], torch="late", vllm="late", late_parts=["serving"])


@pytest.mark.parametrize(
    ("source", "rule", "broken"),
    [
        ("import os.path, json", LOW, False),
        ("import numpy", LOW, True),
        ("from numpy.linalg import norm", LOW, True),
        (f"from {PACKAGE}.residency import Plan", LOW, False),
        (f"from {PACKAGE}.memory import HostStore", LOW, True),
        (f"from {PACKAGE} import memory", LOW, True),
        (f"from {PACKAGE} import __version__", LOW, False),
        (f"import {PACKAGE}.memory.link", LOW, True),
        (f"def f():\n    from {PACKAGE}.memory import link", LOW, True),
        (f"class A:\n    import {PACKAGE}.memory", LOW, True),
        (f"try:\n    import {PACKAGE}.memory\nexcept ImportError:\n    pass", LOW, True),
        (f"if TYPE_CHECKING:\n    from {PACKAGE}.memory import HostStore", LOW, True),
        ("import torch", LOW, True),
        ("import torch", MIDDLE, True),
        ("from torch.nn import Module", MIDDLE, True),
        ("if TYPE_CHECKING:\n    import torch", MIDDLE, False),
        ("def f():\n    import torch", MIDDLE, False),
        ("def f():\n    def g():\n        import vllm.config", MIDDLE, False),
        ("import vllm", MIDDLE, True),
        (f"from {PACKAGE}.serving import compat", MIDDLE, True),
        (f"def f():\n    from {PACKAGE}.serving import compat", MIDDLE, False),
    ],
)
def test_the_rules_are_checked_as_written(source, rule, broken):
    assert bool(violations(source, "own", rule)) == broken


def test_relative_imports_are_refused():
    with pytest.raises(ValueError, match="relative import"):
        list(imports_of("from . import types"))


def test_functions_are_measured_wherever_they_stand():
    source = "class A:\n    def f(self):\n" + "        pass\n" * 5
    assert long_functions(source, 5) == ["f: 6 lines"]
    assert long_functions(source, 6) == []
