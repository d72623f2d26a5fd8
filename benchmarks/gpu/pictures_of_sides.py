"""Time per token by batch size and by residency, drawn with matplotlib where it is installed."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from side_report import sides

COLOURS = ["black", "tab:orange", "tab:red", "tab:blue", "tab:green", "tab:purple", "tab:gray"]


def draw(folder: Path, results: dict[str, Any]) -> list[str]:
    """Write the pictures there are measurements for; their names."""
    found = sides(results)
    if not found or not find_spec("matplotlib"):
        return []
    names = list(dict.fromkeys(row["variant"] for side in found for row in side["rows"]))
    colours = dict(zip(names, COLOURS, strict=False))
    return [_by_batch(folder, found, colours), _by_residency(folder, found, colours)]


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _by_batch(folder: Path, found: list[dict[str, Any]], colours: dict[str, str]) -> str:
    plt = _pyplot()
    figure, axes = plt.subplots(1, len(found), figsize=(5 * len(found), 4), squeeze=False, constrained_layout=True)
    for axis, side in zip(axes.flat, found, strict=True):
        _lines(axis, side["rows"], "batch", colours)
        axis.set(title=f"{side['residency']:.1%} of the experts have a slot", xlabel="batch")
    return _save(plt, figure, folder / "tpot-by-batch.png")


def _by_residency(folder: Path, found: list[dict[str, Any]], colours: dict[str, str]) -> str:
    plt = _pyplot()
    rows = [
        {**row, "residency": 100 * side["residency"]} for side in found for row in side["rows"] if row["batch"] == 1
    ]
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    _lines(axis, rows, "residency", colours)
    axis.set(title="batch 1", xlabel="experts with a slot, %")
    return _save(plt, figure, folder / "tpot-by-residency.png")


def _lines(axis: Any, rows: list[dict[str, Any]], key: str, colours: dict[str, str]) -> None:
    """One line per variant; dashed, the bound of each variant that has one and moves anything."""
    for name, colour in colours.items():
        mine = sorted((row for row in rows if row["variant"] == name), key=lambda row: row[key])
        axis.plot([row[key] for row in mine], [row["tpot_ms"] for row in mine], "o-", color=colour, label=name)
        bounded = [row for row in mine if row["missed_mb_per_token"]]
        axis.plot([row[key] for row in bounded], [row["bound_ms"] for row in bounded], "--", color=colour, alpha=0.5)
    axis.set(ylabel="time per token, ms (dashed: bound)", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=8)


def _save(plt: Any, figure: Any, path: Path) -> str:
    figure.savefig(path, dpi=80)
    plt.close(figure)
    return path.name
