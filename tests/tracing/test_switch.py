"""Recordings start and stop between two steps, over a socket that only this user can reach."""

import gc
import json
import socket
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from routed import CARD

from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.locks import hold_lock
from vllm_expert_prefetch.metrics import runtime_dir
from vllm_expert_prefetch.serving.recording import create_switch
from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.control import ask, serve_control
from vllm_expert_prefetch.tracing.profile import read_profile
from vllm_expert_prefetch.tracing.switch import TraceSwitch
from vllm_expert_prefetch.tracing.trace import trace_of_steps, write_trace


class Noted:
    """Stands in for a recorder."""

    def __init__(self, folder, with_weights):
        self.folder, self.num_steps, self.num_dropped = folder, 0, 0
        self.with_weights, self.steps, self.forgotten = with_weights, [], []

    def forget(self, names):
        self.forgotten += names

    def end_step(self, *step):
        self.num_steps += 1
        self.steps.append(step)

    def finish(self):
        self.folder.close()


@pytest.fixture
def made():
    """A switch, and every recorder that it has attached, with None for none."""
    attached = []
    return TraceSwitch(Noted, attached.append), attached


def test_it_hands_on_whose_tokens_a_step_has_and_who_is_gone(made, tmp_path):
    switch, attached = made
    assert not switch.is_recording
    switch.note_tokens([("a", 3)], ["b"])
    switch.answer(start(tmp_path) | {"weights": True})
    assert switch.is_recording
    switch.begin_step(1, 0)
    switch.note_tokens([("a", 3)], ["b"])
    switch.end_step(0.5)
    step(switch)
    assert attached[0].with_weights
    assert attached[0].forgotten == ["b"]
    assert [own[-1] for own in attached[0].steps] == [[("a", 3)], ()], "what one step has is not the next one's"


def start(tmp_path, limit_mb=5):
    return {"do": "start", "directory": str(tmp_path), "limit_mb": limit_mb}


def step(switch, prefilling=0, decoding=1):
    switch.begin_step(prefilling, decoding)
    switch.end_step(0.5)


def test_it_records_what_is_served_between_start_and_stop(made, tmp_path):
    switch, attached = made
    step(switch)
    assert switch.answer({"do": "status"}) == {"recording": None}
    answer = switch.answer(start(tmp_path))
    assert answer["recording"].startswith(str(tmp_path))
    step(switch, 2, 3)
    assert switch.answer({"do": "status"})["steps"] == 1
    assert switch.answer({"do": "stop"})["steps"] == 1
    step(switch)
    recorder, none = attached
    assert (recorder.steps, none) == ([(2, 3, 0.5, ())], None)


def test_a_request_amid_a_step_waits_for_its_end(made, tmp_path):
    switch, attached = made
    switch.begin_step(0, 1)
    answers = []
    thread = threading.Thread(target=lambda: answers.append(switch.answer(start(tmp_path))))
    thread.start()
    thread.join(0.1)
    assert (answers, attached) == ([], [])
    switch.end_step(0.5)
    thread.join(5)
    assert len(answers) == len(attached) == 1
    assert attached[0].steps == [], "the step had begun before"


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([start("{tmp}"), start("{tmp}")], "is being recorded: stop it first"),
        ([{"do": "dance"}], "unknown request 'dance'"),
        ([{"do": "start"}], "directory"),
        ([start("/proc/nowhere")], "give a folder that the server may write to"),
    ],
)
def test_what_cannot_be_done_is_said(made, tmp_path, requests, message):
    for request in requests:
        own = {key: str(tmp_path) if value == "{tmp}" else value for key, value in request.items()}
        answer = made[0].answer(own)
    assert message in answer["error"]


def test_a_recorder_that_cannot_be_made_leaves_no_folder(tmp_path):
    def refuses(folder, with_weights):
        raise TraceError("inside CUDA graphs")

    assert TraceSwitch(refuses, lambda recorder: None).answer(start(tmp_path)) == {"error": "inside CUDA graphs"}
    assert [*tmp_path.iterdir()] == []


