"""Curves under load: a real server, `vllm bench serve` as the client, one to 64 requests at a time.

Every variant is a server of its own: plain vLLM with every expert resident (the ceiling), and the plugin with a share
of the experts in slots, look-ahead off and on, over an emulated link on which one expert takes `copy_compute` times as
long as a layer of the plain model (its TPOT at one request, divided by its layers). Prompts are text of several
domains, cut to lengths that spread as those of chats do; answers as well. Greedy, no answer ends early.

Rows are kept in `--out` while it runs: a run that was interrupted goes on where it was; `--fresh` begins anew.

`share_of_resident` is output tokens per second over plain vLLM's at the same concurrency: its least value over all rows
with look-ahead at half residency and copy_compute 1. `worst_over_off`: the greatest TPOT (median) with look-ahead over
that without it in the same cell. `worst_over_full_copy`: TPOT at 32 requests over that of computing and copying every
absent expert of every layer in every step, one after the other.
"""

import json
import sys
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


class Variant(NamedTuple):
    """A server. `share` 0: plain vLLM."""

    share: float
    copy_compute: float
    prefetch: str

    @property
    def name(self) -> str:
        return f"{self.share:.0%}, x{self.copy_compute:g}, {self.prefetch}" if self.share else "plain vLLM"


PLAIN = Variant(0.0, 0.0, "off")


def main() -> int:
    """Serve, load, report."""
    arguments = parser(__doc__)
    arguments.add_argument("--kind", choices=["tiny", "smollm2-moe"], default="tiny", help="the latter made beforehand")
    arguments.add_argument("--concurrency", default=",".join(map(str, CONCURRENCIES)))
    arguments.add_argument(
        "--out", type=Path, default=ROOT / "build" / "serving.json", help="rows of an unfinished run"
    )
    arguments.add_argument("--fresh", action="store_true")
    arguments.add_argument("--pictures", type=Path, default=ROOT / "docs" / "pictures", help="folder for the plots")
    options = arguments.parse_args()
    variants = [
        Variant(share, ratio, prefetch) for share in SHARES for ratio in COPY_COMPUTE for prefetch in ("off", "auto")
    ]
    variants = [variant for variant in variants if variant.share == 0.5 or variant.copy_compute == 1]
    concurrencies = [int(number) for number in options.concurrency.split(",")]
    if options.quick:
        variants, concurrencies = [Variant(0.5, 1.0, "auto")], [1]
        options.out, options.fresh = ROOT / "build" / "serving-quick.json", True
    rows = measure(options, [PLAIN, *variants], concurrencies)
    result = {**summary(rows), "rows": rows}
    if not options.quick:
        from serving_plots import draw

        draw(rows, options.pictures / f"serving-{options.kind}.png")
    finish("serving" if options.kind == "tiny" else f"serving-{options.kind}", result, options)
    return 0


def measure(options: Any, variants: list[Variant], concurrencies: list[int]) -> list[dict[str, Any]]:
    """All rows, those of an earlier run included."""
    options.out.parent.mkdir(exist_ok=True)
    rows: list[dict[str, Any]] = []
    if options.out.exists() and not options.fresh:
        rows = [row for row in json.loads(options.out.read_text()) if row["kind"] == options.kind]
    model = TINY_MODEL if options.kind == "tiny" else ROOT / ".demo" / options.kind
    for variant in variants:
        done = {row["concurrency"] for row in rows if row["variant"] == variant.name}
        missing = [number for number in concurrencies if number not in done]
        if not missing:
            continue
        with serve(*flags(variant, model, rows), model=model) as server:
            server.wait_ready()
            load(server, 2, 2, options.out.parent)  # warm-up
            for concurrency in missing:
                row = one_row(server, variant, concurrency, options)
                rows.append(row)
                options.out.write_text(json.dumps(rows))
                if not options.json:
                    print(row, flush=True)
    return rows


