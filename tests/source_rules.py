"""Rules that source text must keep, checked without importing it: who imports what, and how long things may be."""

import ast
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "vllm_expert_prefetch"


@dataclass(frozen=True)
class Import:
    """One imported module by its full name, such as `vllm_expert_prefetch.residency.types`."""

    module: str
    line: int
    at_module_level: bool
    """False inside a function, and under `if TYPE_CHECKING`, which never runs."""

    @property
    def part(self) -> str | None:
        """The file or folder right below the package that is imported; "" for the package itself, None for others."""
        names = self.module.split(".")
        return None if names[0] != PACKAGE else names[1] if len(names) > 1 else ""


@dataclass(frozen=True)
class Rule:
    """What one file or folder right below the package may import.

    `parts`: other files and folders of the package. `torch` and `vllm`: "never", "late" (inside functions) or "yes".
    """

    parts: Collection[str] = ()
    torch: str = "never"
    vllm: str = "never"
    late_parts: Collection[str] = ()
    """Parts that may be imported inside functions only."""
    only_standard_library: bool = False


def imports_of(source: str) -> Iterator[Import]:
    """Every import of a module, wherever it stands. Relative ones raise ValueError: they hide the direction."""
    tree = ast.parse(source)
    late = {id(inner) for node in ast.walk(tree) if _runs_late(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"line {node.lineno}: relative import")
            # `from package import part` imports a part, `from module import name` does not: the longer name tells both.
            modules = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            yield Import(module, node.lineno, id(node) not in late)


def violations(source: str, own_part: str, rule: Rule) -> list[str]:
    """What in `source`, a module of `own_part`, breaks `rule`; one line each."""
    return [
        f"line {found.line}: {found.module} {why}"
        for found in imports_of(source)
        if (why := _why_not(found, own_part, rule))
    ]


def _why_not(found: Import, own_part: str, rule: Rule) -> str:
    root = found.module.split(".")[0]
    if root in ("torch", "vllm"):
        allowed = getattr(rule, root)
        refused = allowed == "never" or (allowed == "late" and found.at_module_level)
        return f"is imported here {allowed}" if refused else ""
    if found.part is None:
        return (
            "is not in the standard library"
            if rule.only_standard_library and root not in sys.stdlib_module_names
            else ""
        )
    if found.part in (own_part, "__version__", *rule.parts):
        return ""
    if found.part in rule.late_parts:
        return "may be imported inside functions only" if found.at_module_level else ""
    return f"is not below {own_part}"


def long_functions(source: str, limit: int) -> list[str]:
    """Functions of more than `limit` lines, decorators left out."""
    return [
        f"{node.name}: {length} lines"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and (length := node.end_lineno - node.lineno + 1) > limit
    ]


def python_files(*folders: Path) -> list[Path]:
    """Every Python file below `folders`, sorted."""
    return sorted(path for folder in folders for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def _runs_late(node: ast.AST) -> bool:
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
