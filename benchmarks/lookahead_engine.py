"""One engine of the look-ahead study: the same requests over and over, with another predictor or link each time.

The engine stays; what changes between two runs are the caches (which begin anew), the emulated link and the predictor.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import Engine, load_prompts
from vllm import SamplingParams

from vllm_expert_prefetch.cache.create import create_caches
from vllm_expert_prefetch.config import MOST_LOOKAHEAD_LAYERS, ExpertPrefetchConfig
from vllm_expert_prefetch.lookahead.after import LookAhead
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.metrics.definitions import SERIES
from vllm_expert_prefetch.metrics.publish import Publisher
from vllm_expert_prefetch.prediction import (
    Ingredients,
    Predictor,
    Signals,
    create_predictor,
    fingerprint,
    load_artifact,
    with_next_token,
)
from vllm_expert_prefetch.prediction.baselines import OraclePredictor
from vllm_expert_prefetch.residency import POLICIES, ExpertCache
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.sources import find_sources

INSTANT_GBPS = 10_000.0
LATENCY_US = 10.0
MOST_REQUESTS = 8


@dataclass(frozen=True)
class Variant:
    """One way to serve. `predictor`: a name, or two joined by +, the second one for the next token's first layer."""

    name: str
    predictor: str | None = None
    is_forced: bool = True
    depth: int = 1
    """Layers ahead. Where an artifact does not reach, the router guesses."""
    speculates: str = ""
    """Empty: exact. `guard`: in the artifact's allow list. `published`: in every layer but the first and the last."""


class Run(NamedTuple):
    """One batch of requests: what each decode step took apart from stalls, and what was counted, per step."""

    rest_ms: tuple[float, ...]
    tokens: tuple[tuple[int, ...], ...]
    counted: dict[str, float]


class _Recorder:
    """Notes each step's routing, and predicts nothing."""

    speculated_layers: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.steps: list[list[torch.Tensor]] = []

    def to_execute(self, layer: int, num_tokens: int) -> None:
        return None

    def after(self, layer: int, signals: Signals, rows: int, routed: Signals | None = None) -> None:
        if layer == 0:
            self.steps.append([])
        self.steps[-1].append(signals.topk_ids[:rows].clone())

    def begin_step(self, num_one_token_each: int) -> None:
        pass

    def note(self, deltas: Any, decode_step_seconds: float | None) -> None:
        pass

    def publish(self, counters: Any) -> None:
        pass


