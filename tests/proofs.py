"""Which features were proved, and by which tests: what `@pytest.mark.proves` says, and `features.json`, which holds the
proofs that have passed. `make features` runs them all.
"""

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROVED = Path(__file__).with_name("features.json")
"""feature -> platform -> test, by its node id without parameters -> what it says in place of "proven", or ""."""


class Proof(NamedTuple):
    """What a test shows of a feature on a platform: `cpu`, `shim` (the GPU's path without a GPU), or `any` of them."""

    feature: str
    platform: str
    says: str
    test: str


def proof(feature: str, platform: str = "cpu", says: str = "", test: str = "") -> Proof:
    """The arguments of `@pytest.mark.proves`. `says` stands in the table where that is not "proven"."""
    assert platform in ("cpu", "shim", "any"), platform
    return Proof(feature, platform, says, test)


def marked(folder: Path = ROOT / "tests") -> set[Proof]:
    """Every proof that a test function below `folder` is marked with, found without importing it."""
    found = set()
    for path in folder.rglob("test_*.py"):
        text = path.read_text()
        for node in ast.parse(text).body if "pytest.mark.proves(" in text else ():
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                test = f"{path.relative_to(folder.parent).as_posix()}::{node.name}"
                found |= {given._replace(test=test) for given in _marks(node)}
    return found


def _marks(function: ast.FunctionDef) -> Iterator[Proof]:
    for node in (node for decorator in function.decorator_list for node in ast.walk(decorator)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.proves":
            named = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in node.keywords}
            yield proof(*map(ast.literal_eval, node.args), **named)


def read_proofs(path: Path = PROVED) -> set[Proof]:
    """The proofs that a file holds."""
    return {
        Proof(feature, platform, says, test)
        for feature, platforms in json.loads(path.read_text()).items()
        for platform, tests in platforms.items()
        for test, says in tests.items()
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Note in each test's reports what it proves: they may come from another process."""
    for item in items:
        marks = item.iter_markers("proves")
        item.user_properties += [("proves", tuple(proof(*mark.args, **mark.kwargs))) for mark in marks]


class Writer:
    """Of pytest's `--write-features FILE`: adds proofs that pass, and takes out those that do not, or that no test is
    marked with."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._passed: dict[Proof, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A proof has passed if every phase of every case has."""
        for name, given in report.user_properties:
            if name == "proves":
                one = proof(*given)._replace(test=report.nodeid.partition("[")[0])  # type: ignore[misc]
                self._passed[one] = self._passed.get(one, True) and report.passed

    def pytest_sessionfinish(self) -> None:
        """Write the file."""
        known = (read_proofs(self._path) if self._path.exists() else set()) - self._passed.keys()
        kept = (known | {one for one, passed in self._passed.items() if passed}) & marked()
        features: dict[str, dict[str, dict[str, str]]] = {}
        for feature, platform, says, test in sorted(kept, key=lambda one: (one.feature, one.platform, one.test)):
            features.setdefault(feature, {}).setdefault(platform, {})[test] = says
        self._path.write_text(json.dumps(features, indent=1) + "\n")
