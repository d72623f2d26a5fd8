"""Does it last? A server under mixed load for minutes: the right tokens, no growth, a clean end.

Plain vLLM first, asked one request at a time: the references. Then plain vLLM under load, the control, whose batches
round differently from the references' at times; then the plugin with a quarter of the experts in slots, under the same
load. Requests are short, long, prefix-shared, aborted in the middle, of two answers each, and sampled with seeds. All
once in one process, and once with tensor parallel size 2.

`differing`: answers of the plugin unlike the reference. `memory_growth_mb` and `descriptor_growth`: of all processes of
the plugin's server, idle each time, from a quarter of the load to its end. `control_...`: of plain vLLM under the same
load, with as many ranks. `exit_code` and `left_over`: after SIGTERM.

`faults`, which make the exit status 1: more `differing` or `descriptor_growth` than plain vLLM shows, a
`memory_growth_mb` of 64 more than its, errors, another exit code than 0, processes that are left.
"""

import contextlib
import json
import os
import random
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from harness import ROOT, finish, load_prompts, parser

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serving")]

from servers import Server, serve  # noqa: E402

CONFIG = {"cache_fraction": 0.25, "prefetch": "auto", "emulated_link_gbps": 0.5, "emulated_link_latency_us": 10}
CLIENTS = 8
NUM_REFERENCES = 60
"""Different requests; load repeats them."""
EXIT_SECONDS = 30
SETTLE_SECONDS = 2
"""Until connections are closed and what was aborted has ended."""
WARM_UP_SHARE = 0.25
"""Of the load: what grows until then is not counted."""
SPARE_MB = 64
"""So much more than plain vLLM's the plugin's memory may grow."""


class Request(NamedTuple):
    """What is sent; `is_aborted`: the client leaves after the first tokens."""

    body: dict[str, Any]
    is_aborted: bool = False


def main() -> int:
    """Soak and report; 1 where something was lost."""
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=150, help="of load, for each of four servers")
    arguments.add_argument("--requests", type=int, default=500, help="at least, for each of four servers")
    options = arguments.parse_args()
    sizes = [1, 2]
    if options.quick:
        options.seconds, options.requests, sizes = 4.0, 20, [1]
    rows = [soak(size, options) for size in sizes]
    keys = ("requests", "differing", "control_differing", "errors", "left_over")
    result = {key: sum(row[key] for row in rows) for key in keys}
    result |= {key: max(row[key] for row in rows) for key in ("memory_growth_mb", "descriptor_growth")}
    result["exit_code"] = next((row["exit_code"] for row in rows if row["exit_code"]), 0)
    result["faults"] = [fault for row in rows for fault in faults(row)]
    finish("soak", {**result, "rows": rows}, options)
    return int(bool(result["faults"]))


def faults(row: dict[str, Any]) -> list[str]:
    """Names of the figures that are worse than they may be."""
    found = {
        "differing": row["differing"] > row["control_differing"],
        "errors": row["errors"] > 0,
        "memory_growth_mb": row["memory_growth_mb"] > max(0, row["control_memory_growth_mb"]) + SPARE_MB,
        "descriptor_growth": row["descriptor_growth"] > max(0, row["control_descriptor_growth"]),
        "exit_code": row["exit_code"] != 0,
        "left_over": row["left_over"] > 0,
    }
    return [name for name, is_worse in found.items() if is_worse]


def soak(size: int, options: Any) -> dict[str, Any]:
    """One row: plain vLLM and the plugin with tensor parallel size `size`."""
    environment = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(size))} if size > 1 else None
    common = ["--max-num-seqs", "16", "--enable-prefix-caching", "--tensor-parallel-size", str(size)]
    asked = requests(NUM_REFERENCES if not options.quick else 12)
    with serve(*common, environment=environment) as server:
        server.wait_ready()
        with httpx.Client(timeout=300) as client:
            references = [None if one.is_aborted else answer(client, server, one) for one in asked]
        control = load(server, asked, references, options)
    plugin = ["--plugin", "expert_prefetch", "--additional-config", json.dumps({"expert_prefetch": CONFIG})]
    with serve(*common, *plugin, environment=environment) as server:
        server.wait_ready()
        found = load(server, asked, references, options)
        counted = server.metrics()
        exit_code = server.stop(EXIT_SECONDS)
        left_over = 0 if server.all_gone(10) else len(server.descendants())
    misses = sum(value for name, value in counted.items() if "lookups_total{" in name and 'outcome="miss"' in name)
    if not misses:
        raise RuntimeError("the plugin served nothing from its cache: no lookup missed")
    compared = ("requests", "differing", "memory_growth_mb", "descriptor_growth")
    row = {"tensor_parallel_size": size, **found, **{f"control_{name}": control[name] for name in compared}}
    return row | {"misses": misses, "exit_code": exit_code, "left_over": left_over}


