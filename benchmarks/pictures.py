"""Pictures of a real run: the dashboards' own queries, asked of Prometheus over time and drawn with matplotlib.

They stand in for screenshots of Grafana: same queries, same data, other drawing.
"""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from observatory import Prometheus, Query, dashboard_queries

mpl.use("Agg")

import matplotlib.pyplot as plt

STEP_SECONDS = 2
SCALES = {
    "s": (1000, "ms"),
    "percentunit": (100, "%"),
    "Bps": (1e-6, "MB/s"),
    "bytes": (1e-6, "MB"),
    "ops": (1, "per s"),
}
OVERVIEW = (
    "Hit rate against the plan",
    "TPOT against vLLM's own",
    "Stall share over time",
    "Lookups by outcome",
    "Bytes over the link",
    "Speed while copying",
    "Prefetch precision",
    "Prefetch recall",
    "Steps by phase",
    "Waves",
)


def draw(prometheus: Prometheus, instance: str, start: float, end: float, folder: Path) -> None:
    """Write overview.png and layers.png for the time between `start` and `end` (seconds since 1970)."""
    folder.mkdir(parents=True, exist_ok=True)
    queries = dashboard_queries(instance)
    _draw_overview(prometheus, queries, start, end, folder / "overview.png")
    _draw_layers(prometheus, queries, start, end, folder / "layers.png")


def _draw_overview(prometheus: Prometheus, queries: list[Query], start: float, end: float, path: Path) -> None:
    figure, axes = plt.subplots(5, 2, figsize=(12, 16), constrained_layout=True)
    for axis, title in zip(axes.flat, OVERVIEW, strict=True):
        targets = [q for q in queries if q.dashboard == "expert-prefetch-overview" and q.panel == title]
        factor, unit = SCALES[targets[0].unit]
        for target in targets:
            for series in prometheus.query_range(target.expression, start, end, STEP_SECONDS):
                seconds, values = _points(series, start)
                axis.plot(seconds, [factor * value for value in values], label=_legend(target, series), linewidth=1.5)
        axis.set(title=title, ylabel=unit, xlabel="seconds of load", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="best")
    figure.suptitle('Dashboard "overview": its own queries, answered by Prometheus during a real run', fontsize=13)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _draw_layers(prometheus: Prometheus, queries: list[Query], start: float, end: float, path: Path) -> None:
    title = "Hit rate of each layer over time"
    (target,) = [q for q in queries if q.panel == title]
    rows = prometheus.query_range(target.expression, start, end, STEP_SECONDS)
    rows.sort(key=lambda series: int(series["metric"]["layer"]))
    times = sorted({float(at) for series in rows for at, _ in series["values"]})
    table = [
        [dict((float(at), 100 * float(v)) for at, v in s["values"]).get(at, float("nan")) for at in times] for s in rows
    ]
    figure, axis = plt.subplots(figsize=(12, 4), constrained_layout=True)
    image = axis.imshow(
        table,
        aspect="auto",
        cmap="RdYlGn",
        interpolation="nearest",
        origin="lower",
        extent=(times[0] - start, times[-1] - start, -0.5, len(rows) - 0.5),
    )
    axis.set(title=f'Dashboard "layers": {title}', xlabel="seconds of load", ylabel="layer")
    axis.set_yticks(range(len(rows)), [series["metric"]["layer"] for series in rows])
    figure.colorbar(image, label="hit rate, %")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _points(series: dict[str, Any], start: float) -> tuple[list[float], list[float]]:
    return [float(at) - start for at, _ in series["values"]], [float(value) for _, value in series["values"]]


def _legend(target: Query, series: dict[str, Any]) -> str:
    """Grafana's {{label}}, without the instance: there is one."""
    text = target.legend
    for key, value in series["metric"].items():
        text = text.replace("{{" + key + "}}", "" if key == "instance" else value)
    return text.strip() or target.panel
