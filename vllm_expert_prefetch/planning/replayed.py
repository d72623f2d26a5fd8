"""What a recording of a model says of a plan: its lookups replayed, and the settings that are best on it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_expert_prefetch.config import MOST_LOOKAHEAD_LAYERS, SPECULATIVE, ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.budget import Budget
from vllm_expert_prefetch.planning.clock import Clock
from vllm_expert_prefetch.planning.facts import find_model
from vllm_expert_prefetch.planning.guesses import drawn
from vllm_expert_prefetch.planning.hits import Lookups, Range
from vllm_expert_prefetch.planning.model_files import Model
from vllm_expert_prefetch.planning.plan import Plan
from vllm_expert_prefetch.planning.replay import Guess, Replay, Setting
from vllm_expert_prefetch.planning.simulate import serve_layer
from vllm_expert_prefetch.residency import POLICIES
from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.trace import Trace

FEWEST_STEPS = 32
"""Decode steps below which a trace is refused."""
SHORT = 500
"""Decode steps below which first uses are much of what is missed: a note says so."""
ALIKE = 0.02
"""Times that differ by less are the same."""
_PARTS = 4
"""Of the decode steps: the first one warms the slots, the others are counted."""
_MOST_LAYER_STEPS = 20_000
"""That a replay with look-ahead takes, the last ones: about a second."""
_DEFAULT: str = ExpertPrefetchConfig.policy


class Replayed:
    """`trace` asked for what steps look up where a `Budget` is resident: the policy that hits most, unless it is given.

    Raises TraceError for a trace of another model, and for one that is too short to say anything.
    """

    def __init__(self, trace: Trace, path: Path, model: Model) -> None:
        self.trace, self.path = trace, path
        self._decodes = np.flatnonzero(trace.decodes)
        self._check(model)
        self._found: dict[tuple[tuple[int, ...], str], Lookups] = {}
        self._stalls: dict[tuple[Setting, tuple[float, float]], float] = {}

    @property
    def num_steps(self) -> int:
        """Decode steps."""
        return len(self._decodes)

    @property
    def most_sequences(self) -> int:
        """That were served at a time."""
        return max(1, int((self.trace.prefilling + self.trace.decoding).max()))

    @property
    def notes(self) -> tuple[str, ...]:
        """What the figures do not say."""
        notes = []
        if self.num_steps < SHORT:
            notes.append(
                f"{self.num_steps} decode steps are few: many misses are first uses, of which a long run has fewer. "
                f"{SHORT} and more say more"
            )
        if not (~self.trace.decodes).any():
            notes.append("the trace has no prompts: TTFT is what is expected of any model")
        if self.trace.card.execution.startswith(SPECULATIVE):
            notes.append("the trace was recorded with speculative execution: it has the experts that were executed")
        return tuple(notes)

    def __call__(self, budget: Budget) -> Lookups:
        """With the policy that hits most; the default one where others are no better. Raises ConfigError."""
        found = {policy: self.with_policy(budget, policy) for policy in (_DEFAULT, *POLICIES)}
        return max(found.values(), key=lambda lookups: lookups.hits.expected)

    def with_policy(self, budget: Budget, policy: str) -> Lookups:
        """Of decode steps behind the first quarter, which warms the slots. Raises ConfigError for other experts."""
        slots = self.slots(budget)
        if (slots, policy) not in self._found:
            self._found[slots, policy] = self._serve(slots, policy)
        return self._found[slots, policy]

    def stall_ratio(self, budget: Budget, policy: str, depth: int, clock: tuple[float, float]) -> float:
        """What decode steps wait that look `depth` layers ahead, over what they wait without.

        `clock`: seconds of a record on the link, and of a layer's computation.
        """
        stalls = []
        for own in (depth, 0):
            asked = Setting(self.slots(budget), policy, own, budget.areas), clock
            if asked not in self._stalls:
                self._stalls[asked] = self._stall(*asked)
            stalls.append(self._stalls[asked])
        return stalls[0] / stalls[1] if stalls[1] else 1.0

    def slots(self, budget: Budget) -> tuple[int, ...]:
        """Of each recorded layer. Raises ConfigError where the trace is of other experts than `budget`."""
        card, layers = self.trace.card, budget.layers
        at = [number * len(layers) // card.num_layers for number in range(card.num_layers)]
        planned = [(layers[number].num_experts, layers[number].top_k) for number in at]
        for own, recorded in zip(planned, zip(card.num_experts, card.top_k, strict=True), strict=True):
            if own != recorded:
                kinds = ["layers of {} experts, top-{}".format(*numbers) for numbers in (recorded, own)]
                raise ConfigError(f"{self.path} was recorded on {kinds[0]}, and a GPU of this plan has {kinds[1]}")
        return tuple(budget.slots[number] for number in at)

    def _check(self, model: Model) -> None:
        recorded = self.trace.card.model
        known = find_model(model.name)
        names = {model.name, model.serve, *model.formats.values(), *(known[0].also if known else ())}
        if Path(recorded).name.casefold() not in {Path(name).name.casefold() for name in names}:
            raise TraceError(
                f"{self.path} was recorded of {recorded}, and this plan is for {model.name}: record that one"
            )
        if self.num_steps < FEWEST_STEPS:
            raise TraceError(
                f"{self.path} has {self.num_steps} decode steps, which say nothing: record {FEWEST_STEPS} at least, "
                f"better {SHORT}"
            )

    def _serve(self, slots: tuple[int, ...], policy: str) -> Lookups:
        trace, layers = self.trace, range(self.trace.card.num_layers)
        counts = [serve_layer(trace, layer, Setting(slots, policy)) for layer in layers]
        needed: NDArray[np.int64] = np.stack([own.needed for own in counts]).sum(axis=0)
        hits: NDArray[np.int64] = needed - np.stack([own.misses for own in counts]).sum(axis=0)
        parts = np.array_split(self._decodes, _PARTS)[1:]
        counted = np.concatenate(parts)
        rates = [float(hits[part].sum() / max(1, needed[part].sum())) for part in parts]
        prompts = np.flatnonzero(~trace.decodes)
        return Lookups(
            hits=Range(min(rates), float(hits[counted].sum() / max(1, needed[counted].sum())), max(rates)),
            needed=float(needed[counted].mean()) / len(layers),
            sequences=float(trace.tokens[counted].mean()),
            prompt_tokens=round(float(trace.tokens[prompts].mean())) if len(prompts) else 0,
            prompt_needed=float(needed[prompts].mean()) / len(layers) if len(prompts) else 0.0,
            prompt_hits=float(hits[prompts].sum() / max(1, needed[prompts].sum())),
            policy=policy,
        )

    @cached_property
    def _guess(self) -> Guess:
        return drawn(self.trace)

    def _stall(self, setting: Setting, clock: tuple[float, float]) -> float:
        """Seconds of decode steps, in the last part of the trace."""
        trace, (record, compute) = self.trace, clock
        first = max(len(trace) // _PARTS, len(trace) - _MOST_LAYER_STEPS // trace.card.num_layers)
        times = Clock((record,) * trace.card.num_layers, np.full(len(trace), compute))
        replay = Replay(trace, setting, times, self._guess if setting.depth else None)
        replay.warm(first)
        stall = 0.0
        for step in range(first, len(trace)):
            before = replay.stall
            replay.run([step])
            stall += (replay.stall - before) * bool(trace.decodes[step])
        return stall


@dataclass(frozen=True)
class Option:
    """One way to serve, replayed. `hits`: 0 to 1, of decode steps without look-ahead; `tpot` in seconds."""

    policy: str
    slots: int
    depth: int
    hits: float
    tpot: Range


@dataclass(frozen=True)
class Advice:
    """`settings`: of the plugin, all that the trace decides; `reasons`: why, one for each."""

    options: tuple[Option, ...]
    settings: Mapping[str, Any]
    reasons: tuple[str, ...]
    best: Option
    largest: Option
    """The best one with all the slots of the plan."""


def advise(plan: Plan, replayed: Replayed, may_be_smaller: bool) -> Advice:
    """Policies, depths of look-ahead and numbers of slots, one after the other, against the clock of `plan`.

    `may_be_smaller`: fewer slots than the plan has are an option. A setting must be 2 % faster than a cheaper one.
    """
    budget = plan.budget
    policies = [_option(plan, replayed, budget, policy, 0) for policy in POLICIES]
    policy = plan.lookups.policy
    deepest = min(MOST_LOOKAHEAD_LAYERS, replayed.trace.card.num_layers - 1)
    depths = [_option(plan, replayed, budget, policy, depth) for depth in range(deepest + 1)]
    ahead = _cheapest(depths)
    sizes = [_option(plan, replayed, own, policy, ahead.depth) for own in _smaller(budget)] if may_be_smaller else []
    best = _cheapest([*sizes, ahead])
    settings: dict[str, Any] = {"policy": policy}
    settings |= {"lookahead_layers": ahead.depth} if ahead.depth else {"prefetch": "off"}
    settings |= {"slots_per_layer": best.slots} if best.slots < ahead.slots else {}
    reasons = (*_reasons(policies, depths, ahead, policy), *_about_slots(best, ahead, bool(sizes)))
    options = dict.fromkeys([*policies, *depths, *sizes])
    return Advice(tuple(options), settings, reasons, best, ahead)


def _option(plan: Plan, replayed: Replayed, budget: Budget, policy: str, depth: int) -> Option:
    work, machine = plan.decode, plan.machine
    clock = budget.record_bytes / machine.link_bytes_per_second, work.compute(machine) / work.layers
    hits = replayed.with_policy(budget, policy).hits
    ratio = replayed.stall_ratio(budget, policy, depth, clock) if depth else 1.0

    def seconds(rate: float) -> float:
        return max(work.bound(machine, rate), work.compute(machine) + ratio * work.link(machine, rate))

    tpot = Range(seconds(hits.high), seconds(hits.expected), seconds(hits.low))
    return Option(policy, budget.slots[0], depth, hits.expected, tpot)


def _smaller(budget: Budget) -> Iterator[Budget]:
    """With a quarter, a half and three quarters of its slots, where these hold a token's experts."""
    least = max(layer.top_k for layer in budget.layers)
    for part in (0.25, 0.5, 0.75):
        slots = tuple(int(part * number) for number in budget.slots)
        if min(slots) >= least:
            yield replace(budget, slots=slots)