def requests(number: int) -> list[Request]:
    """All kinds in turn."""
    rng = random.Random(0)
    prompts = load_prompts(number)
    shared = " ".join(prompts[:6])[:500]
    made = []
    for index, prompt in enumerate(prompts):
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.choice([4, 12, 24]), "temperature": 0}
        kind = index % 6
        if kind == 1:
            body["prompt"] = (prompt + " ") * (700 // len(prompt))
        elif kind == 2:
            body["prompt"] = shared + prompt
        elif kind == 3:
            body |= {"n": 2, "temperature": 0.8, "seed": index}
        elif kind == 4:
            body |= {"temperature": 0.7, "top_p": 0.9, "seed": index}
        made.append(Request({"model": "demo", "ignore_eos": True, **body}, is_aborted=kind == 5))
    return made


def answer(client: httpx.Client, server: Server, request: Request) -> list[str]:
    """The texts, in order."""
    found = client.post(f"{server.url}/v1/completions", json=request.body)
    found.raise_for_status()
    return [choice["text"] for choice in sorted(found.json()["choices"], key=lambda choice: int(choice["index"]))]


def abort(client: httpx.Client, server: Server, request: Request) -> None:
    """Leave after the first tokens."""
    body = {**request.body, "stream": True, "max_tokens": 200}
    with client.stream("POST", f"{server.url}/v1/completions", json=body) as stream:
        stream.raise_for_status()
        for _ in zip(range(3), stream.iter_lines(), strict=False):
            pass


def load(
    server: Server, asked: Sequence[Request], references: Sequence[list[str] | None], options: Any
) -> dict[str, Any]:
    """Eight clients, for the time and the number of requests asked for at least; a pause after a quarter of it."""
    state = {"requests": 0, "differing": 0, "errors": 0}
    lock = threading.Lock()
    usage: list[tuple[float, int]] = []

    def work(seed: int, until: float, least: float) -> None:
        rng = random.Random(seed)
        with httpx.Client(timeout=300, limits=httpx.Limits(max_keepalive_connections=0)) as client:
            while time.monotonic() < until or state["requests"] < least:
                index = rng.randrange(len(asked))
                differs = failed = False
                try:
                    if asked[index].is_aborted:
                        abort(client, server, asked[index])
                    else:
                        differs = answer(client, server, asked[index]) != references[index]
                except (httpx.HTTPError, KeyError):
                    failed = True
                with lock:
                    state["requests"] += 1
                    state["differing"] += differs
                    state["errors"] += failed
                    if failed and state["errors"] > len(asked):
                        return

    for share in (WARM_UP_SHARE, 1 - WARM_UP_SHARE):
        until, least = time.monotonic() + share * options.seconds, state["requests"] + share * options.requests
        seeds = range(len(usage) * CLIENTS, (len(usage) + 1) * CLIENTS)
        threads = [threading.Thread(target=work, args=(seed, until, least), daemon=True) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        time.sleep(SETTLE_SECONDS)
        usage.append(usage_of(server))
    growth = {"memory_growth_mb": round(usage[1][0] - usage[0][0], 1), "descriptor_growth": usage[1][1] - usage[0][1]}
    return {**state, **growth, "memory_mb": round(usage[1][0], 1)}


def usage_of(server: Server) -> tuple[float, int]:
    """Memory that the server's processes keep for themselves, in MB, and their descriptors."""
    memory, descriptors = 0.0, 0
    for pid in server.descendants():
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            memory += sum(
                int(line.split()[1]) / 1000
                for line in rollup.splitlines()
                if line.startswith(("Private_", "Shared_Dirty"))
            )
            descriptors += len(os.listdir(f"/proc/{pid}/fd"))
    return memory, descriptors


if __name__ == "__main__":
    sys.exit(main())
