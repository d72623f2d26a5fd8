"""A recording holds what was served, and replayed it counts what the caches counted."""

import random
import threading
from dataclasses import replace

import pytest
import torch
from routed import CARD, EXPERTS, LAYERS, SLOTS, TOP_K, make_caches, serve

from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.planning.simulate import Setting, as_recorded, simulate_all
from vllm_expert_prefetch.tracing import folder, recorder
from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.folder import TraceFolder
from vllm_expert_prefetch.tracing.recorder import Recorder
from vllm_expert_prefetch.tracing.trace import read_trace

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))


def recorded(tmp_path, num_steps, before=0, limit_bytes=10**9, num_experts=EXPERTS, with_weights=False):
    caches, rng = make_caches(num_experts), random.Random(4)
    serve(caches, None, rng, before, num_experts)
    card = replace(CARD, num_experts=(num_experts,) * LAYERS)
    made = Recorder(caches.layers, card, TraceFolder(tmp_path, limit_bytes), with_weights)
    serve(caches, made, rng, num_steps, num_experts)
    made.finish()
    return made, caches


@pytest.mark.parametrize("before", [0, 40])
def test_a_replay_counts_what_was_counted_wherever_the_recording_began(tmp_path, before):
    made, caches = recorded(tmp_path, 60, before)
    trace = read_trace(made.folder.path)
    assert (len(trace), trace.card, made.num_steps) == (60, CARD, 60)
    pairs = as_recorded(trace)
    assert all(live == own > 0 for live, own in pairs.values())
    if not before:
        words = [cache.words() for cache in caches.layers]
        assert pairs["hits"][0] == sum(own.hits for own in words)
        assert simulate_all(trace, Setting((SLOTS,) * LAYERS, "ewma")).misses == sum(own.misses for own in words)


def test_of_a_rank_with_a_share_of_the_experts_all_that_was_routed_is_kept_and_nothing_of_its_planners(tmp_path):
    caches, routed = make_caches(), 2 * EXPERTS
    for cache in caches.layers:
        cache.expert_map = torch.tensor([*range(EXPERTS), *[-1] * (EXPERTS + 1)], dtype=torch.int32)
    card = replace(CARD, num_experts=(routed,) * LAYERS, num_slots=(2 * SLOTS,) * LAYERS)
    made = Recorder(caches.layers, card, TraceFolder(tmp_path, 10**9))
    for first in range(routed - 1):
        for number, cache in enumerate(caches.layers):
            ids = torch.tensor([[first, first + 1]])
            made.note(number, ids, 1, torch.ones(1, TOP_K))
            cache.serve(cache.local(ids), 1)
        made.end_step(0, 1, 0.25)
    made.finish()
    trace = read_trace(made.folder.path)
    assert trace.routed(1).tolist() == [[first, first + 1] for first in range(routed - 1)]
    assert (trace.states, trace.counted(), as_recorded(trace)) == ((), None, None)
    assert simulate_all(trace, Setting(card.num_slots, "ewma")).misses == LAYERS * routed, "as one cache"


def test_a_trace_that_a_replay_contradicts_is_refused(tmp_path):
    made, _ = recorded(tmp_path, 30)
    trace = read_trace(made.folder.path)
    trace.ids[1][-1] = (trace.ids[1][-1] + 1) % EXPERTS
    trace.ids[1][:10] = trace.ids[1][10:20]
    with pytest.raises(TraceError, match="count differently: hits"):
        as_recorded(trace)


def test_steps_are_noted_with_their_sequences_and_times_and_padding_is_left_out(tmp_path):
    made, _ = recorded(tmp_path, 9)
    trace = read_trace(made.folder.path)
    assert trace.prefilling.tolist() == [1, 0, 0] * 3
    assert (trace.decoding == [0 if step % 3 == 0 else n for step, n in enumerate(trace.tokens)]).all()
    assert trace.seconds.tolist() == [0.25] * 9
    assert all(ids.shape == (trace.tokens.sum(), TOP_K) and ids.dtype == "uint8" for ids in trace.ids)


def test_gate_weights_are_recorded_where_they_are_asked_for_and_take_their_room(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "CHUNK_BYTES", 1000)
    found = {}
    for asked in (False, True):
        made, _ = recorded(tmp_path / str(asked), 60, with_weights=asked)
        found[asked] = read_trace(made.folder.path), len([*made.folder.path.iterdir()])
    (without, few), (trace, many) = found[False], found[True]
    assert (without.weights, len(trace.weights)) == ((), LAYERS)
    assert (trace.ids[0] == without.ids[0]).all()
    assert all(own.dtype == "float16" for own in trace.weights)
    assert (trace.weights[1] == (trace.routed(1).astype("float32") / 1000).astype("float16")).all()
    assert many > 2 * few, "a file holds so many bytes of both"
    assert (trace.last(5).weights[1] == trace.weights[1][-int(trace.tokens[-5:].sum()) :]).all()


