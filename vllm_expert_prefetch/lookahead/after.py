"""Looking ahead while a layer computes: guess the experts of a later layer, and queue their copies."""

import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from vllm_expert_prefetch.cache.base import Caches, LayerCache, Rows
from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.lookahead.recall import Recall
from vllm_expert_prefetch.lookahead.step_valve import StepValve
from vllm_expert_prefetch.lookahead.valve import Budget, Valve
from vllm_expert_prefetch.metrics.counters import Counters
from vllm_expert_prefetch.prediction.base import Predictor, Signals
from vllm_expert_prefetch.prediction.routing import Prediction

_CLOSE = 0.9
"""Share of the least weight among a row's first top-k guesses that a further one must have to be fetched."""


class _Ahead(NamedTuple):
    """What one layer guesses."""

    distance: int
    target: int
    predictor: Predictor
    cache: LayerCache


class LookAhead:
    """One worker's look-ahead: a predictor for each distance, for each MoE layer a valve and a budget, and on the host
    a valve for steps as a whole.

    Where there are two areas of overflow rows, and more experts are guessed for the next layer than it has slots, all
    of them are brought, into slots and overflow rows. A step with more routed ids than experts guesses for the next
    layer alone, whatever its valve says, and with one area for none: it needs most of the experts of every layer.

    The nearest layer is guessed and fetched first. What a farther one may bring is what the link can begin before the
    next layer, less what waits for it already. A guess that nearer ones do not repeat is cancelled unless its copy has
    begun.

    On the host a closed valve, or a link with enough to do, saves the prediction as well. On a GPU every replay of a
    captured step predicts and plans anew, and the budget, a word that the GPU reads, is 0 where the valve is closed.
    Padding and dummy runs fetch nothing and count nothing. A predictor that remembers (`observes`) remembers them as
    well: guesses are hints.
    """

    def __init__(
        self,
        predictors: Sequence[Predictor],
        caches: Caches,
        over_fetch: int,
        forced: bool,
        link_bytes_per_second: float,
        device: torch.device,
        speculated_layers: frozenset[int] = frozenset(),
        preloads: bool = False,
    ) -> None:
        """`predictors`: of distance 1, 2 and so on. `forced`: valves never close. `link_bytes_per_second`: as measured.
        `speculated_layers` execute their guess of distance 1 in steps that give every sequence one token (on the host
        only). `preloads`: the overflow rows of a layer and of the next one are in different areas.
        """
        self._preloads, self._forced = preloads, forced
        self.depth = len(predictors)
        self.speculated_layers = speculated_layers
        self._caches = caches
        self.num_layers = len(caches.layers)
        """MoE layers that a step computes, those of other stages of a pipeline included."""
        self._over_fetch = over_fetch
        self.valves = [Valve(forced, not caches.on_device, self.depth) for _ in caches.layers]
        self.step_valve = None if forced or caches.on_device else StepValve()
        self.budgets = [
            Budget(cache.record_bytes / link_bytes_per_second, cache.num_slots)
            if cache is not None and link_bytes_per_second
            else Budget(0.0, 0 if cache is None else cache.num_slots)
            for cache in caches.layers
        ]
        self._published_open: list[list[_Ahead]] | None = None
        self._budgets_set: list[tuple[int, int, bool] | None] = [None] * len(caches.layers)
        self.use(predictors)
        last = max(number for number, cache in enumerate(caches.layers) if cache is not None)
        self.recall = Recall(len(caches.layers), last, device, caches.on_device)
        self._guesses: list[Prediction | None] = [None] * len(caches.layers)
        self._spent = [0.0] * len(caches.layers)
        self._num_one_token_each = 0
        self._read: Signals | None = None
        """What is read aside: its memory must not be used for anything else before the next layer."""
        self._set_budgets()

    def use(self, predictors: Sequence[Predictor]) -> None:
        """Guess with these from now on; as many as there were at first, or fewer."""
        self.predictors = predictors
        self._observers = [predictor for predictor in predictors if predictor.observes]
        self._ahead = [self._what_is_guessed_at(layer) for layer in range(len(self._caches.layers))]
        """By layer, the nearest first."""
        self._next = [
            next((ahead for ahead in own if self._preloads and ahead.distance == 1 and ahead.target > layer), None)
            for layer, own in enumerate(self._ahead)
        ]
        """What is preloaded behind a wide step of each layer."""
        self._open = [[ahead for ahead in own if self._is_open(ahead)] for own in self._ahead]
        """Of these, on the host, what valves let through."""

    def _is_open(self, ahead: _Ahead) -> bool:
        """Whether a guess may be fetched, or executed, which must not hang on valves: these follow the clock."""
        is_executed = ahead.distance == 1 and ahead.target in self.speculated_layers
        return is_executed or ahead.distance <= self._depth_of(ahead.target)

    def _depth_of(self, layer: int) -> int:
        """From how many layers ahead its experts are fetched."""
        if self.step_valve is not None and not self.step_valve.is_open:
            return 0
        return self.valves[layer].depth if self._forced or self.budgets[layer].hides else 0

    def _what_is_guessed_at(self, layer: int) -> list[_Ahead]:
        found = []
        for predictor in self.predictors:
            target, own = predictor.target_of(layer), predictor.at(layer)
            cache = None if target is None else self._caches.layers[target]
            if target is not None and own is not None and cache is not None:
                found.append(_Ahead(predictor.distance, target, own, cache))
        return found

    def begin_step(self, num_one_token_each: int) -> None:
        """An engine step begins; so many sequences get one token each, 0 when it is any other step."""
        self._num_one_token_each = num_one_token_each

    def to_execute(self, layer: int, rows: Rows) -> Prediction | None:
        """The guess that `layer` executes in this step in place of its routing; None where it follows the router."""
        guess, cache = self._guesses[layer], self._caches.layers[layer]
        if guess is None or cache is None or not self._speculates(layer, rows):
            return None
        covers = guess.ids.shape[0] == rows and guess.ids.shape[1] >= cache.top_k
        return guess if covers else None

    def after(self, layer: int, signals: Signals, rows: Rows, routed: Signals | None = None) -> None:
        """The experts of a step of `layer` (its number) are there or ordered, and its kernel is not launched yet.

        Copies that begin now have that kernel and the next attention to hide behind.

        `signals`: what is executed, padding included; `routed`: what the router chose, where that is something else.
        """
        num_tokens = rows if isinstance(rows, int) else len(signals.topk_ids)
        num_ids, preloaded = num_tokens * signals.topk_ids.shape[1], self._next[layer]
        is_wide = preloaded is not None and num_ids > preloaded.cache.num_routed
        if isinstance(rows, int):
            if not is_wide and not self._open[layer] and not self._observers and self.recall.is_idle(layer):
                return
            signals, routed = _first(signals, rows), None if routed is None else _first(routed, rows)
        started = time.perf_counter()
        self._guesses[layer] = None
        true = signals if routed is None else routed
        self.recall.compare(layer, true, rows)
        for predictor in self._observers:
            predictor.observe(layer, true)
        if self._caches.on_device:
            fetching = [ahead for ahead in self._ahead[layer] if num_ids <= ahead.cache.num_routed]
            if fetching or is_wide:
                with self._caches.aside():
                    if preloaded is not None and is_wide:
                        self._preload(layer, preloaded, signals, rows)
                    for ahead in fetching:
                        self._guess(layer, ahead, signals, rows, True)
                self._read = signals
            return
        if preloaded is not None and is_wide:
            self._preload(layer, preloaded, signals, rows)
        for ahead in self._open[layer]:
            speculates = ahead.distance == 1 and self._speculates(ahead.target, rows)
            takes = num_ids <= ahead.cache.num_routed and ahead.cache.takes_guesses(ahead.distance)
            if takes or speculates:
                guess = self._guess(layer, ahead, signals, rows, takes, speculates)
                if ahead.distance == 1:
                    self._guesses[ahead.target] = guess
                ended = time.perf_counter()  # the first guess bears what is done for all of them
                self._spent[ahead.target] += ended - started
                started = ended

    def _preload(self, layer: int, ahead: _Ahead, signals: Signals, rows: Rows) -> None:
        guess = ahead.predictor.predict(layer, signals, ahead.cache.top_k)
        if guess is not None and guess.ids.numel() > ahead.cache.num_routed:
            ahead.cache.preload(ahead.cache.local(guess.ids), rows)

    def _guess(
        self, layer: int, ahead: _Ahead, signals: Signals, rows: Rows, fetches: bool, speculates: bool = False
    ) -> Prediction | None:
        distance, target, predictor, cache = ahead
        guess = predictor.predict(layer, signals, self._num_guesses(target, distance, speculates))
        if guess is None:
            return None
        guess = close_ones(guess, cache.top_k, isinstance(rows, int))
        if fetches:
            own = Prediction(cache.local(guess.ids), guess.weights)
            wanted = most_wanted(own, cache.num_experts) if isinstance(rows, int) else own.ids
            if wanted.numel() > cache.num_slots and ahead is self._next[layer]:
                cache.preload(own.ids[:, : cache.top_k] if isinstance(rows, int) else own.ids, rows)
            else:
                cache.prefetch(wanted, rows, distance)
        # The next token's may be computed by another graph, which must not hold this one's tensors.
        if target > layer or isinstance(rows, int):
            self.recall.expect(target, guess.ids)
        return guess

    def note(self, deltas: Sequence[Words], decode_step_seconds: float | None) -> None:
        """What each layer did since the last call, and what a decode step took meanwhile; None when there was none.

        Valves may close or open, and the time of a layer says how many records its link can begin.
        """
        if self.step_valve is not None and decode_step_seconds is not None:
            looked = self.step_valve.is_open
            self.step_valve.note(decode_step_seconds, self._num_one_token_each)
            if not looked and not self.step_valve.is_open:
                return
        for layer, delta in enumerate(deltas):
            self.valves[layer].note(delta, self._spent[layer])
            self._spent[layer] = 0.0
        if decode_step_seconds is not None:
            num_steps = max(1, *(delta.steps for delta in deltas))
            busy = self._demand_seconds(deltas) / num_steps / len(deltas)
            for budget in self.budgets:
                budget.note(max(0.0, decode_step_seconds / self.num_layers - busy))
        self._set_budgets()

    def _demand_seconds(self, deltas: Sequence[Words]) -> float:
        """How long the link was busy with what steps waited for: on a GPU, where nothing is timed, as measured."""
        if self._caches.on_device:
            pairs = zip(deltas, self.budgets, strict=True)
            return sum(delta.demanded * budget.record_seconds for delta, budget in pairs)
        return sum(delta.stall_ns for delta in deltas) * 1e-9

    def publish(self, counters: Counters) -> None:
        """Bring what the counters say of guesses up to date."""
        self.recall.publish(counters)
        if self._published_open is self._open:
            return
        self._published_open = self._open
        open_at = Counter(ahead.distance for own in self._open for ahead in own)
        for distance in range(1, self.depth + 1):
            counters.set(f"lookahead_open_layers/{distance}", open_at[distance])

    def _set_budgets(self) -> None:
        changed = False
        for number, cache in enumerate(self._caches.layers):
            budget, depth = self.budgets[number], self._depth_of(number)
            state = (depth, budget.num_records, budget.has_time)
            if cache is None or self._budgets_set[number] == state:
                continue
            self._budgets_set[number] = state
            changed = True
            for distance in range(1, self.depth + 1):
                records = budget.num_records if distance <= depth else 0
                cache.set_budget(records, self._num_guesses(number, distance, False), distance)
        if changed:
            self._open = [[ahead for ahead in own if self._is_open(ahead)] for own in self._ahead]

    def _num_guesses(self, target: int, distance: int, speculates: bool) -> int:
        """Guesses for each token. On a GPU the graph holds all of them, and the budget says how many count."""
        cache = self._caches.layers[target]
        assert cache is not None
        extends = distance == 1 and self.budgets[target].has_time and not speculates
        return cache.top_k + (self._over_fetch if extends else 0)

    def _speculates(self, layer: int, rows: Rows) -> bool:
        return layer in self.speculated_layers and isinstance(rows, int) and self._num_one_token_each == rows


