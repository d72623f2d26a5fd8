"""What share of lookups hits: measured curves, and what other sequences in the batch do to them.

With one sequence a cache of recent experts finds more than its share of the experts: `share + gain (1 - share)`. The
gains of four recordings are in facts.json. With many unrelated sequences each step needs most experts of a layer, and
routing looks uniform to the cache: it hits its share. In between the gain falls with the share of a layer's experts
that a step leaves alone; its square and its root are the ends of the range, in which mixtures of recorded passages lie
within five points (tests/planning/test_plan_times.py).
"""

from dataclasses import dataclass

from vllm_expert_prefetch.planning.facts import Recording, load_facts

_LARGE = 32
"""Recordings of models of so many experts make the expected curve; all of them make the range."""


@dataclass(frozen=True)
class Range:
    """What is expected, between the least and the most that was measured."""

    low: float
    expected: float
    high: float


@dataclass(frozen=True)
class Lookups:
    """What steps look up in one MoE layer of one rank, and what of it hits, 0 to 1."""

    hits: Range
    """Of decode steps."""
    needed: float
    """Distinct experts of a decode step."""
    sequences: float
    """That a decode step has a token of."""
    prompt_tokens: int
    """Of a prompt; 0: not known."""
    prompt_needed: float
    """Distinct experts of one of its steps."""
    prompt_hits: float
    policy: str


def needed_experts(num_tokens: int, num_experts: int, top_k: int) -> float:
    """Distinct experts of one layer that so many tokens need, routed independently and uniformly."""
    return num_experts * (1 - (1 - top_k / num_experts) ** num_tokens)


def hit_rates(share: float, num_sequences: int, num_experts: int, top_k: int) -> Range:
    """Of lookups, by the share of experts that have a slot, for decode steps of `num_sequences` tokens."""
    alone, together = (
        1 - needed_experts(tokens, num_experts, top_k) / num_experts for tokens in (1, max(1, num_sequences))
    )
    left = together / alone if alone else 0.0
    spread = (left**2, left, left**0.5)
    gains = {recording: _gain(recording, share) for recording in load_facts().recordings}
    large = [gain for recording, gain in gains.items() if recording.num_experts >= _LARGE]
    low, expected, high = min(gains.values()), sum(large) / len(large), max(gains.values())
    found = zip((low, expected, high), spread, strict=True)
    return Range(*(min(1.0, share + (1 - share) * gain * left) for gain, left in found))


def _gain(recording: Recording, share: float) -> float:
    """(hit rate - share) / (1 - share), straight between what was measured; 0 with no slots."""
    if share >= 1:
        return 1.0
    shares = (0.0, *recording.shares, 1.0)
    rates = (0.0, *recording.hit_rates, 1.0)
    upper = next(number for number, other in enumerate(shares) if other >= share and number)
    below, above = shares[upper - 1], shares[upper]
    rate = rates[upper - 1] + (rates[upper] - rates[upper - 1]) * (share - below) / (above - below)
    return max(0.0, (rate - share) / (1 - share))
