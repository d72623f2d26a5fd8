"""How much host memory there may be: the host's, or the limit of a container, in both versions of control groups."""

import os
from pathlib import Path

import pytest

import vllm_expert_prefetch.memory.host_limit as module
from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.memory.host_limit import HostLimit, check_experts_fit, host_limit

TOTAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
V1, V2 = "memory.limit_in_bytes", "memory.max"


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write what Linux shows of a process's control groups, and where they are mounted, below a folder."""
    monkeypatch.setattr(module, "_PROC", tmp_path / "proc")

    def write(cgroup: str, mounts: dict[str, str], limits: dict[str, str]) -> Path:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "cgroup").write_text(cgroup)
        lines = [f"30 24 0:27 / {tmp_path / path} rw - {kind}\n" for path, kind in mounts.items()]
        (tmp_path / "proc" / "mountinfo").write_text("".join(lines))
        for path, text in limits.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(text)
        return tmp_path

    return write


ON_V1 = "5:cpu,cpuacct:/\n4:memory:/docker/abc\n1:name=systemd:/\n"
MOUNTED_V1 = {"sys/cpu": "cgroup cgroup rw,cpu", "sys/memory": "cgroup cgroup rw,memory"}


@pytest.mark.parametrize(
    ("cgroup", "mounts", "limits", "found"),
    [
        pytest.param("0::/\n", {"sys": "cgroup2 x rw"}, {f"sys/{V2}": "1000\n"}, f"sys/{V2}", id="v2 in a container"),
        pytest.param("0::/a/b\n", {"sys": "cgroup2 x rw"}, {f"sys/a/b/{V2}": "1000"}, f"sys/a/b/{V2}", id="v2 below"),
        pytest.param(
            "0::/a/b\n",
            {"sys": "cgroup2 x rw"},
            {f"sys/a/b/{V2}": "max", f"sys/a/{V2}": "1000"},
            f"sys/a/{V2}",
            id="v2 of a group above",
        ),
        pytest.param(
            "0::/a/b\n",
            {"sys": "cgroup2 x rw"},
            {f"sys/a/b/{V2}": "2000", f"sys/a/{V2}": "1000"},
            f"sys/a/{V2}",
            id="the least of several",
        ),
        pytest.param(
            ON_V1, MOUNTED_V1, {f"sys/memory/docker/abc/{V1}": "1000"}, f"sys/memory/docker/abc/{V1}", id="v1"
        ),
        pytest.param(ON_V1, MOUNTED_V1, {f"sys/memory/{V1}": "1000"}, f"sys/memory/{V1}", id="v1 in a container"),
        pytest.param(ON_V1, MOUNTED_V1, {f"sys/memory/{V1}": "9223372036854771712"}, None, id="v1 without a limit"),
        pytest.param("0::/\n", {"sys": "cgroup2 x rw"}, {f"sys/{V2}": "max\n"}, None, id="v2 without a limit"),
        pytest.param("0::/\n", {}, {}, None, id="not mounted"),
        pytest.param(ON_V1, {"sys/cpu": "cgroup cgroup rw,cpu"}, {f"sys/cpu/{V1}": "1000"}, None, id="not of memory"),
    ],
)
def test_the_limit_is_the_one_that_holds_for_this_process(groups, cgroup, mounts, limits, found):
    folder = groups(cgroup, mounts, limits)
    expected = HostLimit(1000, str(folder / found)) if found else HostLimit(TOTAL, "the memory of this host")
    assert host_limit() == expected


def test_where_linux_shows_nothing_the_host_is_the_limit(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_PROC", tmp_path)
    assert host_limit().num_bytes == TOTAL


@pytest.mark.parametrize(("num_bytes", "says"), [(1, False), (900, False), (901, True), (1000, True)])
def test_little_room_for_everything_else_is_said(groups, num_bytes, says):
    groups("0::/\n", {"sys": "cgroup2 x rw"}, {f"sys/{V2}": "1000\n"})
    note = check_experts_fit(num_bytes)
    assert (note is not None) == says
    assert note is None or "less than a tenth is left for everything else" in note


def test_more_than_there_may_be_is_refused_with_both_numbers_and_the_remedy(groups):
    groups("0::/\n", {"sys": "cgroup2 x rw"}, {f"sys/{V2}": "3200000000\n"})
    with pytest.raises(ConfigError, match=r"take 58 GB of host memory, and .*memory.max is 3.2 GB: raise the"):
        check_experts_fit(58 * 10**9)
