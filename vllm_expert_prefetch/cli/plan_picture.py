"""TPOT and hit rate against the size of the expert cache."""

from dataclasses import replace
from pathlib import Path

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.plan import Plan, make_plan
from vllm_expert_prefetch.planning.sizing import GB

_POINTS = 48
_PLENTY = 1e15
"""Bytes: what any cache fits."""


def draw(plan: Plan, path: Path) -> None:
    """Write a PNG. Raises ConfigError without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install matplotlib") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    swept = _sweep(plan)
    sizes = [other.budget.cache_bytes / GB for other in swept]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    for axis, name, unit, label in (
        (axes[0], "tpot", 1e3, "TPOT, ms"),
        (axes[1], "hits", 100.0, "hit rate, %"),
    ):
        ranges = [getattr(other, name) for other in swept]
        axis.fill_between(
            sizes, [r.low * unit for r in ranges], [r.high * unit for r in ranges], alpha=0.2, label="range"
        )
        axis.plot(sizes, [r.expected * unit for r in ranges], label="expected")
        axis.axvline(plan.budget.cache_bytes / GB, color="black", linestyle="--", linewidth=1, label="this plan")
        axis.set(xlabel="expert cache per GPU, GB (slots and overflow rows)", ylabel=label)
        axis.grid(alpha=0.3)
    bounds = [max(other.compute_bound, other.link_bound) * 1e3 for other in swept]
    axes[0].plot(sizes, bounds, ":", color="C3", label="at least, at the expected hit rate")
    axes[0].set(yscale="log")
    axes[0].legend()
    axes[1].set(ylim=(0, 102))
    axes[1].legend(loc="lower right")
    link = plan.machine.link_bytes_per_second / 1e9
    served = f"{plan.load.concurrency} x {plan.load.context} tokens"
    figure.suptitle(f"{plan.model.name}, {plan.model.form}, {served}, link {link:g} GB/s")
    figure.savefig(path, dpi=90, format="png")
    plt.close(figure)


def _sweep(plan: Plan) -> list[Plan]:
    first = plan.budget.layers[0]
    step = max(1, (first.num_experts - first.top_k) // _POINTS)
    slots = [*range(first.top_k, first.num_experts, step), first.num_experts]
    machine = replace(plan.machine, memory_bytes=_PLENTY, host_bytes=None)
    return [
        make_plan(
            plan.model, machine, plan.load, plan.ranks, ExpertPrefetchConfig(slots_per_layer=number), plan.replayed
        )
        for number in slots
    ]
