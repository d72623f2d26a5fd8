"""Every panel and alert against a real run: a server with the plugin, a real Prometheus, and load.

Prints each panel's present value. The last line is JSON: `panels`, `panels_without_data`, `alerts_checked`,
`alerts_without_data`, `alerts_firing`, `rules_unhealthy`, and the time per output token by the plugin and by vLLM.
`--pictures` renders what the queries gave over the run as the pictures of docs/operations.md.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from harness import ROOT, finish, load_prompts, parser

sys.path[:0] = [str(ROOT / "tests" / "serving"), str(ROOT / "tests")]

from observatory import (  # noqa: E402
    MissingPrometheus,
    Prometheus,
    Query,
    alert_rules,
    dashboard_queries,
    load,
    remove_scheme,
    run_prometheus,
)
from servers import serve  # noqa: E402

RECORDING_SECONDS = 16
CONFIG = {"cache_fraction": 0.5, "metrics_per_layer": True, "ghost_caches": True, "emulated_link_gbps": 1.0}


def value_of(query: Query, samples: list[dict[str, Any]]) -> str:
    """What a panel shows: its values, named by their labels."""
    shown = []
    for sample in samples[:6]:
        labels = {key: value for key, value in sample["metric"].items() if key not in ("__name__", "instance")}
        name = ",".join(labels.values()) if len(labels) <= 2 else ""
        shown.append(f"{name + ' ' if name else ''}{float(sample['value'][1]):.4g}")
    more = f" and {len(samples) - 6} more" if len(samples) > 6 else ""
    return f"{', '.join(shown)}{more} {query.unit}" if samples else "NO DATA"


def observe(prometheus: Prometheus, instance: str, quiet: bool) -> dict[str, Any]:
    """Ask every panel's and alert's question once."""
    queries, empty = dashboard_queries(instance), []
    for query in queries:
        samples = prometheus.query(query.expression)
        if not samples:
            empty.append(f"{query.dashboard}: {query.panel}: {query.expression}")
        if not quiet:
            print(f"{query.dashboard:26} {_title(query):42} {value_of(query, samples)}")
    alerts = {_name(rule): prometheus.series_without_data(rule) for rule in alert_rules()}
    firing = {_name(rule): bool(prometheus.query(rule["expr"])) for rule in alert_rules()}
    if not quiet:
        for name, missing in alerts.items():
            state = f"NO DATA for {missing}" if missing else "would fire" if firing[name] else "quiet"
            print(f"{'alert':26} {name:42} {state}")
    return {
        "panels": len({(query.dashboard, query.panel) for query in queries}),
        "queries": len(queries),
        "panels_without_data": empty,
        "alerts_checked": len(alerts),
        "alerts_without_data": [name for name, missing in alerts.items() if missing],
        "alerts_firing": [name for name, fires in firing.items() if fires],
        "rules_unhealthy": [rule["name"] for rule in prometheus.rules() if rule["health"] != "ok"],
        "tpot_seconds": _mean(prometheus, "vllm_expert_prefetch_tpot_seconds"),
        "vllm_inter_token_latency_seconds": _mean(prometheus, "vllm:inter_token_latency_seconds"),
    }


def _title(query: Query) -> str:
    legend = query.legend.replace("{{instance}}", "").strip()
    return f"{query.panel} ({legend})" if legend and "{" not in legend else query.panel


def _mean(prometheus: Prometheus, name: str) -> float:
    (sample,) = prometheus.query(f"sum({name}_sum) / sum({name}_count)")
    return float(sample["value"][1])


def _name(rule: dict[str, Any]) -> str:
    cause = rule["labels"].get("cause")
    return f"{rule['alert']}/{cause}" if cause else str(rule["alert"])


def run(seconds: float, clients: int, quiet: bool, pictures: Path | None) -> dict[str, Any]:
    """Serve, load, ask."""
    ask = ["--plugin", "expert_prefetch", "--additional-config", json.dumps({"expert_prefetch": CONFIG})]
    with serve(*ask) as server:
        server.wait_ready()
        instance = remove_scheme(server.url)
        with run_prometheus([instance]) as prometheus:
            started = time.time()
            with load(server.url, load_prompts(32), clients) as asked:
                time.sleep(max(seconds, RECORDING_SECONDS + 5))
                result = observe(prometheus, instance, quiet)
            if pictures:
                from pictures import draw

                draw(prometheus, instance, started, time.time(), pictures)
    return {**result, "requests": asked.requests, "tokens": asked.tokens, "errors": asked.errors}


def main() -> int:
    """Observe and report; 1 when a panel, an alert or the server had nothing to show."""
    arguments = parser(__doc__)
    arguments.add_argument("--seconds", type=float, default=60, help="of load")
    # Beyond 8, a decode step of the demo model routes more ids than a layer has experts, and nothing looks ahead.
    arguments.add_argument("--clients", type=int, default=6)
    arguments.add_argument("--pictures", action="store_true", help="also draw docs/pictures/*.png")
    options = arguments.parse_args()
    if options.quick:
        options.seconds = 22
    pictures = ROOT / "docs" / "pictures" if options.pictures else None
    try:
        result = run(options.seconds, options.clients, options.json, pictures)
    except MissingPrometheus as missing:
        print(missing, file=sys.stderr)
        return 0 if options.quick else 1  # --quick is part of `make bench`, on machines of any kind
    finish("observe", result, options)
    return int(bool(result["panels_without_data"] or result["alerts_without_data"] or result["errors"]))


if __name__ == "__main__":
    sys.exit(main())
