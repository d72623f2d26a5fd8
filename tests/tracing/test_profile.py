"""A profile names the most used experts, and is of one model."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from routed import CARD, LAYERS

from vllm_expert_prefetch.tracing import trace
from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.profile import (
    Profile,
    check_can_write,
    joined,
    profile_of,
    read_profile,
    write_profile,
)
from vllm_expert_prefetch.tracing.trace import trace_of_steps

PROMPT, DECODED = [[[9, 10], [9, 11], [9, 10]]] * LAYERS, [[[1, 2]]] * LAYERS
MADE = Profile("there/m", {"0": [1, 5, 0, 5]})


def test_it_counts_what_decode_steps_chose():
    uses = profile_of(trace_of_steps(CARD, [PROMPT, DECODED, DECODED], num_prompt=1)).uses
    assert uses.keys() == {"0", "1", "2"}
    assert uses["1"] == [0, 2, 2] + [0] * 9
    assert profile_of(trace_of_steps(CARD, [PROMPT], num_prompt=1)).uses["0"][9] == 3


def test_the_hottest_comes_last():
    assert MADE.hottest("0", 4, 3) == [0, 3, 1]


def test_it_is_read_as_it_was_written_wherever_the_model_is(tmp_path):
    write_profile(tmp_path / "p", MADE)
    assert (tmp_path / "p").stat().st_mode & 0o777 == 0o600
    assert read_profile(tmp_path / "p", "/elsewhere/m") == MADE


def test_whoever_reads_it_finds_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    write_profile(tmp_path / "p", MADE)
    monkeypatch.setattr(trace.os, "rename", Mock(side_effect=OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_profile(tmp_path / "p", Profile("there/m", {"0": [9]}))
    assert read_profile(tmp_path / "p", "m") == MADE
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_that_of_a_pipeline_has_the_layers_of_all_stages():
    assert joined([MADE, Profile("there/m", {"1": [7]})]) == Profile("there/m", {"0": MADE.uses["0"], "1": [7]})
    with pytest.raises(TraceError, match="several engines were recorded"):
        joined([MADE, MADE])


@pytest.mark.parametrize("name", ["missing/p", ".", ""])
def test_a_place_that_takes_no_file_is_refused_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    check_can_write(tmp_path / "p")
    with pytest.raises(TraceError, match="cannot be written: name a file in a folder that exists"):
        check_can_write(Path(name))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"format_version": 2}, "profile 2, this version reads"),
        ({"format": "list"}, "is list 1"),
        ({"model": "there/n"}, "was recorded of there/n, and m is served"),
    ],
)
def test_another_is_refused_by_name(tmp_path, changed, message):
    write_profile(tmp_path / "p", MADE)
    (tmp_path / "p").write_text(json.dumps(json.loads((tmp_path / "p").read_text()) | changed))
    with pytest.raises(TraceError, match=message):
        read_profile(tmp_path / "p", "m")


@pytest.mark.parametrize("text", [None, "", "[]", "{}"])
def test_what_is_no_profile_is_refused_by_name(tmp_path, text):
    if text is not None:
        (tmp_path / "p").write_text(text)
    with pytest.raises(TraceError, match="p is no profile"):
        read_profile(tmp_path / "p", "m")


@pytest.mark.parametrize(("layer", "num_experts", "message"), [("1", 4, "nothing of layer 1"), ("0", 5, "4 experts")])
def test_layers_that_it_does_not_know_are_refused(layer, num_experts, message):
    with pytest.raises(TraceError, match=message):
        MADE.hottest(layer, num_experts, 2)
