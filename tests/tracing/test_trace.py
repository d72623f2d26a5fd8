"""What is no trace, or not a whole one, is refused by name."""

from dataclasses import replace

import numpy as np
import pytest
from routed import CARD, LAYERS
from safetensors.numpy import load_file, save_file

from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.trace import read_trace, tensors_of, trace_of_steps, write_trace

TRACE = trace_of_steps(CARD, [[[[1, 2], [3]]] * LAYERS, [[[4, 5]]] * LAYERS], num_prompt=1)


def test_it_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "a.safetensors"
    assert write_trace(path, TRACE) == path.stat().st_size
    assert path.stat().st_mode & 0o777 == 0o600
    found = read_trace(path)
    assert found.card == CARD
    assert found.routed(1).tolist() == [[1, 2], [3, -1], [4, 5]]
    assert (found.tokens.tolist(), found.decodes.tolist(), found.counted()) == ([2, 1], [False, True], None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_trace_of_before_there_were_requests_and_weights_is_read_without_them(tmp_path):
    whole = replace(
        TRACE, requests=np.array([0, 1, 1], dtype=np.int32), weights=(np.ones((3, 2), np.float16),) * LAYERS
    )
    write_trace(tmp_path / "000001.safetensors", whole, 1)
    found = read_trace(tmp_path)
    assert (found.requests.tolist(), len(found.weights)) == ([0, 1, 1], LAYERS)
    tensors = {name: own for name, own in tensors_of(whole).items() if not name.startswith(("requests", "weights"))}
    save_file(tensors, tmp_path / "000001.safetensors", CARD.metadata(1))
    found = read_trace(tmp_path)
    assert (found.requests, found.weights, found.last(1).requests) == (None, (), None)
    assert found.routed(1).tolist() == [[1, 2], [3, -1], [4, 5]]


def test_the_last_steps_of_it():
    last = TRACE.last(1)
    assert (len(last), last.routed(0).tolist(), last.prefilling.tolist()) == (1, [[4, 5]], [0])
    assert len(TRACE.last(9)) == 2


def test_files_of_a_folder_are_joined(tmp_path):
    for number in (1, 2):
        write_trace(tmp_path / f"{number:06d}.safetensors", TRACE, number)
    assert len(read_trace(tmp_path)) == 4
    (tmp_path / "outer").mkdir()
    assert len(read_trace(tmp_path)) == 4


def damaged(path, tmp_path):
    content = path.read_bytes()
    path.write_bytes(content[:-9])
    return path


def newer(path, tmp_path):
    save_file(tensors_of(TRACE), path, CARD.metadata(1) | {"format_version": "2"})
    return path


def foreign(path, tmp_path):
    save_file({"w": np.zeros(3)}, path)
    return path


def inconsistent(path, tmp_path):
    tensors = load_file(path)
    tensors["ids.1"] = tensors["ids.1"][:-1].copy()
    save_file(tensors, path, CARD.metadata(1))
    return path


def inconsistent_requests(path, tmp_path):
    save_file(load_file(path) | {"requests": np.zeros(9, dtype=np.int32)}, path, CARD.metadata(1))
    return path


def no_layer(path, tmp_path):
    tensors = load_file(path)
    del tensors["ids.2"]
    save_file(tensors, path, CARD.metadata(1))
    return path


def another_model(path, tmp_path):
    write_trace(tmp_path / "000002.safetensors", replace(TRACE, card=replace(CARD, model="other")), 2)
    return tmp_path


def another_recording(path, tmp_path):
    write_trace(tmp_path / "000002.safetensors", replace(TRACE, card=replace(CARD, recorded_at="later")), 2)
    return tmp_path


def with_a_gap(path, tmp_path):
    write_trace(tmp_path / "000003.safetensors", TRACE, 3)
    return tmp_path


def two_recordings(path, tmp_path):
    for name in ("trace-a", "trace-b"):
        (tmp_path / "both" / name).mkdir(parents=True)
        write_trace(tmp_path / "both" / name / "000001.safetensors", TRACE)
    return tmp_path / "both"


def nothing(path, tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (damaged, "000001.safetensors is truncated or damaged"),
        (newer, "000001.safetensors has format 2, this version reads format 1"),
        (foreign, "000001.safetensors is no trace"),
        (inconsistent, "disagree about the number of tokens"),
        (no_layer, "truncated or damaged"),
        (another_model, "000002.safetensors is of other, .*000001.safetensors of tiny"),
        (another_recording, "different recordings"),
        (with_a_gap, "there is file 1 and file 3"),
        (two_recordings, "2 recordings, give one of them: trace-a, trace-b"),
        (nothing, "holds no trace"),
        (lambda path, tmp_path: tmp_path / "nowhere", "nowhere is not there"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, spoil, message):
    path = tmp_path / "000001.safetensors"
    write_trace(path, TRACE)
    with pytest.raises(TraceError, match=message):
        read_trace(spoil(path, tmp_path))
