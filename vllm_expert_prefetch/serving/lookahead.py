"""Looking ahead while a layer computes: predict the next layer's experts and queue their copies."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_expert_prefetch.config import AUTO, CONFIG_KEY, OFF, SPECULATIVE, ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.experts import DeviceLayerCache, NativeLayerCache, Step
from vllm_expert_prefetch.metrics.counters import Counters, layer_start
from vllm_expert_prefetch.metrics.definitions import INDEX, LAYER_INDEX, PREDICTED
from vllm_expert_prefetch.metrics.steps import StepClock
from vllm_expert_prefetch.prediction import (
    Artifact,
    ArtifactError,
    Ingredients,
    NextTokenPredictor,
    Prediction,
    Predictor,
    Signals,
    create_predictor,
    fingerprint,
    load_artifact,
)
from vllm_expert_prefetch.prediction.schedule import Budget, SelfGate, most_wanted
from vllm_expert_prefetch.prediction.truth import score
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.device_lookahead import DeviceLookAhead
from vllm_expert_prefetch.serving.lookahead_sources import NotFound, Source, find_sources
from vllm_expert_prefetch.serving.speculation import allowed_layers, covers

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts

_USED, _UNUSED, _CANCELLED = (INDEX[f"predictions_total/{outcome}"] for outcome in PREDICTED)
_DISPLACED, _EVICTIONS = INDEX["displaced_lookups_total"], INDEX["evictions_total"]
_PREFETCH_BYTES = INDEX["transfer_bytes_total/prefetch"]
_ROUTED, _FOUND, _FOUND_ALL = (
    INDEX["recall_routed_total"],
    INDEX["recall_found_total/top_k"],
    INDEX["recall_found_total/fetched"],
)
_TOKENS, _MISSING_MASS = INDEX["scored_tokens_total"], INDEX["missing_gate_mass_total"]
_OF_LAYER = {INDEX[series]: LAYER_INDEX[f"layer_{series}"] for series in INDEX if f"layer_{series}" in LAYER_INDEX}
"""A series -> the same one of a single layer, where there is one."""


class LookAhead:
    """One worker's look-ahead: a predictor, and per MoE layer a gate and the guess that is on its way."""

    counters: Counters
    """Where it counts; to be set before the first step."""
    clock: StepClock
    """Knows what a step consists of; to be set before the first step."""
    speculated_layers: frozenset[int] = frozenset()
    """Layers that execute their guess in steps that give every sequence one token."""
    scored_every = 16
    """One step in so many is compared with the truth, layer by layer: recall at negligible cost."""

    def __init__(
        self,
        predictor: Predictor,
        layers: "Sequence[CachedRoutedExperts]",
        over_fetch: int,
        forced: bool,
        link_bytes_per_second: float,
    ) -> None:
        """`layers`: in order, each with a NativeLayerCache. `forced`: the gates never close. The link as measured."""
        self.predictor = predictor
        self.gates = [SelfGate(forced) for _ in layers]
        self._caches: list[NativeLayerCache] = [layer.cache for layer in layers]  # type: ignore[misc]
        self.budgets = [
            Budget(predictor.distance * cache.staging.record_bytes / link_bytes_per_second, cache.num_slots)
            for cache in self._caches
        ]
        self._num_experts = [layer.num_experts for layer in layers]
        self._top_k = [layer.top_k for layer in layers]
        self._over_fetch = over_fetch
        self._guesses: list[Prediction | None] = [None] * len(layers)
        self._spent = [0.0] * len(layers)
        self._queued_at: list[float | None] = [None] * len(layers)
        self._num_steps = 0
        self._lane_bytes = 0

    def to_execute(self, layer: int, num_tokens: int) -> Prediction | None:
        """The guess that `layer` executes in this step of `num_tokens`; None where it follows the router."""
        if not self._speculates(layer, num_tokens):
            return None
        guess = self._guesses[layer]
        return guess if guess is not None and covers(guess, num_tokens, self._top_k[layer]) else None

    def _speculates(self, layer: int, num_tokens: int) -> bool:
        return layer in self.speculated_layers and self.clock.num_one_token_each == num_tokens

    def after_staging(self, layer: int, step: Step, signals: Signals, routed: Signals | None = None) -> None:
        """The experts of this step of `layer` (its number) are there: look ahead from it.

        `signals`: what is executed, of real tokens only; `routed`: what the router chose, where that is something else.
        """
        self._count(layer, step)
        self._note_window(layer, step)
        if layer == 0:
            self._num_steps += 1
        true = signals if routed is None else routed
        self._score(layer, true)
        if self.predictor.observes:
            self.predictor.observe(layer, true)
        target = self.predictor.target_of(layer)
        if target is None:
            return
        # A wide step is streamed: it leaves nothing to fetch ahead. What is executed must not hang on gates: these
        # follow the clock, and the tokens must not.
        fetches = step.slot_ids is not None and self.gates[target].is_open
        speculates = self._speculates(target, len(signals.hidden))
        if not (fetches or speculates):
            return
        started = time.perf_counter()
        extra = 0 if speculates or not self.budgets[target].has_time else self._over_fetch
        count = self._top_k[target] + extra
        guess = self.predictor.predict(layer, signals, count)
        self._guesses[target] = guess
        if guess is not None and fetches:
            wanted = most_wanted(guess, self._num_experts[target])
            done = self._caches[target].prefetch(wanted.contiguous(), self.budgets[target].num_records)
            self._queued_at[target] = time.perf_counter()
            self.counters.add(_EVICTIONS, done.num_evictions)
            if done.num_unused:
                self._add(target, _UNUSED, done.num_unused)
        self._spent[target] += time.perf_counter() - started

    def _note_window(self, layer: int, step: Step) -> None:
        """How long the copies for this step had until it asked for them."""
        queued_at, self._queued_at[layer] = self._queued_at[layer], None
        if queued_at is not None:
            self.budgets[layer].note(max(0.0, time.perf_counter() - step.stall_seconds - queued_at))

    def _add(self, layer: int, index: int, amount: float) -> None:
        self.counters.add(index, amount)
        if self.counters.layers:
            self.counters.add(layer_start(layer) + _OF_LAYER[index], amount)

    def _count(self, layer: int, step: Step) -> None:
        if step.num_used:
            self._add(layer, _USED, step.num_used)
        if step.num_unused:
            self._add(layer, _UNUSED, step.num_unused)
        if step.num_displaced:
            self.counters.add(_DISPLACED, step.num_displaced)
        if step.num_cancelled:
            self._add(layer, _CANCELLED, step.num_cancelled)
        if step.slot_ids is not None:
            self.gates[layer].note(step.stall_seconds + self._spent[layer])
        self._spent[layer] = 0.0
        if layer == 0 and self._num_steps % self.scored_every == 0:
            moved = int(self._caches[0].staging.lane.counters()["prefetch_bytes"])
            self.counters.add(_PREFETCH_BYTES, moved - self._lane_bytes)
            self._lane_bytes = moved
            self.counters.set("gated_layers", sum(not gate.is_open for gate in self.gates))

    def _score(self, layer: int, true: Signals) -> None:
        guess, self._guesses[layer] = self._guesses[layer], None
        if guess is None or self._num_steps % self.scored_every or guess.ids.shape[0] not in (1, len(true.topk_ids)):
            return
        sums = score(guess, true)
        self._add(layer, _TOKENS, float(sums.tokens))
        self._add(layer, _ROUTED, float(sums.routed))
        self._add(layer, _FOUND, float(sums.found))
        self._add(layer, _FOUND_ALL, float(sums.found_all))
        self._add(layer, _MISSING_MASS, float(sums.tokens - sums.mass))