def flags(variant: Variant, model: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Of `vllm serve`."""
    common = ["--max-num-seqs", "64", "--no-enable-prefix-caching"]
    if variant == PLAIN:
        return common
    shape = json.loads((model / "config.json").read_text())
    record_bytes = 3 * 2 * shape["hidden_size"] * shape.get("moe_intermediate_size", shape["intermediate_size"])
    config = {
        "cache_fraction": variant.share,
        "prefetch": variant.prefetch,
        "emulated_link_gbps": record_bytes / (variant.copy_compute * layer_seconds(rows, shape)) / 1e9,
        "emulated_link_latency_us": LATENCY_US,
    }
    return [*common, "--plugin", "expert_prefetch", "--additional-config", json.dumps({"expert_prefetch": config})]


def layer_seconds(rows: list[dict[str, Any]], shape: dict[str, Any]) -> float:
    """Of the plain model, one request at a time."""
    (plain,) = [row for row in rows if row["variant"] == PLAIN.name and row["concurrency"] == 1]
    return float(plain["tpot_ms_p50"]) / 1000 / int(shape["num_hidden_layers"])


def one_row(server: Server, variant: Variant, concurrency: int, options: Any) -> dict[str, Any]:
    """What a load gave, by the client and by the plugin's counters."""
    num_requests = max(4, concurrency) if options.quick else max(10, 2 * concurrency)
    before = scrape(read(f"{server.url}/metrics"))
    found = load(server, concurrency, num_requests, options.out.parent)
    seen = Between(before, scrape(read(f"{server.url}/metrics")))
    row = {
        "kind": options.kind,
        "variant": variant.name,
        **variant._asdict(),
        "concurrency": concurrency,
        "requests": found["completed"],
        "output_tokens_per_s": found["output_throughput"],
        "ttft_ms_p50": found["p50_ttft_ms"],
        "tpot_ms_p50": found["p50_tpot_ms"],
        "tpot_ms_p99": found["p99_tpot_ms"],
        "itl_ms_p99": found["p99_itl_ms"],
    }
    if variant != PLAIN:
        lookups = seen.gained("lookups_total")
        row |= {
            "hit_rate": seen.gained("lookups_total", outcome="hit") / lookups,
            "mb_per_token": seen.gained("transfer_bytes_total") / 1e6 / found["total_output_tokens"],
            "stall_share": seen.gained("stall_seconds_total") / found["duration"],
            "record_mb": seen.after.total("expert_record_bytes") / 1e6,
            "absent_records": seen.after.total("experts") - seen.after.total("slots"),
            "link_gbps": seen.after.total("link_bytes_per_second") / 1e9,
        }
    return {name: round(float(value), 4) if isinstance(value, float) else value for name, value in row.items()}


def load(server: Server, concurrency: int, num_requests: int, folder: Path) -> dict[str, Any]:
    """What the client finds."""
    return ask(server.url, "demo", str(TINY_MODEL), concurrency, num_requests, folder, Lengths())


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the curves are about."""
    plain = {row["concurrency"]: row for row in rows if row["variant"] == PLAIN.name}
    for row in rows:
        ceiling = plain[row["concurrency"]]["output_tokens_per_s"]
        row["share_of_resident"] = round(row["output_tokens_per_s"] / ceiling, 3)
    ahead = [row for row in rows if row["prefetch"] == "auto"]
    off = {(row["share"], row["copy_compute"], row["concurrency"]): row for row in rows if row["prefetch"] == "off"}
    ratios = [
        row["tpot_ms_p50"] / off[key]["tpot_ms_p50"]
        for row in ahead
        if (key := (row["share"], row["copy_compute"], row["concurrency"])) in off
    ]
    copying = [
        row["tpot_ms_p50"] / (plain[32]["tpot_ms_p50"] + row["absent_records"] * row["record_mb"] / row["link_gbps"])
        for row in rows
        if row["concurrency"] == 32 and row["share"]
    ]
    half = [row["share_of_resident"] for row in ahead if (row["share"], row["copy_compute"]) == (0.5, 1.0)]
    return {
        "share_of_resident": min(half, default=None),
        "worst_over_off": round(max(ratios), 3) if ratios else None,
        "worst_over_full_copy": round(max(copying), 3) if copying else None,
    }


if __name__ == "__main__":
    sys.exit(main())
