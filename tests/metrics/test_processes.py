"""Telling the living from the dead, and from those that took their number."""

import os
import subprocess
import sys

import pytest

from vllm_expert_prefetch.metrics import processes
from vllm_expert_prefetch.metrics.processes import process_is_alive, process_start


@pytest.fixture
def dead_pid():
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_process_is_alive_until_it_has_ended(dead_pid):
    assert process_is_alive(os.getpid())
    assert process_is_alive(os.getpid(), process_start(os.getpid()))
    assert not process_is_alive(dead_pid)
    assert process_start(dead_pid) is None


def test_a_process_that_ended_and_was_not_waited_for_is_dead():
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    process.stdout.read()  # until it has closed it
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not process_is_alive(process.pid)
    process.wait()


def test_another_process_with_the_same_number_is_not_the_same_process():
    assert not process_is_alive(os.getpid(), process_start(os.getpid()) - 1)


def test_a_name_with_brackets_and_spaces_does_not_confuse(monkeypatch):
    text = f"1 (a) Z (b) S {' '.join(map(str, range(4, 22)))} 4242 0"
    monkeypatch.setattr(processes.Path, "read_text", lambda path: text)
    assert process_start(1) == 4242
    assert process_is_alive(1, 4242)


@pytest.mark.parametrize(("error", "alive"), [(PermissionError, True), (ProcessLookupError, False), (None, True)])
def test_without_proc_a_signal_tells(monkeypatch, error, alive):
    def kill(pid, number):
        if error:
            raise error

    monkeypatch.setattr(processes, "_state", lambda pid: None)
    monkeypatch.setattr(os, "kill", kill)
    assert process_is_alive(12345) == alive