def _first(signals: Signals, num_tokens: int) -> Signals:
    if num_tokens == len(signals.topk_ids):
        return signals
    return Signals(*(tensor[:num_tokens] for tensor in signals))


def close_ones(guess: Prediction, top_k: int, on_host: bool) -> Prediction:
    """Without guesses beyond a row's first `top_k` that are clearly less likely: -1 in their place, or a shorter row.

    One in five of those that stay is needed, one in 20 of the others (half resident, docs/predictors.md).
    """
    ids, weights = guess
    if ids.shape[1] <= top_k:
        return guess
    if on_host and len(ids) == 1:  # the usual step, and torch takes longer for it
        row = weights[0].tolist()
        least = _CLOSE * min(row[:top_k])
        count = next((number for number in range(top_k, len(row)) if row[number] < least), len(row))
        return Prediction(ids[:, :count], weights[:, :count])
    least_of_each = _CLOSE * weights[:, :top_k].amin(-1, keepdim=True)
    return Prediction(ids.masked_fill(weights < least_of_each, -1), weights)


def most_wanted(guess: Prediction, num_experts: int) -> torch.Tensor:
    """The union of all rows' guesses, int64, by falling sum of their gate weights.

    A guess of one row is in that order already. Negative ids are left out.
    """
    if guess.ids.shape[0] == 1:
        return guess.ids[0]
    places = torch.where(guess.ids < 0, num_experts, guess.ids).flatten()
    mass = torch.zeros(num_experts + 1).index_add_(0, places, guess.weights.flatten())
    mass.index_add_(0, places, torch.full((guess.ids.numel(),), 1e-9))  # guessed at all
    mass = mass[:num_experts]
    return mass.topk(int((mass > 0).sum()))[1]
