"""Curves under load: a real server, `vllm bench serve` as the client, one to 64 requests at a time.

Three servers at a time: plain vLLM with every expert resident (the ceiling), and the plugin with a share of the experts
in slots, look-ahead off and on, over an emulated link on which one expert takes `copy_compute` times as long as a layer
of the plain model (its TPOT at one request when the run began, divided by its layers). They are asked in turn, in
rounds; a row has the medians of the rounds. Prompts are text of several domains, cut to lengths that spread as those of
chats do; answers as well. Greedy, no answer ends early.

Rows are kept in `--out` while it runs: a run that was interrupted goes on where it was; `--fresh` begins anew.

`share_of_resident` is output tokens per second over plain vLLM's in the same cell: its least value over all rows with
look-ahead at half residency and copy_compute 1. `worst_over_off`: the greatest TPOT (median) with look-ahead over that
without it in the same cell. `worst_over_full_copy`: TPOT at 32 requests over that of computing and copying every absent
expert of every layer in every step, one after the other.

With one share of slots (`--shares`) nothing is drawn.
"""

import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from harness import ROOT, TINY_MODEL, finish, parser

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "serving")]

from servers import Server, serve  # noqa: E402

from vllm_expert_prefetch.bench.client import Lengths, ask, scrape  # noqa: E402
from vllm_expert_prefetch.bench.server import read  # noqa: E402
from vllm_expert_prefetch.metrics.rates import Between  # noqa: E402

CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
SHARES, COPY_COMPUTE = (0.25, 0.5, 0.75), (0.5, 1.0, 2.0)
LATENCY_US = 10.0
PLAIN = "plain"
SERVERS = (PLAIN, "off", "auto")
ROUNDS = 3
SETTLE_SECONDS = 1.2
"""vLLM's processes spin for a second after they were last asked."""


class Cell(NamedTuple):
    """What is compared at a time."""

    share: float
    copy_compute: float

    @property
    def name(self) -> str:
        return f"{self.share:.0%}, x{self.copy_compute:g}"


def main() -> int:
    """Serve, load, report."""
    arguments = parser(__doc__)
    arguments.add_argument("--kind", choices=["tiny", "smollm2-moe"], default="tiny", help="the latter made beforehand")
    arguments.add_argument("--concurrency", default=",".join(map(str, CONCURRENCIES)))
    arguments.add_argument("--shares", default=",".join(map(str, SHARES)), help="of the experts that have a slot")
    arguments.add_argument(
        "--ratios", default=",".join(map(str, COPY_COMPUTE)), help="copy/compute, where it is a half"
    )
    arguments.add_argument(
        "--out", type=Path, default=ROOT / "build" / "serving.json", help="rows of an unfinished run"
    )
    arguments.add_argument("--fresh", action="store_true")
    arguments.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures", help="folder for the plot")
    options = arguments.parse_args()
    shares, ratios = (list(map(float, given.split(","))) for given in (options.shares, options.ratios))
    cells = [Cell(share, ratio) for share in shares for ratio in ratios if share == 0.5 or ratio == 1]
    concurrencies = [int(number) for number in options.concurrency.split(",")]
    if options.quick:
        cells, concurrencies = [Cell(0.5, 1.0)], [1]
        options.out, options.fresh = ROOT / "build" / "serving-quick.json", True
    rows = measure(options, cells, concurrencies)
    result = {**summary(rows), "rows": rows}
    if not options.quick and len(shares) > 1:
        from serving_plots import draw

        draw(rows, options.pictures / f"serving-{options.kind}.png")
    finish("serving" if options.kind == "tiny" else f"serving-{options.kind}", result, options)
    return 0


def measure(options: Any, cells: list[Cell], concurrencies: list[int]) -> list[dict[str, Any]]:
    """All rows, those of an earlier run included."""
    options.out.parent.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    if options.out.exists() and not options.fresh:
        rows = [row for row in json.loads(options.out.read_text()) if row["kind"] == options.kind]
    model = TINY_MODEL if options.kind == "tiny" else ROOT / ".demo" / options.kind
    for cell in cells:
        done = {row["concurrency"] for row in rows if (row["share"], row["copy_compute"]) == cell}
        missing = [number for number in concurrencies if number not in done]
        if not missing:
            continue
        with contextlib.ExitStack() as stack:
            servers: dict[str, Server] = {}
            plain_tpot_ms = rows[0]["tpot_ms_p50"] if rows else 0.0
            for prefetch in SERVERS[::2] if options.quick else SERVERS:
                given = flags(cell, prefetch, model, plain_tpot_ms)
                servers[prefetch] = server = stack.enter_context(serve(*given, model=model))
                server.wait_ready()
                load(server, 2, 2, options.out.parent)  # warm-up
                plain_tpot_ms = plain_tpot_ms or load(server, 1, 5, options.out.parent)["p50_tpot_ms"]
            for concurrency in missing:
                rows += rows_of(servers, cell, concurrency, options)
                options.out.write_text(json.dumps(rows))
    return rows


