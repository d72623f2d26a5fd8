"""The command as it is used: real servers, vLLM's own client, and an interruption."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engines import TINY_MODEL
from processes import is_running
from servers import descendants_of

from vllm_expert_prefetch.bench.contestants import OFF, ON, STOCK
from vllm_expert_prefetch.config import config_from_additional

COMMAND = [str(Path(sys.executable).with_name("vllm-expert-prefetch")), "bench", str(TINY_MODEL)]
SMALLEST = ["--link-gbps", "0.1", "--rounds", "1", "--requests", "3", "--concurrency", "1"]
SECONDS = 300


def start(*flags: str) -> subprocess.Popen[str]:
    """The command with the smallest load. It hears Ctrl-C even where the tests run in the background."""
    return subprocess.Popen(
        ["env", "--default-signal=INT", *COMMAND, *SMALLEST, *flags],
        env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def interrupt(process: subprocess.Popen[str], line: str) -> str:
    """Ctrl-C while it starts the server that `line` tells of; what it said. Nothing that it started is left."""
    said = ""
    assert process.stderr is not None
    while line not in said:
        told = process.stderr.readline()
        assert told, said
        said += told
    time.sleep(2)
    servers = descendants_of(process.pid)
    assert servers
    process.send_signal(signal.SIGINT)
    said += process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 130, said
    assert not any(map(is_running, servers))
    return said


def finish(process: subprocess.Popen[str]) -> tuple[str, str]:
    """What it prints and says."""
    printed, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    return printed, said


def names_of(said: str) -> list[str]:
    """Whose servers were started, in order."""
    return re.findall(r"^round \d+ of \d+: (\S+) starts$", said, re.MULTILINE)


@pytest.mark.engine
def test_an_interrupted_comparison_of_real_servers_goes_on_and_writes_what_vllm_serve_reads(tmp_path):
    kept, written = tmp_path / "rows.json", tmp_path / "best.yaml"
    out = ["--out", str(kept)]
    assert "the same command goes on" in interrupt(start(*out), f"{OFF} starts")
    begun = json.loads(kept.read_text())["rows"]
    assert [row["name"] for row in begun] == [STOCK]

    printed, said = finish(start(*out))
    assert names_of(said) == [OFF, ON], said
    rows = json.loads(kept.read_text())["rows"]
    assert rows[:1] == begun
    assert [row["name"] for row in rows] == [STOCK, OFF, ON]
    for row in rows:
        assert row["requests"] == 3
        assert row["output_tokens_per_s"] > 0
        assert row["tpot_ms"] > 0
    for row in rows[1:]:
        assert 0 < row["hit_rate"] < 1
        assert row["mb_per_token"] > 0
    result = json.loads(printed.splitlines()[-1])
    assert [own["name"] for own in result["medians"]] == [STOCK, OFF, ON]
    assert result["best"] in (OFF, ON)
    assert result["verdict"].startswith(f"best: {result['best']}, ")
    assert result["failed"] == {}

    again, said = finish(start(*out, "--write-config", str(written)))
    assert names_of(said) == [], "everything was measured"
    assert again.splitlines()[-1] == printed.splitlines()[-1]
    read = as_vllm_serve_reads(written)
    assert (read.model, read.enforce_eager, read.enable_prefix_caching) == (str(TINY_MODEL), True, False)
    assert config_from_additional(read.additional_config).prefetch == ("off" if result["best"] == OFF else "auto")


def as_vllm_serve_reads(file: Path):
    """The arguments of `vllm serve --config FILE`."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser, command = FlexibleArgumentParser(), ServeSubcommand()
    command.subparser_init(parser.add_subparsers())
    arguments = parser.parse_args(["serve", "--config", str(file)])
    command.validate(arguments)
    return arguments
