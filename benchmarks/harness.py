"""What the benchmarks share: engines in processes of their own, prompts, the machine's description, JSON output."""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TINY_MODEL = ROOT / "tests" / "models" / "tiny-moe"
PROMPTS = ROOT / "tests" / "data" / "prompts.jsonl"
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Engine:
    """One engine to run. `config` is the plugin's configuration; None is stock vLLM."""

    model: str
    eager: bool
    config: dict[str, Any] | None
    max_num_seqs: int = 16
    max_model_len: int = 512
    extra: dict[str, Any] = field(default_factory=dict)

    def open(self) -> Any:
        """A vLLM `LLM` in this process."""
        from vllm import LLM

        additional: dict[str, Any] = (
            {} if self.config is None else {"additional_config": {"expert_prefetch": self.config}}
        )
        return LLM(
            self.model,
            enforce_eager=self.eager,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            enable_prefix_caching=False,
            **additional,
            **self.extra,
        )


def engine_environment() -> dict[str, str]:
    """One thread, engine inside the process, a small KV cache: what a 2-core machine can repeat."""
    return {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "OMP_NUM_THREADS": "1",
    }


def run_in_process(script: str, job: dict[str, Any]) -> Any:
    """Run `script --job FILE` in a process of its own and return the JSON that it writes to the job's `output`."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output.json"
        job_file = Path(directory) / "job.json"
        job_file.write_text(json.dumps({**job, "output": str(output)}))
        done = subprocess.run(
            [sys.executable, script, "--job", str(job_file)], env=engine_environment(), capture_output=True, text=True
        )
        if done.returncode != 0:
            raise RuntimeError(f"benchmark process failed:\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
        return json.loads(output.read_text())


@contextlib.contextmanager
def job_output(path: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """In the child process: the job, and a result to fill in."""
    job = json.loads(Path(path).read_text())
    result: dict[str, Any] = {}
    yield job, result
    Path(job["output"]).write_text(json.dumps(result))


def counters() -> dict[str, float]:
    """The plugin's metrics of this process' engine: name{label=value} -> value; empty for stock vLLM."""
    from prometheus_client import REGISTRY

    found = {}
    for metric in REGISTRY.collect():
        if metric.name.startswith("vllm_expert_prefetch_"):
            for sample in metric.samples:
                own = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine", "rank")}
                found[sample.name.removeprefix("vllm_expert_prefetch_") + "".join(f"/{v}" for v in own.values())] = (
                    sample.value
                )
    return found


def load_prompts(count: int) -> list[str]:
    """`count` prompts, the domains in turn."""
    by_domain: dict[str, list[str]] = {}
    for line in PROMPTS.read_text().splitlines():
        entry = json.loads(line)
        by_domain.setdefault(entry["domain"], []).append(entry["prompt"])
    interleaved = [prompt for group in zip(*by_domain.values(), strict=True) for prompt in group]
    if count > len(interleaved):
        raise ValueError(f"there are {len(interleaved)} prompts, {count} were asked for")
    return interleaved[:count]


def parser(description: str | None) -> argparse.ArgumentParser:
    """Arguments that every benchmark takes."""
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--quick", action="store_true", help="under 60 seconds, fewer configurations")
    arguments.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    arguments.add_argument("--job", help=argparse.SUPPRESS)
    return arguments


def finish(name: str, result: dict[str, Any], arguments: argparse.Namespace) -> None:
    """End with one JSON line; a full run also writes it under benchmarks/results/."""
    if not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        record = {**provenance(), **result}
        (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(result))


def provenance() -> dict[str, Any]:
    """Commit, date, machine and versions."""
    from importlib.metadata import version

    from vllm.version import __version__ as vllm_version

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    processor = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    return {
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": f"{processor}, {os.cpu_count()} cores, no GPU, 1 thread per engine",
        "versions": {
            "vllm": vllm_version,
            "torch": version("torch"),
            "vllm-expert-prefetch": version("vllm-expert-prefetch"),
            "python": platform.python_version(),
        },
        "command": " ".join(["python", "benchmarks/" + Path(sys.argv[0]).name, *map(_without_folder, sys.argv[1:])]),
    }


def _without_folder(argument: str) -> str:
    return Path(argument).name if Path(argument).is_absolute() else argument


def engine_job(engine: Engine, **more: Any) -> dict[str, Any]:
    """A job that describes an engine."""
    return {"engine": asdict(engine), **more}
