"""Show that the fast tests notice when the code is wrong: apply each mutant of tests/mutants.toml, expect a failure.

    python .ci/mutants.py [NAME ...]

A mutant is one replaced text in one file. It is applied to a copy of the tree, of which there is one for each core, and
its tests run there; a mutant of the C++ sources is compiled first. A mutant that survives, or whose text does not occur
exactly once, makes the run fail.
"""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIED = (
    "vllm_expert_prefetch",
    "csrc",
    "tests",
    "benchmarks",
    "deploy",
    "docs",
    "setup.py",
    "pyproject.toml",
    "README.md",
)
SECONDS = 300


def main() -> int:
    """Run every mutant, or those named on the command line."""
    mutants = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    wanted = sys.argv[1:]
    if unknown := set(wanted) - {mutant["name"] for mutant in mutants}:
        raise SystemExit(f"no such mutant: {', '.join(sorted(unknown))}")
    chosen = [mutant for mutant in mutants if not wanted or mutant["name"] in wanted]
    bad = []
    at_once = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
        trees: queue.SimpleQueue[Path] = queue.SimpleQueue()
        for number in range(at_once):
            trees.put(copy_of_the_tree(Path(folder, str(number))))

        def in_a_free_tree(mutant: dict[str, Any]) -> str:
            tree = trees.get()
            try:
                return try_mutant(tree, mutant)
            finally:
                trees.put(tree)

        for number, (mutant, verdict) in enumerate(zip(chosen, pool.map(in_a_free_tree, chosen), strict=True), 1):
            print(f"{number:3}/{len(chosen)} {mutant['name']}: {verdict}", flush=True)
            if verdict != "killed":
                bad.append(mutant["name"])
    print(f"{len(chosen) - len(bad)} of {len(chosen)} killed" + (f"; not: {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


def copy_of_the_tree(tree: Path) -> Path:
    """A copy that mutants may change, one at a time, made at `tree`."""
    tree.mkdir()
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, tree / name)
    return tree


def try_mutant(tree: Path, mutant: dict[str, Any]) -> str:
    """What became of one mutant; `tree` is afterwards as before."""
    path = tree / mutant["file"]
    text = path.read_text()
    if text.count(mutant["old"]) != 1:
        return f"its text occurs {text.count(mutant['old'])} times in {mutant['file']}"
    library = tree / "vllm_expert_prefetch" / "native" / "libvep_host.so"
    built = library.read_bytes()
    path.write_text(text.replace(mutant["old"], mutant["new"]))
    try:
        if mutant["file"].startswith("csrc/") and not compiles(tree):
            return "does not compile"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not engine and not slow", *mutant["tests"]]
        done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return "killed"
    finally:
        path.write_text(text)
        library.write_bytes(built)
    if done.returncode == 1:
        return "killed"
    return "SURVIVED" if done.returncode == 0 else f"tests could not run:\n{done.stdout[-1500:]}{done.stderr[-1500:]}"


def compiles(tree: Path) -> bool:
    """Build the host library in place."""
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    env = {**environment(tree), "VEP_BUILD_CUDA": "0"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, check=False).returncode == 0


def environment(tree: Path) -> dict[str, str]:
    """The copy's package before an installed one."""
    return {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


if __name__ == "__main__":
    sys.exit(main())
