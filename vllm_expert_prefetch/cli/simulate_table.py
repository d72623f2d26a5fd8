"""How `simulate` shows what it found: a table, and a picture."""

from pathlib import Path
from typing import Any

from vllm_expert_prefetch.config import ConfigError


def print_report(report: dict[str, Any]) -> None:
    """One line of the trace, one row for each setting, and what --more-gb asked for."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=200)
    console.print(
        f"[bold]{report['model']}[/bold]: {report['layers']} layers of {report['experts']} experts, "
        f"top-{report['top_k']}; {report['steps']} steps, {report['tokens']} tokens, "
        f"{report['decode_steps']} decode steps",
        soft_wrap=True,
    )
    console.print(_fidelity(report), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    names = ["slots", "GB", "policy", "ahead", "hits", "Belady", "copied"]
    for name in names + ["stalls", "TPOT ms", "oracle ms"] * report["has_times"]:
        table.add_column(name, justify="left" if name == "policy" else "right", no_wrap=True)
    for row in report["rows"]:
        table.add_row(*_cells(row), style="bold" if row["as_recorded"] else None)
    console.print(table)
    if any(row["as_recorded"] for row in report["rows"]):
        console.print("bold: slots and policy as recorded; hits: of decode steps", soft_wrap=True)
    if not report["has_times"]:
        console.print("Stalls and TPOT: give --link-gbps and --layer-us, this trace has no times", soft_wrap=True)
    if report["more_gb"]:
        console.print(describe_more(report["more_gb"]), soft_wrap=True)


def describe_more(found: dict[str, Any]) -> str:
    """What more GB of slots would give, as a sentence."""
    row, more = found["row"], found["more"]
    text = (
        f"{found['gb']:g} GB more: {_slots(more)} slots in place of {_slots(row)}, {_percent(more['decode_hit_rate'])} "
        f"decode hits in place of {_percent(row['decode_hit_rate'])}, {_bytes(more['bytes'])} copied in place of "
        f"{_bytes(row['bytes'])}"
    )
    if row["tpot_seconds"] is None:
        return text
    return f"{text}, TPOT {_ms(more['tpot_seconds'])} in place of {_ms(row['tpot_seconds'])} ms"


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw decode hit rates, and TPOT where times are known, against GB of slots. ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = [("decode hits, %", 100.0, "decode_hit_rate", "belady_decode_hit_rate", "Belady, nothing ahead")]
    if report["has_times"]:
        panels.append(("TPOT, ms", 1000.0, "tpot_seconds", "oracle_tpot_seconds", "every guess right"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4), squeeze=False, layout="constrained")
    for axis, (label, scale, key, bound_key, bound) in zip(axes[0], panels, strict=True):
        lines: dict[str, dict[float, float]] = {}
        bounds: dict[float, float] = {}
        for row in report["rows"]:
            ahead = f", {row['depth']} ahead" if row["depth"] else ""
            lines.setdefault(f"{row['policy']}{ahead}", {})[row["cache_gb"]] = scale * row[key]
            if row[bound_key] is not None:
                least = min(row[bound_key], bounds.get(row["cache_gb"], float("inf")) / scale)
                bounds[row["cache_gb"]] = scale * least
        for name, points in lines.items():
            axis.plot(*zip(*sorted(points.items()), strict=True), label=name, marker="o", markersize=3)
        if bounds:
            axis.plot(*zip(*sorted(bounds.items()), strict=True), label=bound, linestyle="--", color="grey")
        axis.set(xlabel="slots, GB", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"{Path(report['model']).name}, {report['decode_steps']} decode steps replayed", fontsize=10)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _fidelity(report: dict[str, Any]) -> str:
    pairs = report["replayed_as_recorded"]
    if pairs is None:
        return (
            f"recorded by {report['recorded']['by'] or 'whom it does not say'}; not compared with a server's counters"
        )
    counted = ", ".join(f"{own} {name}" for name, (own, _) in pairs.items())
    return f"replayed as recorded, it counts what the server counted: {counted}"


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [
        f"{_slots(row)} ({100 * row['share']:.0f} %)",
        f"{row['cache_gb']:.3g}",
        row["policy"],
        str(row["depth"]),
        _percent(row["decode_hit_rate"]),
        "-" if row["depth"] else _percent(row["belady_decode_hit_rate"]),
        _bytes(row["bytes"]),
    ]
    if row["stall_seconds"] is None:
        return cells
    return [*cells, f"{row['stall_seconds']:.2f} s", _ms(row["tpot_seconds"]), _ms(row["oracle_tpot_seconds"])]


def _slots(row: dict[str, Any]) -> str:
    slots = row["slots"]
    return str(slots) if isinstance(slots, int) else f"{min(slots)} to {max(slots)}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.2f}"


def _bytes(value: int) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000  # type: ignore[assignment]
    return f"{value:.3g} TB"