def test_a_recording_whose_disk_fails_is_ended(made, tmp_path):
    switch, attached = made
    switch.answer(start(tmp_path))
    attached[0].folder.problem = "full"
    step(switch)
    assert attached[1] is None
    assert switch.answer({"do": "status"}) == {"recording": None}


def test_the_socket_is_private_and_its_name_may_be_long(tmp_path):
    folder = tmp_path / ("x" * 120)
    folder.mkdir()
    serve_control(folder / "a.trace", lambda request: {"got": request["do"]})
    assert (folder / "a.trace").stat().st_mode & 0o777 == 0o600
    assert ask(folder / "a.trace", {"do": "something"}) == {"got": "something"}


def test_one_that_says_nonsense_does_not_end_it(tmp_path):
    serve_control(tmp_path / "a.trace", lambda request: {"ok": 1})
    for nonsense in (b"{", b"\n", b"\xff\n", b""):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(tmp_path / "a.trace"))
            connection.sendall(nonsense)
    assert ask(tmp_path / "a.trace", {}) == {"ok": 1}


def test_errors_and_silence_are_raised(tmp_path):
    serve_control(tmp_path / "a.trace", lambda request: {"error": "no"})
    with pytest.raises(TraceError, match="no"):
        ask(tmp_path / "a.trace", {})
    with pytest.raises(TraceError, match="does not answer"):
        ask(tmp_path / "b.trace", {})


def leave_a_socket(path, monkeypatch):
    """As a worker does that was killed."""
    with monkeypatch.context() as patch, socket.socket(socket.AF_UNIX) as listener:
        patch.chdir(path.parent)  # a socket's name is short
        listener.bind(path.name)
        listener.listen()


def test_the_socket_of_a_worker_that_is_gone_gives_way(tmp_path, monkeypatch):
    leave_a_socket(tmp_path / "a.trace", monkeypatch)
    assert ask(tmp_path / "a.trace", {}) is None
    serve_control(tmp_path / "a.trace", lambda request: {"ok": 1})
    assert ask(tmp_path / "a.trace", {}) == {"ok": 1}