def _cheapest(options: list[Option]) -> Option:
    """The first one that is within 2 % of the fastest; they stand in the order of what they cost."""
    fastest = min(one.tpot.expected for one in options)
    return next(one for one in options if one.tpot.expected <= (1 + ALIKE) * fastest)


def _reasons(policies: list[Option], depths: list[Option], ahead: Option, policy: str) -> Iterator[str]:
    by_hits = sorted(policies, key=lambda one: (one.policy != policy, -one.hits))
    rates = ", ".join(f"{one.policy} {one.hits:.1%}" for one in by_hits)
    yield f"policy {policy}: hits of decode steps {rates}"
    times = ", ".join(f"{one.depth} {1e3 * one.tpot.expected:.1f} ms" for one in depths)
    name = f"lookahead_layers {ahead.depth}" if ahead.depth else "prefetch off"
    yield f"{name}: TPOT by layers of look-ahead {times}"


def _about_slots(best: Option, most: Option, were_tried: bool) -> Iterator[str]:
    if best.slots < most.slots:
        yield (
            f"slots_per_layer {best.slots} of {most.slots}: TPOT within {ALIKE:.0%} of what all give; the KV cache "
            "gets the rest"
        )
    elif were_tried:
        yield f"{most.slots} slots per layer, all that fit: three quarters of them are more than {ALIKE:.0%} slower"
