"""Plots of the look-ahead study, one picture per model."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

Row = dict[str, Any]
LINES = {
    "off": "C0",
    "router": "C1",
    "hybrid+transition": "C2",
    "hybrid+transition, 4 layers": "C5",
    "router, 4 layers": "C6",
    "auto": "C3",
    "oracle": "C4",
}
"""Variants drawn over something, and their colours."""


def draw(rows: list[Row], folder: Path) -> None:
    """Write lookahead-MODEL.png for each model."""
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if "tpot_ms" in row]
    for model in dict.fromkeys(row["model"] for row in timed):
        own = [row for row in timed if row["model"] == model]
        figure, axes = plt.subplots(1, 3, figsize=(16, 5.5), constrained_layout=True)
        _draw_predictors(axes[0], own)
        _draw_ratios(axes[1], own)
        _draw_residency(axes[2], own)
        figure.suptitle(f"{model}: TPOT with look-ahead over an emulated link, vLLM on the CPU", fontsize=13)
        figure.savefig(folder / f"lookahead-{model}.png", dpi=80)
        plt.close(figure)


def _draw_predictors(axis: Any, rows: list[Row]) -> None:
    cell = [row for row in rows if row["residency"] == 0.5 and row["copy_compute"] == 1 and row["variant"] != "off"]
    names = [row["variant"] for row in cell if row["batch"] == 1]
    batches = sorted({row["batch"] for row in cell})
    height = 0.8 / len(batches)
    for number, batch in enumerate(batches):
        ratios = {row["variant"]: row["tpot_ratio"] for row in cell if row["batch"] == batch}
        places = [place + number * height for place, name in enumerate(names) if name in ratios]
        axis.barh(places, [ratios[name] for name in names if name in ratios], height, label=f"batch {batch}")
    axis.set_yticks([place + 0.4 - height / 2 for place in range(len(names))], names)
    axis.invert_yaxis()
    axis.axvline(1, color="black", linewidth=1)
    axis.set(title="Half resident, copy/compute 1", xlabel="TPOT / TPOT without look-ahead", xlim=(0, 1.5))
    axis.grid(axis="x", alpha=0.3)
    axis.legend(loc="center right")


def _draw_ratios(axis: Any, rows: list[Row]) -> None:
    cell = [row for row in rows if row["residency"] == 0.5 and row["batch"] == 1]
    for name, colour in LINES.items():
        points = sorted(
            (row["copy_compute"], row["tpot_ms"] / row["compute_ms"]) for row in cell if row["variant"] == name
        )
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
    bound = sorted({(row["copy_compute"], row["bound_ms"] / row["compute_ms"]) for row in cell})
    axis.plot(*zip(*bound, strict=True), color="black", linestyle="--", label="max(compute, missed bytes / link)")
    axis.set(title="Half resident, batch 1", xlabel="copy/compute", ylabel="TPOT / compute", xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_residency(axis: Any, rows: list[Row]) -> None:
    cell = [row for row in rows if row["copy_compute"] == 1 and row["batch"] == 1]
    for name, colour in list(LINES.items())[1:]:
        points = sorted((100 * row["residency"], row["tpot_ratio"]) for row in cell if row["variant"] == name)
        if not points:
            continue
        axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=name)
    axis.axhline(1, color="black", linewidth=1)
    axis.set(title="Copy/compute 1, batch 1", xlabel="experts with a slot, %", ylabel="TPOT / TPOT without look-ahead")
    axis.grid(alpha=0.3)
    axis.legend()