def test_whoever_has_ended_answers_no_more_and_leaves_no_socket(tmp_path):
    close = serve_control(tmp_path / "a.trace", lambda request: {"ok": 1})
    assert ask(tmp_path / "a.trace", {}) == {"ok": 1}
    close()
    close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def servers(tmp_path, monkeypatch):
    """Makes the runtime folders of servers with these process numbers."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(runtime_dir.tempfile, "gettempdir", lambda: str(tmp_path))

    def make(*processes):
        for process in processes:
            folder = tmp_path / f"expert-prefetch-{process}-abc"
            folder.mkdir()
            hold_lock(folder)
            answer = lambda request, own=process: {"own": own, "recording": "there", **request}  # noqa: E731
            serve_control(folder / "engine0-rank0-000001.trace", answer)

    return make


def test_the_command_reaches_the_server_that_there_is(servers, capsys, tmp_path):
    servers(77)
    assert main(["trace", "start", "rel", "--max-mb", "7"]) == 0
    printed = capsys.readouterr().out
    assert '"own": 77' in printed
    assert '"limit_mb": 7' in printed
    assert '"weights": false' in printed
    assert f'"directory": "{tmp_path.cwd()}/rel"' in printed, "the server has another working directory"


def test_without_a_server_or_with_several_the_command_says_so(servers, capsys):
    assert main(["trace", "status"]) == 2
    assert "no server of this user" in capsys.readouterr().err
    servers(77, 78)
    assert main(["trace", "status"]) == 2
    assert "give --server with one of 77, 78" in capsys.readouterr().err
    assert main(["trace", "stop", "--server", "78"]) == 0
    assert main(["trace", "stop", "--server", "79"]) == 2


def test_an_engine_that_records_nothing_does_not_hinder_the_end_of_a_recording_beside_it(
    servers, made, capsys, tmp_path
):
    servers(77)
    serve_control(tmp_path / "expert-prefetch-77-abc" / "engine0-rank0-000002.trace", made[0].answer)
    assert main(["trace", "stop"]) == 0
    assert json.loads(capsys.readouterr().out)["own"] == 77


def test_to_end_what_has_not_begun_is_an_error(servers, made, capsys, tmp_path):
    servers(77)
    serve_control(tmp_path / "expert-prefetch-77-abc" / "engine0-rank0-000001.trace", made[0].answer)
    assert main(["trace", "stop"]) == 2
    assert "nothing is recorded" in capsys.readouterr().err


@pytest.fixture
def recorded(servers, tmp_path):
    """A server of two stages, which has recorded its layers with these names, two tokens each."""
    servers(77)
    folder = tmp_path / "expert-prefetch-77-abc"

    def record(*stages):
        for number, names in enumerate(stages):
            card = replace(CARD, layers=names)
            write_trace(
                tmp_path / f"stage{number}.safetensors", trace_of_steps(card, [[[[number, 9]]] * 3, [[[3, 4]]] * 3], 1)
            )
            answer = {"recording": str(tmp_path / f"stage{number}.safetensors"), "steps": 2, "dropped_steps": 0}
            serve_control(folder / f"engine0-rank{number}-000001.trace", lambda request, own=answer: own)

    return record


def test_what_has_been_recorded_is_written_as_a_profile_of_all_stages(recorded, capsys, tmp_path):
    recorded(("0", "1", "2"), ("3", "4", "5"))
    assert main(["trace", "stop", "--write-profile", str(tmp_path / "p")]) == 0
    assert len(json.loads(capsys.readouterr().out)["workers"]) == 2
    assert read_profile(tmp_path / "p", "tiny").uses == dict.fromkeys("012345", [0, 0, 0, 1, 1] + [0] * 7)


@pytest.mark.parametrize(
    ("stages", "name", "message"),
    [
        ([("0", "1", "2")], "missing/p", "missing/p cannot be written: name a file"),
        ([("0", "1", "2")] * 2, "p", "several engines were recorded"),
    ],
)
def test_a_profile_that_cannot_be_written_is_an_error(recorded, capsys, tmp_path, stages, name, message):
    recorded(*stages)
    assert main(["trace", "stop", "--write-profile", str(tmp_path / name)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_without_a_step_there_is_no_profile(servers, made, capsys, tmp_path):
    servers(77)
    serve_control(tmp_path / "expert-prefetch-77-abc" / "engine0-rank0-000001.trace", made[0].answer)
    assert main(["trace", "start", str(tmp_path / "traces")]) == 0
    assert main(["trace", "stop", "--write-profile", str(tmp_path / "p")]) == 2
    assert "nothing was served while it was recorded: there is no profile to write" in capsys.readouterr().err


def test_an_engine_that_is_gone_without_an_end_answers_no_more(tmp_path):
    """As one that fails to start, in a process that goes on."""
    worker = SimpleNamespace(
        layers=[],
        config=SimpleNamespace(trace="off"),
        publisher=SimpleNamespace(counters=SimpleNamespace(path=tmp_path / "engine0-rank0-000001.counters")),
    )
    worker.traces = create_switch(
        worker, SimpleNamespace(parallel_config=SimpleNamespace(rank=0, tensor_parallel_size=1))
    )
    (path,) = tmp_path.iterdir()
    assert ask(path, {"do": "status"}) == {"recording": None}
    del worker
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_every_stage_of_a_pipeline_is_asked_and_who_is_gone_is_left_out(servers, capsys, tmp_path, monkeypatch):
    servers(77)
    folder = tmp_path / "expert-prefetch-77-abc"
    leave_a_socket(folder / "engine0-rank2-000001.trace", monkeypatch)
    assert main(["trace", "status"]) == 0
    assert '"workers"' not in capsys.readouterr().out
    serve_control(folder / "engine0-rank1-000001.trace", lambda request: {"own": "the second", **request})
    assert main(["trace", "status"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [answer["own"] for answer in printed["workers"]] == [77, "the second"]
