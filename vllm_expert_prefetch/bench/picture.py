"""TPOT and tokens per second of everybody against the number of sequences at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_expert_prefetch.bench import BenchError
from vllm_expert_prefetch.bench.contestants import NAMES, STOCK


def draw(medians: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Write a PNG. Raises BenchError without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise BenchError("--plot needs matplotlib: pip install matplotlib") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    for axis, key, label in (
        (axes[0], "tpot_ms", "TPOT, median, ms"),
        (axes[1], "output_tokens_per_s", "output tokens per second"),
    ):
        for number, name in enumerate(NAMES):
            own = sorted((row["concurrency"], row[key]) for row in medians if row["name"] == name)
            if own:
                colour = "black" if name == STOCK else f"C{number}"
                axis.plot(*zip(*own, strict=True), marker="o", color=colour, label=name)
        ticks = sorted({row["concurrency"] for row in medians})
        axis.set(xscale="log", xlabel="sequences at a time", ylabel=label, ylim=(0, None))
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=90, format="png")
    plt.close(figure)