def why_not(config: ExpertPrefetchConfig, layers: "Sequence[CachedRoutedExperts]", has_link: bool) -> str | None:
    """Why this deployment does not look ahead; None when it does. Raises ConfigError where what was asked for
    cannot be.
    """
    if config.prefetch == OFF:
        return "off"
    reason, speculates = None, config.execution == SPECULATIVE
    if any(not isinstance(getattr(layer, "residence", None), NativeLayerCache | DeviceLayerCache) for layer in layers):
        reason = "it needs native staging, with the policy lru, lfu or lfru"
    elif all(layer.is_fully_resident for layer in layers):
        return "off: every expert has a slot"
    elif layers[0].device_cache is not None and compat.breaks_graphs():
        reason = "vLLM interrupts its CUDA graphs without joining other streams: VLLM_USE_BREAKABLE_CUDAGRAPH=0 helps"
    if config.lookahead_layers >= max(len(layers), 2):
        raise ConfigError(
            f"{CONFIG_KEY}: lookahead_layers is {config.lookahead_layers} and the model has {len(layers)} MoE layers: "
            f"set it to {max(len(layers) - 1, 1)} at most, or prefetch to off"
        )
    if reason and speculates:
        raise ConfigError(f"{CONFIG_KEY}: execution is speculative and cannot be: {reason}. Set execution to exact")
    if reason and config.prefetch == "on":
        raise ConfigError(f"{CONFIG_KEY}: prefetch is on and cannot be: {reason}. Set prefetch to auto or off")
    if reason is None and config.prefetch == AUTO and not has_link and not speculates:
        reason = "there is no link to hide: records are copied within host memory"
    return f"off: {reason}" if reason else None