def flags(cell: Cell, prefetch: str, model: Path, plain_tpot_ms: float) -> list[str]:
    """Of `vllm serve`."""
    common = ["--max-num-seqs", "64", "--no-enable-prefix-caching"]
    if prefetch == PLAIN:
        return common
    shape = json.loads((model / "config.json").read_text())
    record_bytes = 3 * 2 * shape["hidden_size"] * shape.get("moe_intermediate_size", shape["intermediate_size"])
    layer_seconds = plain_tpot_ms / 1000 / shape["num_hidden_layers"]
    config = {
        "cache_fraction": cell.share,
        "prefetch": prefetch,
        "emulated_link_gbps": record_bytes / (cell.copy_compute * layer_seconds) / 1e9,
        "emulated_link_latency_us": LATENCY_US,
    }
    return [*common, "--plugin", "expert_prefetch", "--additional-config", json.dumps({"expert_prefetch": config})]


def rows_of(servers: dict[str, Server], cell: Cell, concurrency: int, options: Any) -> list[dict[str, Any]]:
    """One for each server: what a load gave, by the client and by the plugin's counters."""
    measured: dict[str, list[dict[str, float]]] = {prefetch: [] for prefetch in servers}
    for number in range(1 if options.quick else ROUNDS):
        order = list(servers)
        for prefetch in order[number % len(order) :] + order[: number % len(order)]:
            time.sleep(0 if options.quick else SETTLE_SECONDS)
            measured[prefetch].append(figures(servers[prefetch], prefetch, concurrency, options.out.parent))
    rows = []
    for prefetch, found in measured.items():
        where = {"kind": options.kind, **cell._asdict(), "prefetch": prefetch, "concurrency": concurrency}
        medians = {name: round(float(statistics.median(one[name] for one in found)), 4) for name in found[0]}
        rows.append(where | medians)
        if not options.json:
            print(rows[-1], flush=True)
    return rows


def figures(server: Server, prefetch: str, concurrency: int, folder: Path) -> dict[str, float]:
    """Of one load on one server."""
    before = scrape(read(f"{server.url}/metrics"))
    found = load(server, concurrency, max(5, concurrency), folder)
    seen = Between(before, scrape(read(f"{server.url}/metrics")))
    measured = {
        "output_tokens_per_s": found["output_throughput"],
        "ttft_ms_p50": found["p50_ttft_ms"],
        "tpot_ms_p50": found["p50_tpot_ms"],
        "tpot_ms_p99": found["p99_tpot_ms"],
        "itl_ms_p99": found["p99_itl_ms"],
    }
    if prefetch != PLAIN:
        measured |= {
            "hit_rate": seen.gained("lookups_total", outcome="hit") / seen.gained("lookups_total"),
            "mb_per_token": seen.gained("transfer_bytes_total") / 1e6 / found["total_output_tokens"],
            "stall_share": seen.gained("stall_seconds_total") / found["duration"],
            "record_mb": seen.after.total("expert_record_bytes") / 1e6,
            "absent_records": seen.after.total("experts") - seen.after.total("slots"),
            "link_gbps": seen.after.total("link_bytes_per_second") / 1e9,
        }
    return measured


def load(server: Server, concurrency: int, num_requests: int, folder: Path) -> dict[str, Any]:
    """What the client finds."""
    return ask(server.url, "demo", str(TINY_MODEL), concurrency, num_requests, folder, Lengths())


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the curves are about."""
    cells: dict[tuple[float, float, int], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["share"], row["copy_compute"], row["concurrency"]), {})[row["prefetch"]] = row
    over_off, over_full_copy, shares = [], [], []
    for (share, ratio, concurrency), cell in cells.items():
        plain = cell[PLAIN]
        for row in cell.values():
            row["share_of_resident"] = round(row["output_tokens_per_s"] / plain["output_tokens_per_s"], 3)
        ahead = cell["auto"]
        if (share, ratio) == (0.5, 1.0):
            shares.append(ahead["share_of_resident"])
        if "off" not in cell:
            continue
        over_off.append(ahead["tpot_ms_p50"] / cell["off"]["tpot_ms_p50"])
        if concurrency == 32:
            for row in (cell["off"], ahead):
                copying = row["absent_records"] * row["record_mb"] / row["link_gbps"]
                over_full_copy.append(row["tpot_ms_p50"] / (plain["tpot_ms_p50"] + copying))
    return {
        "share_of_resident": min(shares, default=None),
        "worst_over_off": round(max(over_off), 3) if over_off else None,
        "worst_over_full_copy": round(max(over_full_copy), 3) if over_full_copy else None,
    }


if __name__ == "__main__":
    sys.exit(main())
