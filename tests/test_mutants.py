"""Every mutant of mutants.toml replaces a text that is there, once; `make mutants` shows that the tests notice."""

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MUTANTS = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant["name"])
def test_the_text_that_it_replaces_is_there_once(mutant):
    assert (ROOT / mutant["file"]).read_text().count(mutant["old"]) == 1
    assert mutant["new"] != mutant["old"]
    assert all((ROOT / name).exists() for name in mutant["tests"])


def test_no_name_stands_twice():
    names = [mutant["name"] for mutant in MUTANTS]
    assert len(set(names)) == len(names)