def test_requests_have_numbers_and_their_names_are_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "CHUNK_BYTES", 200)
    made, _ = recorded(tmp_path, 30)
    trace = read_trace(made.folder.path)
    expected = [number for n in trace.tokens.tolist() for number in [0] * (n - n // 2) + [1] * (n // 2)]
    assert trace.requests.tolist() == expected, "in the order in which they came, through all files"
    assert trace.last(3).requests.tolist() == expected[-int(trace.tokens[-3:].sum()) :]
    assert len([*made.folder.path.iterdir()]) > 2
    assert not any(b"secret" in file.read_bytes() for file in made.folder.path.iterdir())


def test_a_name_that_comes_again_is_another_request_and_tokens_that_do_not_add_up_are_nobodys(tmp_path):
    made = Recorder(make_caches().layers, CARD, TraceFolder(tmp_path, 10**9))
    for tokens, finished in (([("a", 1)], []), ([("b", 2)], ["a"]), ([("a", 1), ("b", 1)], []), ([("a", 9)], [])):
        made.forget(finished)
        num_tokens = sum(count for _, count in tokens) if tokens[0][1] < 9 else 1
        for number in range(LAYERS):
            made.note(number, torch.ones(num_tokens, TOP_K, dtype=torch.int64), num_tokens, torch.ones(1))
        made.end_step(0, num_tokens, 0.1, tokens)
    made.finish()
    assert read_trace(made.folder.path).requests.tolist() == [0, 1, 1, 2, 1, -1]


def test_more_experts_than_a_byte_counts(tmp_path):
    made, _ = recorded(tmp_path, 6, num_experts=300)
    trace = read_trace(made.folder.path)
    assert trace.ids[0].dtype == "int16"
    assert trace.routed(0).max() > 255
    assert all(live == own for live, own in as_recorded(trace).values())


def test_files_follow_each_other_and_one_that_was_not_finished_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "CHUNK_BYTES", 200)
    made, _ = recorded(tmp_path, 60)
    files = sorted(made.folder.path.iterdir())
    assert len(files) > 5
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert made.folder.path.stat().st_mode & 0o777 == 0o700
    whole = read_trace(made.folder.path)
    files[-1].rename(made.folder.path / ".000099.safetensors.1")  # as an interruption leaves it
    cut = read_trace(made.folder.path)
    assert 0 < len(cut) < len(whole) == 60
    assert as_recorded(cut)


def test_the_oldest_files_go_also_those_of_earlier_recordings(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "CHUNK_BYTES", 200)
    limit = 40_000
    first, _ = recorded(tmp_path, 30, limit_bytes=limit)
    assert first.folder.path.exists()
    recorded(tmp_path, 120, limit_bytes=limit)
    assert not first.folder.path.exists()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) <= limit
    trace = read_trace(tmp_path)
    assert 0 < len(trace) < 120
    assert as_recorded(trace), "the caches' state is that of the first file that is left"


def test_a_step_that_a_layer_did_not_serve_is_dropped_and_counted(tmp_path):
    caches = make_caches()
    made = Recorder(caches.layers, CARD, TraceFolder(tmp_path, 10**9))
    made.note(0, torch.zeros(1, TOP_K, dtype=torch.int64), 1, torch.ones(1, TOP_K))
    made.end_step(0, 1, 0.1)
    made.end_step(0, 1, 0.1)  # nothing was served: a dummy run
    assert (made.num_steps, made.num_dropped) == (0, 1)
    made.finish()
    assert not made.folder.path.exists()


def test_rows_of_a_gpu_tell_tokens_by_their_sign(tmp_path):
    caches = make_caches()
    made = Recorder(caches.layers, CARD, TraceFolder(tmp_path, 10**9), with_weights=True)
    ids, rows = torch.tensor([[1, 2], [3, 4], [5, 6]]), torch.tensor([7, -1, 0])
    weights = ids / 8
    for number in range(LAYERS):
        made.note(number, ids, rows, weights)
    ids.zero_()  # a buffer that is used again
    weights.zero_()
    made.end_step(0, 2, 0.1, [("a", 1), ("b", 1)])
    made.finish()
    trace = read_trace(made.folder.path)
    assert trace.routed(2).tolist() == [[1, 2], [5, 6]]
    assert trace.weights[2].tolist() == [[1 / 8, 2 / 8], [5 / 8, 6 / 8]]
    assert trace.requests.tolist() == [0, 1]


def test_a_disk_that_fails_ends_the_recording_and_nothing_else(tmp_path, monkeypatch, caplog):
    def full(path, trace, number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folder, "write_trace", full)
    monkeypatch.setattr(recorder, "CHUNK_BYTES", 100)
    made, _ = recorded(tmp_path, 20)
    assert "No space left" in made.folder.problem
    assert caplog.text.count("the recording of routing has stopped") == 1


def test_a_disk_that_is_too_slow_ends_the_recording(tmp_path, monkeypatch):
    goes_on = threading.Event()
    monkeypatch.setattr(folder, "write_trace", lambda path, trace, number: goes_on.wait(10) and 1)
    monkeypatch.setattr(folder, "MOST_PENDING", 2)
    monkeypatch.setattr(recorder, "CHUNK_BYTES", 1)
    caches = make_caches()
    made = Recorder(caches.layers, CARD, TraceFolder(tmp_path, 10**9))
    serve(caches, made, random.Random(1), 6)
    goes_on.set()
    made.finish()
    assert made.folder.problem == "the disk cannot keep up"


def test_a_folder_that_cannot_be_made_is_refused_by_name(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TraceError, match=r"file.*give a folder that the server may write to"):
        TraceFolder(tmp_path / "file" / "below", 1)
