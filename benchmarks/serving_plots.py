"""Plots of the curves under load."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

Row = dict[str, Any]
COLOURS = {0.25: "C3", 0.5: "C0", 0.75: "C2"}
OTHERS = {
    "davetha, Qwen3-30B W8A8, 2x MI210, batch 1": ((75, 89), (50, 83), (25, 60)),
    "moe-surgeon, OLMoE bf16, GB10, batch 8": ((75, 66), (50, 34), (37.5, 25)),
}
"""Published: share of slots and of all-resident speed, per cent, on other hardware and other models."""


def draw(rows: list[Row], path: Path) -> None:
    """TPOT and tokens per second against concurrency, and speed against the share of slots."""
    figure, axes = plt.subplots(1, 3, figsize=(18, 5.5), constrained_layout=True)
    plain = [r for r in rows if (r["share"], r["copy_compute"], r["prefetch"]) == (0.5, 1, "plain")]
    for axis, key, label in (
        (axes[0], "tpot_ms_p50", "TPOT, median, ms"),
        (axes[1], "output_tokens_per_s", "output tokens per second"),
    ):
        axis.plot(*_points(plain, key), color="black", marker="o", label="plain vLLM, all resident")
        for share, colour in COLOURS.items():
            for prefetch, style in (("off", ":"), ("auto", "-")):
                own = [r for r in rows if (r["share"], r["prefetch"], r["copy_compute"]) == (share, prefetch, 1)]
                axis.plot(
                    *_points(own, key), style, color=colour, marker=".", label=f"{share:.0%}, look-ahead {prefetch}"
                )
        axis.set(xscale="log", yscale="log", xlabel="requests at a time", ylabel=label, title="copy/compute 1")
        axis.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    for concurrency in (1, 8, 32):
        shares = sorted(
            (100 * row["share"], 100 * row["share_of_resident"])
            for row in rows
            if (row["prefetch"], row["copy_compute"], row["concurrency"]) == ("auto", 1, concurrency)
        )
        if shares:
            axes[2].plot(*zip(*[*shares, (100, 100)], strict=True), marker="o", label=f"here, {concurrency} at a time")
    for name, points in OTHERS.items():
        axes[2].plot(*zip(*points, strict=True), "x--", color="grey", alpha=0.7, label=f"other hardware: {name}")
    axes[2].set(
        title="Speed against the share of slots, look-ahead auto",
        xlabel="experts with a slot, %",
        ylabel="share of all-resident speed, %",
        xlim=(0, 102),
        ylim=(0, 110),
    )
    axes[2].grid(alpha=0.3)
    axes[2].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2)
    figure.suptitle("vLLM on two CPU cores over an emulated link: curves of waiting and overlap, not of a GPU's speed")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _points(rows: list[Row], key: str) -> tuple[list[int], list[float]]:
    own = sorted((row["concurrency"], row[key]) for row in rows)
    return [concurrency for concurrency, _ in own], [value for _, value in own]
