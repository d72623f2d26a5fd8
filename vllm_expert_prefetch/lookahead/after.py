"""Looking ahead while a layer computes: guess the experts of a later layer, and queue their copies."""

import time
from collections.abc import Sequence

import torch

from vllm_expert_prefetch.cache.base import Caches, Rows
from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.lookahead.recall import Recall
from vllm_expert_prefetch.lookahead.valve import Budget, Valve
from vllm_expert_prefetch.metrics.counters import Counters
from vllm_expert_prefetch.prediction.base import Predictor, Signals
from vllm_expert_prefetch.prediction.routing import Prediction


class LookAhead:
    """One worker's look-ahead: a predictor, and for each MoE layer a valve and a budget.

    On the host a closed valve saves the prediction as well. On a GPU every replay of a captured step predicts and plans
    anew, and the budget, a word that the GPU reads, is 0 where the valve is closed. Padding and dummy runs fetch
    nothing and count nothing. A predictor that remembers (`observes`) remembers them as well: guesses are hints.
    """

    def __init__(
        self,
        predictor: Predictor,
        caches: Caches,
        over_fetch: int,
        forced: bool,
        link_bytes_per_second: float,
        device: torch.device,
        speculated_layers: frozenset[int] = frozenset(),
    ) -> None:
        """`forced`: valves never close. `link_bytes_per_second`: as measured. `speculated_layers` execute their guess
        in steps that give every sequence one token (on the host only).
        """
        self.predictor = predictor
        self.speculated_layers = speculated_layers
        self._caches = caches
        self._over_fetch = over_fetch
        self.valves = [Valve(forced, is_timed=not caches.on_device) for _ in caches.layers]
        self.budgets = [
            Budget(predictor.distance * cache.record_bytes / link_bytes_per_second, cache.num_slots)
            if cache is not None and link_bytes_per_second
            else Budget(0.0, 0 if cache is None else cache.num_slots)
            for cache in caches.layers
        ]
        last = max(number for number, cache in enumerate(caches.layers) if cache is not None)
        self.recall = Recall(len(caches.layers), last, device, caches.on_device)
        self._guesses: list[Prediction | None] = [None] * len(caches.layers)
        self._spent = [0.0] * len(caches.layers)
        self._num_one_token_each = 0
        self._set_budgets()

    def begin_step(self, num_one_token_each: int) -> None:
        """An engine step begins; so many sequences get one token each, 0 when it is any other step."""
        self._num_one_token_each = num_one_token_each

    def to_execute(self, layer: int, rows: Rows) -> Prediction | None:
        """The guess that `layer` executes in this step in place of its routing; None where it follows the router."""
        guess, cache = self._guesses[layer], self._caches.layers[layer]
        if guess is None or cache is None or not isinstance(rows, int) or not self._speculates(layer, rows):
            return None
        covers = guess.ids.shape[0] == rows and guess.ids.shape[1] >= cache.top_k
        return guess if covers else None

    def after(self, layer: int, signals: Signals, rows: Rows, routed: Signals | None = None) -> None:
        """The experts of a step of `layer` (its number) are there or ordered, and its kernel is not launched yet.

        Copies that begin now have that kernel and the next attention to hide behind.

        `signals`: what is executed, padding included; `routed`: what the router chose, where that is something else. A
        step with more routed ids than the target has experts needs most of them, and fetches none ahead.
        """
        if isinstance(rows, int):
            signals, routed = _first(signals, rows), None if routed is None else _first(routed, rows)
        self._guesses[layer] = None
        true = signals if routed is None else routed
        self.recall.compare(layer, true, rows)
        if self.predictor.observes:
            self.predictor.observe(layer, true)
        target, predictor = self.predictor.target_of(layer), self.predictor.at(layer)
        cache = None if target is None else self._caches.layers[target]
        if target is None or predictor is None or cache is None:
            return
        # What is executed must not hang on valves: these follow the clock, and the tokens must not.
        speculates = isinstance(rows, int) and self._speculates(target, rows)
        fetches = cache.takes_guesses and signals.topk_ids.numel() <= cache.num_experts
        if not (fetches or speculates):
            return
        started = time.perf_counter()
        guess = predictor.predict(layer, signals, self._num_guesses(target, speculates))
        self._guesses[target] = guess
        if guess is not None and fetches:
            wanted = most_wanted(guess, cache.num_experts) if isinstance(rows, int) else guess.ids
            self._caches.prefetch([(target, wanted)], rows)
        # The next token's may be computed by another graph, which must not hold this one's tensors.
        if guess is not None and (target > layer or isinstance(rows, int)):
            self.recall.expect(target, guess.ids)
        self._spent[target] += time.perf_counter() - started

    def note(self, deltas: Sequence[Words], decode_step_seconds: float | None) -> None:
        """What each layer did since the last call, and what a decode step took meanwhile; None when there was none.

        Valves may close or open, and the time of a layer says how many records its link can begin.
        """
        for layer, delta in enumerate(deltas):
            self.valves[layer].note(delta, self._spent[layer])
            self._spent[layer] = 0.0
        if decode_step_seconds is not None:
            num_steps = max(delta.steps for delta in deltas)
            stalls = sum(delta.stall_ns for delta in deltas) * 1e-9 / max(num_steps, 1)
            window = max(0.0, decode_step_seconds - stalls) / len(deltas)
            for budget in self.budgets:
                budget.note(window * self.predictor.distance)
        self._set_budgets()

    def publish(self, counters: Counters) -> None:
        """Bring what the counters say of guesses up to date."""
        self.recall.publish(counters)
        counters.set("gated_layers", sum(not valve.is_open for valve in self.valves))

    def _set_budgets(self) -> None:
        for number, cache in enumerate(self._caches.layers):
            if cache is not None:
                records = self.budgets[number].num_records if self.valves[number].is_open else 0
                cache.set_budget(records, self._num_guesses(number, False))

    def _num_guesses(self, target: int, speculates: bool) -> int:
        """Guesses for each token. On a GPU the graph holds all of them, and the budget says how many count."""
        cache = self._caches.layers[target]
        assert cache is not None
        return cache.top_k + (self._over_fetch if self.budgets[target].has_time and not speculates else 0)

    def _speculates(self, layer: int, num_tokens: int) -> bool:
        return layer in self.speculated_layers and self._num_one_token_each == num_tokens


def _first(signals: Signals, num_tokens: int) -> Signals:
    if num_tokens == len(signals.topk_ids):
        return signals
    return Signals(*(tensor[:num_tokens] for tensor in signals))


def most_wanted(guess: Prediction, num_experts: int) -> torch.Tensor:
    """The union of all rows' guesses, int64, by falling sum of their gate weights.

    A guess of one row is in that order already.
    """
    if guess.ids.shape[0] == 1:
        return guess.ids[0]
    mass = torch.zeros(num_experts).index_add_(0, guess.ids.flatten(), guess.weights.flatten())
    mass.index_add_(0, guess.ids.flatten(), torch.full((guess.ids.numel(),), 1e-9))  # guessed at all
    return mass.topk(int((mass > 0).sum()))[1]