class StudyEngine:
    """`residency`: share of the experts that have a slot."""

    def __init__(self, model: str, residency: float, eager: bool, artifact: str | None, num_tokens: int) -> None:
        link: dict[str, Any] = {"emulated_link_gbps": INSTANT_GBPS, "emulated_link_latency_us": LATENCY_US}
        self._config = ExpertPrefetchConfig(cache_fraction=residency, **link)
        config = {"cache_fraction": residency, "prefetch": "off", **link}
        self.llm = Engine(model, eager, config, max_num_seqs=MOST_REQUESTS).open()
        model_runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        self._layers = compat.moe_layers_of(model_runner.get_model())
        gates = [source.gate for source in find_sources(model_runner.get_model())]
        loaded = load_artifact(Path(artifact), fingerprint(gates)) if artifact else None
        self._ingredients = Ingredients(gates, loaded)
        self._worker = self._layers[0].worker
        self._caches = self._worker.caches
        self._num_tokens = num_tokens
        self._warm_up = num_tokens // 6
        self._traces: dict[tuple[str, ...], list[torch.Tensor]] = {}
        self._predictors: dict[tuple[str, int], Predictor] = {}
        self._kept_valves: dict[tuple[str, float], Any] = {}
        self._prompts = load_prompts(16)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_experts(self) -> int:
        return int(self._layers[0].cache.num_experts)

    @property
    def record_bytes(self) -> int:
        return int(self._layers[0].cache.record_bytes)

    @property
    def num_slots(self) -> int:
        """Per layer."""
        return int(self._layers[0].cache.num_slots)

    @property
    def allow_list(self) -> list[int]:
        """The layers in which the artifact allows speculative execution."""
        return list(self._ingredients.artifact.card.allow_list) if self._ingredients.artifact else []

    def requests(self, rounds: int, batch: int) -> list[tuple[str, ...]]:
        """So many batches of prompts."""
        prompts = self._prompts * batch
        return [tuple(prompts[number * batch : (number + 1) * batch]) for number in range(rounds)]

    def trace(self, prompts: tuple[str, ...]) -> list[torch.Tensor]:
        """Expert ids (layers, T, K) of every step of these requests, recorded once."""
        if prompts not in self._traces:
            self._start_caches(INSTANT_GBPS)
            recorder = _Recorder()
            self._look_ahead_with(recorder)
            self._generate(prompts)
            self._traces[prompts] = [torch.stack(step) for step in recorder.steps]
        return self._traces[prompts]

    def run(self, variant: Variant, gbps: float, prompts: tuple[str, ...], scores_all: bool = False) -> Run:
        """One batch over a link of `gbps`. `scores_all`: compare every step with the truth, which takes time."""
        predictors = self._predictors_of(variant, prompts)
        self._start_caches(gbps)
        look_ahead = None
        if predictors:
            rate = self.record_bytes / (LATENCY_US * 1e-6 + self.record_bytes / (gbps * 1e9))
            fixed = (self._config.over_fetch, variant.is_forced, rate, torch.device("cpu"))
            look_ahead = LookAhead(predictors, self._caches, *fixed, self._speculated(variant.speculates))
            own = look_ahead.valves, look_ahead.step_valve
            look_ahead.valves, look_ahead.step_valve = self._kept_valves.setdefault((variant.name, gbps), own)
            look_ahead.note([cache.words() for cache in self._caches.layers], None)  # what kept valves leave open
            look_ahead.recall.scored_every = 1 if scores_all else look_ahead.recall.scored_every
        self._look_ahead_with(look_ahead)
        return self._generate(prompts)

    def _speculated(self, where: str) -> frozenset[int]:
        layers = {"": [], "guard": self.allow_list, "published": list(range(1, self.num_layers - 1))}
        return frozenset(layers[where])

    def _predictors_of(self, variant: Variant, prompts: tuple[str, ...]) -> list[Predictor]:
        """By distance."""
        if not variant.predictor:
            return []
        distances = range(1, variant.depth + 1)
        if variant.predictor == "oracle":
            trace = self.trace(prompts)
            return [OraclePredictor(trace, distance) for distance in distances]
        artifact = self._ingredients.artifact
        reach = artifact.card.depth if artifact else 1
        within = variant.predictor.partition("+")[0]
        names = [variant.predictor if d == 1 else within if d <= reach else "router" for d in distances]
        return [self._predictor(name, distance) for name, distance in zip(names, distances, strict=True)]

    def _predictor(self, name: str, distance: int) -> Predictor:
        key = (name, distance)
        if key not in self._predictors:
            ingredients = replace(self._ingredients, distance=distance)
            parts = [create_predictor(part, ingredients) for part in name.split("+")]
            self._predictors[key] = with_next_token(*parts) if len(parts) == 2 else parts[0]
        return self._predictors[key]

    def _start_caches(self, gbps: float) -> None:
        self._caches.close()  # what it still copies must not reach the new caches' slots
        link = EmulatedLink(gbps, LATENCY_US)
        self._caches = create_caches(self.num_layers, link, torch.device("cpu"), MOST_LOOKAHEAD_LAYERS)
        for number, layer in enumerate(self._layers):
            old = layer.cache
            fixed = (old.store, old.tensors, old.num_slots, old.top_k, self._config.policy)
            layer.cache = self._caches.add(number, *fixed)

    def _look_ahead_with(self, look_ahead: Any) -> None:
        for layer in self._layers:
            layer.look_ahead = look_ahead
        self._worker.publisher = Publisher(self._worker.publisher.counters, self._caches, look_ahead)

    def _generate(self, prompts: tuple[str, ...]) -> Run:
        engine = self.llm.llm_engine
        sampling = SamplingParams(temperature=0, max_tokens=self._num_tokens, ignore_eos=True, detokenize=False)
        for number, prompt in enumerate(prompts):
            engine.add_request(str(number), prompt, sampling)
        rest: list[float] = []
        finished: dict[str, tuple[int, ...]] = {}
        before: dict[str, float] = {}
        while engine.has_unfinished_requests():
            if len(rest) == self._warm_up:
                before = self._counters()
            stalled, started = self._stalled(), time.perf_counter()
            outputs = engine.step()
            rest.append(time.perf_counter() - started - self._stalled() + stalled)
            finished |= {output.request_id: tuple(output.outputs[0].token_ids) for output in outputs}
        after = self._counters()
        measured = [1000 * seconds for seconds in rest[self._warm_up :]]
        per_step = {series: (after[series] - before[series]) / len(measured) for series in SERIES}
        tokens = tuple(finished[str(number)] for number in range(len(prompts)))
        return Run(tuple(measured), tokens, per_step)

    def _stalled(self) -> float:
        return float(self._worker.publisher.counters.get("stall_seconds_total"))

    def _counters(self) -> dict[str, float]:
        return {series: self._worker.publisher.counters.get(series) for series in SERIES}


def misses_per_token(trace: Sequence[torch.Tensor], slots: Sequence[int], num_experts: int) -> float:
    """Misses of all layers per step of one token, without prefetch, of layers with so many slots each."""
    misses, steps = 0, [step for step in trace if step.shape[1] == 1]
    for layer, num_slots in enumerate(slots):
        cache = ExpertCache(num_experts, num_slots, POLICIES[ExpertPrefetchConfig().policy])
        misses += sum(len(cache.plan(step[layer].flatten().tolist()).loads) for step in steps)
    return misses / len(steps)
