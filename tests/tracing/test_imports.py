"""Routing that others have recorded: a table of one line for each choice, and the arrays that vLLM returns."""

import json

import numpy as np
import pytest

from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.imports import import_routing, read_csv
from vllm_expert_prefetch.tracing.trace import read_trace

HEAD = "# model=big.gguf n_expert=8 n_expert_used=2\n# layer=3 expert_bytes=100\n# layer=5 expert_bytes=70\n"
COLUMNS = "turn,phase,step,layer,slot,expert,weight\n"
ROWS = ["0,0,0,3,0,1,1", "0,0,0,3,1,2,1", "0,0,0,5,0,7,1", "0,0,1,3,0,3,1", "0,1,0,3,0,4,1", "0,1,0,5,0,6,1"]


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(HEAD + COLUMNS + "\n".join([*ROWS, "1,0,0,3,0,0,1", "1,1,0,5,0,5,1"]) + "\n")
    return path


def test_a_prompt_is_one_step_as_it_is_served(table):
    trace = read_csv(table)
    assert trace.tokens.tolist() == [2, 1, 1, 1]
    assert trace.decodes.tolist() == [False, True, False, True]
    assert trace.decoding.tolist() == [0, 1, 0, 1]
    assert trace.requests.tolist() == [0, 0, 0, 1, 1]
    assert trace.routed(0).tolist() == [[1, 2], [3, -1], [4, -1], [0, -1], [-1, -1]]
    assert trace.routed(1).tolist() == [[7, -1], [-1, -1], [6, -1], [-1, -1], [5, -1]]
    card = trace.card
    assert (card.model, card.layers, card.num_experts, card.record_bytes) == ("big.gguf", ("3", "5"), (8, 8), (100, 70))


def test_or_token_by_token(table):
    trace = read_csv(table, by_token=True)
    assert trace.tokens.tolist() == [1] * 5
    assert trace.decodes.tolist() == [False, False, True, False, True]


def test_a_table_that_does_not_say_how_many_experts_has_those_that_it_names(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(COLUMNS + ROWS[0] + "\n" + ROWS[2] + "\n")
    assert read_csv(path).card.num_experts == (8, 8)
    assert read_csv(path, "m", 9).card.model == "m"


def test_arrays_of_requests_follow_each_other(tmp_path):
    first, second = (np.random.default_rng(seed).integers(0, 256, (n, 3, 2), np.uint8) for seed, n in ((1, 5), (2, 2)))
    np.savez(tmp_path / "a.npz", first=first, second=second)
    trace = import_routing(tmp_path / "a.npz", "m", 256, 4, False)
    assert trace.tokens.tolist() == [4, 1, 2]
    assert trace.decodes.tolist() == [False, True, False]
    assert trace.requests.tolist() == [0] * 5 + [1] * 2
    for layer in range(3):
        assert trace.routed(layer).tolist() == [*first[:, layer].tolist(), *second[:, layer].tolist()]
    assert trace.ids[0].dtype == np.int16, "255 is an expert here"
    np.save(tmp_path / "a.npy", first)
    assert import_routing(tmp_path / "a.npy", "m", 256, 4, True).tokens.tolist() == [1] * 5


def test_the_command_writes_a_trace_and_shows_it(table, tmp_path, capsys):
    path = tmp_path / "t.safetensors"
    assert main(["trace", "import", str(table), "-o", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 4
    assert len(read_trace(path)) == 4
    assert main(["trace", "show", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["decode_steps"] == 2
    assert main(["trace", "import", str(table), "-o", str(tmp_path / "t.bin")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err


def wrong_columns(tmp_path):
    (tmp_path / "a.csv").write_text("0,zero\n")
    return tmp_path / "a.csv", 8


def empty(tmp_path):
    (tmp_path / "a.csv").write_text(HEAD + COLUMNS)
    return tmp_path / "a.csv", 8


def too_few(tmp_path):
    (tmp_path / "a.csv").write_text(COLUMNS + ROWS[2] + "\n")
    return tmp_path / "a.csv", 4


def flat(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2), dtype=np.uint8))
    return tmp_path / "a.npy", 4


def too_few_for_an_array(tmp_path):
    np.save(tmp_path / "a.npy", np.full((3, 2, 1), 9, dtype=np.uint8))
    return tmp_path / "a.npy", 4


def unsaid(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 2, 1), dtype=np.uint8))
    return tmp_path / "a.npy", None


def pickled(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}]), allow_pickle=True)
    return tmp_path / "a.npy", 4


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (wrong_columns, "a.csv cannot be read"),
        (empty, "a.csv holds no routing: expected lines turn,phase"),
        (too_few, "routes to expert 7, of 4 experts: give --experts"),
        (flat, "expected arrays"),
        (too_few_for_an_array, "more than 4 experts"),
        (unsaid, "give --experts"),
        (pickled, "a.npy cannot be read"),
        (lambda tmp_path: (tmp_path / "a.txt", 4), "only .csv, .npy and .npz"),
        (lambda tmp_path: (tmp_path / "a.csv", 4), "a.csv cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, spoil, message):
    path, num_experts = spoil(tmp_path)
    with pytest.raises(TraceError, match=message):
        import_routing(path, None, num_experts, 0, False)
