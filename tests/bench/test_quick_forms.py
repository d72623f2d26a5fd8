"""Every benchmark in its quick form: it ends with the JSON that docs/benchmarks.md names, and writes no result."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from observatory import has_prometheus

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text())
SECONDS = 300
"""Five times what a quick form may take."""


def named() -> dict[str, set[str]]:
    """Script -> keys of its last line, by the table of the documentation."""
    rows = re.findall(r"^\| `(\w+\.py)` \| (.+) \|$", (ROOT / "docs" / "benchmarks.md").read_text(), re.MULTILINE)
    return {script: set(re.findall(r"`(\w+)`", keys)) for script, keys in rows}


def committed() -> dict[Path, bytes]:
    """Results and pictures as they are."""
    folders = (ROOT / "benchmarks" / "results", ROOT / "docs" / "pictures")
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def test_the_documentation_names_what_every_script_ends_with():
    assert {path.name for path in SCRIPTS} == set(named())
    assert all(named().values())


@pytest.mark.engine
@pytest.mark.long
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_quick_form_ends_with_one_line_of_json_and_writes_no_result(script):
    if script.stem == "observe" and not has_prometheus():
        pytest.skip("no prometheus in PATH: apt-get install prometheus")
    before = committed()
    done = subprocess.run(
        [sys.executable, str(script), "--quick", "--json"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert named()[script.name] <= json.loads(done.stdout.splitlines()[-1]).keys()
    assert committed() == before
