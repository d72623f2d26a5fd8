"""The directory that the processes of one server share: private, found again, and never left behind."""

import multiprocessing
import os
import signal
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import run_python, start_python

from vllm_expert_prefetch.metrics import runtime_dir
from vllm_expert_prefetch.metrics.runtime_dir import ENVIRONMENT_VARIABLE, ensure_runtime_dir

MAKE = "from vllm_expert_prefetch.metrics.runtime_dir import ensure_runtime_dir; directory = ensure_runtime_dir()\n"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """An XDG_RUNTIME_DIR for this process and those it starts; nothing is inherited, no exit handler stays behind."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")  # so that what a test sets is undone
    monkeypatch.setattr(runtime_dir, "atexit", SimpleNamespace(register=lambda *_: None))
    return tmp_path


def test_it_lies_in_the_xdg_runtime_directory_and_is_private(base):
    before = os.umask(0)
    try:
        directory = ensure_runtime_dir()
    finally:
        os.umask(before)
    assert directory.parent == base
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_without_an_xdg_runtime_directory_it_lies_in_the_temporary_one(base, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    assert ensure_runtime_dir().parent == base
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert ensure_runtime_dir().parent == base


def test_asking_again_finds_the_same_one(base):
    assert ensure_runtime_dir() == ensure_runtime_dir()
    assert len(list(base.iterdir())) == 1


def child_directory() -> Path:
    """What a process that this one starts the way vLLM does finds, and its end."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(ensure_runtime_dir)


def test_a_process_started_through_multiprocessing_finds_its_parents_and_leaves_it(base):
    directory = ensure_runtime_dir()
    assert child_directory() == directory
    assert directory.is_dir()


def test_another_program_gets_one_of_its_own(base):
    """A server started from a program that itself uses the plugin must not show that program's counters."""
    directory = ensure_runtime_dir()
    output = run_python(MAKE + "print(directory)", env={ENVIRONMENT_VARIABLE: str(directory)})
    assert Path(output.strip()).parent == base
    assert Path(output.strip()) != directory
    assert directory.is_dir()


def test_an_inherited_one_that_is_gone_is_replaced(base, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(base / "gone"))
    directory = ensure_runtime_dir()
    assert directory.is_dir()
    assert os.environ[ENVIRONMENT_VARIABLE] == str(directory)


@pytest.fixture
def temporary(base, monkeypatch):
    """A temporary folder of this test's own."""
    folder = base / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("place", ["missing", "file", "/proc"], ids=["missing", "a file", "not writable"])
def test_where_the_runtime_directory_cannot_be_used_it_lies_in_the_temporary_one(
    base, temporary, monkeypatch, caplog, place
):
    """As under su, cron and in containers; one line says so."""
    (base / "file").write_text("not a directory")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / place))
    assert ensure_runtime_dir().parent == temporary
    (line,) = caplog.messages
    assert f"the metrics are in {temporary}" in line
    assert str(base / place) in line


def test_a_full_place_is_not_taken(base):
    output = run_python(
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"try:\n    {MAKE}except OSError as error:\n    print(error)"
    )
    assert output.count("File too large") == 2
    assert "with space left" in output
    assert list(base.iterdir()) == []


def test_where_nothing_can_be_used_both_places_and_the_remedy_are_named(base, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(base / "missing"))
    monkeypatch.setattr(tempfile, "tempdir", str(base / "gone"))
    with pytest.raises(OSError, match=r"missing.*gone.*XDG_RUNTIME_DIR or TMPDIR"):
        ensure_runtime_dir()


def test_it_goes_when_its_owner_exits(base):
    assert run_python(MAKE + "(directory / 'file').write_text('x'); print(directory.is_dir())").strip() == "True"
    assert list(base.iterdir()) == []


def test_it_stays_when_a_forked_child_exits(base):
    output = run_python(
        MAKE + "import os, sys\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    sys.exit(0)\n"
        "os.waitpid(child, 0)\n"
        "print(directory.is_dir())\n"
    )
    assert output.strip() == "True"
    assert list(base.iterdir()) == []


def test_what_a_killed_server_left_is_removed_by_the_next_start(base):
    with start_python(MAKE + "print('ready', flush=True); input()") as killed:
        assert killed.stdout.readline() == "ready\n"
        (left,) = base.iterdir()
        (left / "engine0-rank0-000000.counters").write_text("x")
        killed.send_signal(signal.SIGKILL)
    assert left.is_dir()
    ensure_runtime_dir()
    assert not left.exists()


def test_what_a_running_server_uses_is_left_alone(base):
    with start_python(MAKE + "print('ready', flush=True); input()") as running:
        assert running.stdout.readline() == "ready\n"
        (used,) = base.iterdir()
        ensure_runtime_dir()
        assert used.is_dir()
        running.communicate("\n")


def test_a_server_of_another_container_with_the_same_process_number_is_left_alone(base, monkeypatch):
    """Both are process 1 of their own, with one temporary folder."""
    directory = ensure_runtime_dir()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    other = ensure_runtime_dir()
    assert other != directory
    assert directory.is_dir()


def test_nobody_sees_it_before_it_is_locked(base, monkeypatch):
    """Another start would take it for a dead server's."""
    seen = []
    monkeypatch.setattr(runtime_dir, "hold_lock", lambda path: seen.append([entry.name[0] for entry in base.iterdir()]))
    assert ensure_runtime_dir().name.startswith("expert-prefetch-")
    assert seen == [["."]]


def test_what_is_not_ours_is_left_alone(base):
    others = [base / name for name in ("expert-prefetch-x1234-a", "something-1234-a", "expert-prefetch-")]
    for other in others:
        other.mkdir()
    (base / "expert-prefetch-1234-link").symlink_to(others[0])
    ensure_runtime_dir()
    assert all(other.is_dir() for other in others)


def test_a_leftover_that_another_start_removes_first_is_no_error(base, monkeypatch):
    left = base / "expert-prefetch-1234-a"
    left.mkdir()

    lstat = Path.lstat

    def removed_meanwhile(path):
        if path == left and left.exists():
            left.rmdir()
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", removed_meanwhile)
    assert ensure_runtime_dir().is_dir()
    assert not left.exists()


def test_a_dangling_link_that_looks_like_a_leftover_is_no_error(base):
    (base / "expert-prefetch-1234-a").symlink_to(base / "nowhere")
    assert ensure_runtime_dir().is_dir()