def create_look_ahead(
    model: torch.nn.Module,
    layers: "Sequence[CachedRoutedExperts]",
    config: ExpertPrefetchConfig,
    has_link: bool,
    link_bytes_per_second: float,
) -> tuple[LookAhead | DeviceLookAhead | None, str]:
    """The look-ahead of a loaded model, and how it is called; or None, and why there is none (see `why_not`).

    A model or an artifact that does not allow it is served without: exactly, and the log says why.
    """
    reason = why_not(config, layers, has_link)
    if reason:
        if config.execution == SPECULATIVE:
            compat.logger().warning("expert_prefetch: execution is speculative, but serving is exact: %s", reason)
        return None, reason
    try:
        sources = _sources_of(model, layers)
        predictor, artifact = _create(config, [source.gate for source in sources])
    except (NotFound, ArtifactError) as error:
        compat.logger().warning("expert_prefetch: no look-ahead, serving goes on without it: %s", error)
        return None, f"off: {error}"
    forced = config.prefetch == "on"
    if layers[0].device_cache is not None:
        on_device = DeviceLookAhead(predictor, layers, config.over_fetch, forced, link_bytes_per_second)
        return on_device, f"{config.prefetch}: {predictor.name}"
    look_ahead = LookAhead(predictor, layers, config.over_fetch, forced, link_bytes_per_second)
    if config.execution == SPECULATIVE and artifact is not None:
        look_ahead.speculated_layers = allowed_layers(artifact.card, len(layers))
    return look_ahead, f"{config.prefetch}: {predictor.name}"


def _sources_of(model: torch.nn.Module, layers: "Sequence[CachedRoutedExperts]") -> list[Source]:
    """The sources in the order of `layers`."""
    by_experts: dict[Any, Source] = {source.runner.routed_experts: source for source in find_sources(model)}
    if len(by_experts) != len(layers):
        raise NotFound(f"{len(by_experts)} of {len(layers)} MoE layers were found in the model")
    return [by_experts[layer] for layer in layers]


def _create(config: ExpertPrefetchConfig, gates: list[Any]) -> tuple[Predictor, Artifact | None]:
    artifact = None
    if config.artifact:
        artifact = load_artifact(Path(config.artifact), fingerprint(gates)).on(gates[0].weight.device)
    name = config.predictor
    if name == AUTO:
        name = "hybrid" if artifact is not None and artifact.card.hybrid else "router"
    ingredients = Ingredients(gates, artifact, config.lookahead_layers)
    predictor = create_predictor(name, ingredients)
    if artifact is not None and not predictor.crosses_tokens and name != "none":
        predictor = NextTokenPredictor(predictor, create_predictor("transition", ingredients))
    return predictor, artifact
