"""The metrics as declared: names by Prometheus' conventions, each documented."""

import re

import pytest
from doc_tables import DOCS, documented, metrics_table

from vllm_expert_prefetch.metrics.definitions import (
    COMMON_LABELS,
    INDEX,
    INFO_LABELS,
    LAYER_INDEX,
    LAYER_LABEL,
    LAYER_SERIES,
    METRICS,
    PREFIX,
    SERIES,
    Kind,
)

each_metric = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)


@each_metric
def test_names_follow_the_conventions(metric):
    assert metric.full_name.startswith(PREFIX)
    assert re.fullmatch(r"[a-z]+(_[a-z]+)*", metric.full_name)
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert (metric.name == "info") == (metric.kind is Kind.INFO)
    if metric.unit in ("bytes", "seconds"):
        assert metric.name.removesuffix("_total").endswith(f"_{metric.unit}")
    assert bool(metric.buckets) == (metric.kind is Kind.HISTOGRAM)
    assert list(metric.buckets) == sorted(set(metric.buckets))


@each_metric
def test_every_metric_says_what_it_counts(metric):
    assert len(metric.help) > 20
    assert metric.help.endswith(".")
    assert bool(metric.unit) == (metric.kind is not Kind.INFO)


@each_metric
def test_a_label_comes_with_its_values_and_is_none_of_the_common_ones(metric):
    assert bool(metric.label) == bool(metric.values)
    assert metric.label not in COMMON_LABELS
    assert len(metric.stems) == max(1, len(metric.values))
    assert metric.kind is Kind.HISTOGRAM or metric.series == metric.stems


def test_no_name_and_no_series_twice():
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert len({*SERIES, *LAYER_SERIES}) == len(SERIES) + len(LAYER_SERIES)
    assert [LAYER_SERIES[index] for index in LAYER_INDEX.values()] == list(LAYER_INDEX) == list(LAYER_SERIES)
    assert [SERIES[index] for index in INDEX.values()] == list(INDEX) == list(SERIES)


def test_the_documented_table_is_the_code():
    assert documented("metrics") == metrics_table(), "python tests/doc_tables.py brings it up to date"


def test_the_documentation_names_every_label():
    text = (DOCS / "metrics.md").read_text()
    assert [label for label in (*COMMON_LABELS, *INFO_LABELS, LAYER_LABEL) if f"`{label}`" not in text] == []


def test_the_labels_of_the_info_metric_are_none_of_the_common_ones():
    assert not set(INFO_LABELS) & set(COMMON_LABELS)
