"""Everybody in turn, several times over, each round beginning with another one; what was measured is kept."""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_expert_prefetch.bench import BenchError
from vllm_expert_prefetch.bench.client import Lengths, ask, scrape
from vllm_expert_prefetch.bench.contestants import Contestant
from vllm_expert_prefetch.bench.server import SERVED_NAME, DidNotStart, read, serve
from vllm_expert_prefetch.metrics.rates import Between

_WARM_UP = 4
"""Requests, two at a time, that are not counted."""


@dataclass(frozen=True)
class Job:
    """What is measured. `common`: arguments of `vllm serve` that all servers share, the model first."""

    common: tuple[str, ...]
    tokenizer: str
    concurrencies: tuple[int, ...]
    num_rounds: int
    num_requests: int
    """At least three for each of the sequences at a time."""
    lengths: Lengths
    start_seconds: float = 1800.0


@dataclass
class Rows:
    """What was measured so far, in a file that an interrupted run goes on with. `job`: what it belongs to."""

    path: Path
    job: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    """Who did not start or failed, and why."""

    @classmethod
    def open(cls, path: Path, job: str, fresh: bool) -> "Rows":
        """Raises BenchError where the file holds another job's rows."""
        if fresh or not path.exists():
            return cls(path, job)
        try:
            kept = json.loads(path.read_text())
            rows, other = kept["rows"], kept["job"]
        except (ValueError, KeyError, TypeError, OSError):
            raise BenchError(f"{path} is no file of this command: name another one with --out") from None
        if other != job:
            raise BenchError(f"{path} holds what another model or other flags gave: --fresh, or another --out")
        return cls(path, job, rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep it. The file is whole at any time: a run may end while it is written."""
        self.rows.append(row)
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text(json.dumps({"job": self.job, "rows": self.rows}, indent=1) + "\n")
        new.replace(self.path)

    def has(self, name: str, number: int, concurrency: int) -> bool:
        """Whether that was measured."""
        return any((row["name"], row["round"], row["concurrency"]) == (name, number, concurrency) for row in self.rows)


def run_rounds(job: Job, found: Sequence[Contestant], rows: Rows, say: Callable[[str], None]) -> None:
    """Measure what `rows` lacks. Who does not start or fails is left out from then on."""
    with tempfile.TemporaryDirectory(prefix="expert-prefetch-bench-") as folder:
        for number in range(job.num_rounds):
            shift = number % len(found)
            for one in [*found[shift:], *found[:shift]]:
                missing = [own for own in job.concurrencies if not rows.has(one.name, number, own)]
                if missing and one.name not in rows.failed:
                    say(f"round {number + 1} of {job.num_rounds}: {one.name} starts")
                    try:
                        _measure(job, one, number, missing, rows, Path(folder), say)
                    except (DidNotStart, RuntimeError, ValueError) as reason:  # the client's, where requests fail
                        rows.failed[one.name] = str(reason)
                        say(f"{one.name} {'does not start' if isinstance(reason, DidNotStart) else 'fails'}: {reason}")


def _measure(
    job: Job,
    one: Contestant,
    number: int,
    concurrencies: Sequence[int],
    rows: Rows,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    def load(url: str, concurrency: int, num_requests: int) -> dict[str, Any]:
        return ask(url, SERVED_NAME, job.tokenizer, concurrency, num_requests, folder, job.lengths)

    with serve([*job.common, *one.arguments], folder / "log", job.start_seconds) as url:
        load(url, 2, _WARM_UP)
        for concurrency in concurrencies:
            before = scrape(read(f"{url}/metrics"))
            found = load(url, concurrency, max(job.num_requests, 3 * concurrency))
            row = {
                "name": one.name,
                "round": number,
                "concurrency": concurrency,
                "requests": found["completed"],
                "output_tokens_per_s": round(found["output_throughput"], 3),
                "tpot_ms": round(found["p50_tpot_ms"], 3),
                "tpot_ms_p99": round(found["p99_tpot_ms"], 3),
                "ttft_ms": round(found["p50_ttft_ms"], 3),
                **_counted(Between(before, scrape(read(f"{url}/metrics"))), found),
            }
            rows.add(row)
            say(f"  {concurrency} at a time: TPOT {row['tpot_ms']:.1f} ms, {row['output_tokens_per_s']:.1f} tokens/s")


def _counted(seen: Between, found: dict[str, Any]) -> dict[str, float]:
    """By the plugin; nothing for plain vLLM."""
    lookups = seen.gained("lookups_total")
    if not lookups:
        return {}
    return {
        "hit_rate": round(seen.gained("lookups_total", outcome="hit") / lookups, 4),
        "mb_per_token": round(seen.gained("transfer_bytes_total") / 1e6 / found["total_output_tokens"], 4),
        "link_gbps": round(seen.after.total("link_bytes_per_second") / 1e9, 3),
    }
