"""How long a step takes: what it reads on the accelerator, what it misses over the link, and what of it overlaps."""

from dataclasses import dataclass

from vllm_expert_prefetch.planning.hits import Range

MEMORY_SHARE = 0.8
"""Of the memory's nominal bandwidth that decoding reaches (aiconfigurator: mem_bw_empirical_scaling_factor)."""
FLOPS_SHARE = 0.5
"""Of the nominal FLOPS that a prompt reaches: an assumption."""
LAYER_SECONDS = 9.5e-6
"""Of every MoE layer and step: a plan and an empty gather, 8.25 and 1.23 us (benchmarks/results/h100/plan.json)."""
HIDDEN = Range(0.3, 0.65, 0.85)
"""Share of what can overlap that look-ahead hides, in replays (docs/predictors.md: 32 to 69 % with guesses of real
routers, least where the link is the narrow place; 56 to 87 % of the recordings of large models). The engine on the CPU
platform, whose guesses take time of the same cores, hid 24 to 54 %; on a GPU it was not measured. A step of more routed
ids than experts looks ahead with two areas only."""


@dataclass(frozen=True)
class Machine:
    """One accelerator of several alike, its link, and the host. Rates are per second."""

    memory_bytes: float
    bytes_per_second: float
    flops: float | None
    """Dense, in 16 bits; None where it is not known."""
    link_bytes_per_second: float
    capability: int = 90
    """89 for 8.9."""
    host_bytes: float | None = None
    """Memory of the host; None: not to be checked."""


@dataclass(frozen=True)
class Work:
    """What one step does on each rank, whatever the cache holds."""

    read_bytes: float
    """Weights and KV cache."""
    flops: float
    needed_bytes: float
    """Of experts: all of them would come over the link without a cache."""
    layers: int

    def compute_bound(self, machine: Machine) -> float:
        """Seconds: nothing is faster with every expert resident."""
        computing = self.flops / machine.flops if machine.flops else 0.0
        return max(self.read_bytes / machine.bytes_per_second, computing)

    def compute(self, machine: Machine) -> float:
        """Seconds that are expected with every needed expert resident."""
        computing = self.flops / (FLOPS_SHARE * machine.flops) if machine.flops else 0.0
        reading = self.read_bytes / (MEMORY_SHARE * machine.bytes_per_second)
        return max(reading, computing) + self.layers * LAYER_SECONDS

    def link(self, machine: Machine, hit_rate: float) -> float:
        """Seconds of copying what is missed."""
        return self.needed_bytes * (1 - hit_rate) / machine.link_bytes_per_second

    def bound(self, machine: Machine, hit_rate: float) -> float:
        """Seconds: no look-ahead is better at this hit rate."""
        return max(self.compute_bound(machine), self.link(machine, hit_rate))

    def seconds(self, machine: Machine, hit_rate: float, hidden: float) -> float:
        """Expected; `hidden`: share of the overlap that look-ahead achieves, 0 without it."""
        computing, copying = self.compute(machine), self.link(machine, hit_rate)
        return computing + copying - hidden * min(computing, copying)

    def seconds_range(self, machine: Machine, hits: Range, looks_ahead: bool) -> Range:
        """From the best case to the worst: `low` is the least time."""
        hidden = HIDDEN if looks_ahead else Range(0.0, 0.0, 0.0)
        return Range(
            self.seconds(machine, hits.high, hidden.high),
            self.seconds(machine, hits.expected, hidden.expected),
            self.seconds(machine, hits.low, hidden.low),
        )
