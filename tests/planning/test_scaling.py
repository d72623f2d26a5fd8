"""docs/scaling.md: its formulas and its example are the arithmetic of `plan`."""

import re

import pytest
from doc_tables import DOCS, RANKS, budget_of, documented, ranks_table

TEXT = (DOCS / "scaling.md").read_text()


def cells(way):
    """The row of the table of formulas for a way to divide the model, without the way."""
    (row,) = re.findall(rf"^\| {way}(?:, C .*?)? \| (.* r .*) \|$", TEXT, re.MULTILINE)
    return row.split(" | ")


@pytest.mark.parametrize("way", RANKS)
def test_the_formulas_are_what_is_planned(way):
    accelerator, host, miss = cells(way)
    moved, _, links = miss.partition(" over ")
    budget, record = budget_of(RANKS[way]), budget_of(RANKS["one GPU"]).record_bytes
    given = {"L": 48, "E": 128, "N": 2, "M": 2, "r": record, "C": budget.slots[0]}

    def value(formula):
        return eval(re.sub(r"(?<=[\w)]) (?=[\w(])", " * ", formula), given)

    assert value(accelerator) == budget.cache_bytes
    assert value(host) == budget.experts_bytes
    assert value(moved) == budget.record_bytes
    assert record == budget.record_bytes * (2 if "N links" in links else 1)


def test_the_example_is_what_is_planned():
    assert documented("ranks") == ranks_table(), "python tests/doc_tables.py brings it up to date"
    assert "| one GPU | 29.0 GB | 0.60 GB | 58.0 GB |" in ranks_table()
