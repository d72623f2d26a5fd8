"""Locks that tell the living from the dead: whoever ends, however, gives them up; nobody else does."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from processes import run_python, start_python

from vllm_expert_prefetch.locks import exclusive, hold_lock, is_locked, release_lock

HOLD = "from pathlib import Path; from vllm_expert_prefetch.locks import *\nlock = hold_lock(Path({path!r}))\n"


@pytest.fixture(params=["file", "folder"])
def path(request, tmp_path):
    """What a process has made."""
    path = tmp_path / "made"
    path.mkdir() if request.param == "folder" else path.write_text("x")
    return path


def test_a_lock_is_seen_until_it_is_given_up(path):
    assert not is_locked(path)
    lock = hold_lock(path)
    assert is_locked(path)
    release_lock(lock)
    assert not is_locked(path)
    release_lock(lock)  # once is enough


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(FileNotFoundError):
        is_locked(tmp_path / "missing")


def test_a_renamed_file_keeps_its_lock(path):
    lock = hold_lock(path)
    moved = path.rename(path.with_name("moved"))
    assert is_locked(moved)
    release_lock(lock)


def test_a_killed_process_holds_nothing_though_nobody_has_waited_for_it(path):
    with start_python(HOLD.format(path=str(path)) + "print('ready', flush=True); input()") as holder:
        assert holder.stdout.readline() == "ready\n"
        assert is_locked(path)
        holder.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
        assert not is_locked(path)


def test_children_do_not_hold_it(path):
    """Not one that was forked and lives on, nor a program that was started."""
    code = HOLD.format(path=str(path)) + (
        "import os, subprocess, sys, time\n"
        "program = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "read, write = os.pipe()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.close(write); os.read(read, 1); os._exit(0)\n"
        "time.sleep(0.2)\n"
        f"assert is_locked(Path({str(path)!r}))\n"
        "release_lock(lock)\n"
        f"print(is_locked(Path({str(path)!r})))\n"
        "os.close(write); os.waitpid(child, 0); program.communicate(b'x')\n"
    )
    assert run_python(code) == "False\n"


@pytest.mark.skipif(not shutil.which("unshare"), reason="this kernel's namespaces need unshare")
def test_another_container_sees_it(path):
    """A process number means nothing there: the same number is somebody else's, or nobody's."""
    lock = hold_lock(path)
    ask = "import sys; from pathlib import Path; from vllm_expert_prefetch.locks import is_locked\n"
    command = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c"]
    done = subprocess.run([*command, f"{ask}print(is_locked(Path({str(path)!r})))"], capture_output=True, text=True)
    release_lock(lock)
    if "unshare" in done.stderr:
        pytest.skip(f"this kernel has no such namespaces: {done.stderr}")
    assert done.stdout == "True\n", done.stderr


def test_one_at_a_time_is_in_there(tmp_path):
    path, entered, inside = tmp_path / "lock", threading.Event(), threading.Event()

    def enter():
        entered.set()
        with exclusive(path):
            inside.set()

    other = threading.Thread(target=enter)
    with exclusive(path):
        assert path.stat().st_mode & 0o777 == 0o600
        other.start()
        assert entered.wait(10)
        assert not inside.wait(0.3)
    other.join(10)
    assert inside.is_set()


def test_who_waited_for_a_file_that_was_removed_is_told(tmp_path):
    path, refused = tmp_path / "lock", []

    def enter():
        with pytest.raises(FileNotFoundError), exclusive(path):
            pass
        refused.append(True)

    other = threading.Thread(target=enter)
    with exclusive(path):
        other.start()
        other.join(0.3)
        path.unlink()
    other.join(10)
    assert refused
