"""Looking ahead on a GPU: launched inside the step, captured with it, and never looked at by the host."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from vllm_expert_prefetch.experts import HostMemory, HostMemoryOptions
from vllm_expert_prefetch.prediction import Predictor, Signals
from vllm_expert_prefetch.prediction.count_gate import CountGate, Outcomes
from vllm_expert_prefetch.prediction.schedule import Budget
from vllm_expert_prefetch.prediction.truth import Score, sums_of_real

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts

LookFrom = Callable[[Signals, torch.Tensor], None]
"""Takes one layer's signals of all rows of a step, and which rows are real, (T,) int64, negative for padding."""

_NUM_SUMS = len(Score._fields)


class DeviceLookAhead:
    """One worker's look-ahead: a predictor, and a gate per MoE layer, which the totals of the GPU decide.

    Every replay predicts and plans anew; how many records it may bring, each layer's budget says, a word that the GPU
    reads. Padding and dummy runs are known by the tensor `real`: they fetch nothing and count nothing. A predictor that
    remembers (`observes`) remembers them as well: guesses are hints.
    """

    def __init__(
        self,
        predictor: Predictor,
        layers: "Sequence[CachedRoutedExperts]",
        over_fetch: int,
        forced: bool,
        link_bytes_per_second: float,
    ) -> None:
        """`layers`: in order, each with a DeviceLayerCache. `forced`: the gates never close. The link as measured."""
        self.predictor = predictor
        self.gates = [CountGate(forced) for _ in layers]
        # With a slot for every expert there is nothing to fetch, and such a layer does not come here.
        self._caches = [None if layer.is_fully_resident else layer.device_cache for layer in layers]
        self._budgets = [
            None if cache is None else Budget(cache.staging.record_bytes / link_bytes_per_second, cache.num_slots)
            for cache in self._caches
        ]
        last_layer = max(number for number, cache in enumerate(self._caches) if cache is not None)
        self.truth = TruthSums(layers[0].accelerator, last_layer)
        self._counts = [layer.top_k + over_fetch for layer in layers]

    @property
    def num_closed(self) -> int:
        """Layers whose gate is closed."""
        return sum(not gate.is_open for gate in self.gates)

    def after_staging(self, layer: int, signals: Signals, real: torch.Tensor) -> None:
        """The experts of a narrow step of `layer` (its number) are ordered, and its kernel is not launched yet: copies
        that begin now have that kernel and the next attention to hide behind.
        """
        self.truth.compare(layer, signals, real)
        if self.predictor.observes:
            self.predictor.observe(layer, signals)
        target = self.predictor.target_of(layer)
        cache = None if target is None else self._caches[target]
        if target is None or cache is None or cache.num_waves(len(real)) > 1:
            return
        guess = self.predictor.predict(layer, signals, self._counts[target])
        if guess is None:
            return
        for_all = len(guess.ids) == 1 < len(real)
        cache.prefetch(guess.ids.contiguous(), real.amax(0, keepdim=True) if for_all else real)
        # The next token's may be computed by another graph, which must not hold this one's tensors.
        if target > layer and len(guess.ids) in (1, len(real)):
            self.truth.expect(target, guess.ids)

    def note(self, layer: int, outcomes: Outcomes, step_seconds: float | None) -> None:
        """What has become of the prefetches of `layer` since the last call, and what a decode step took meanwhile.

        Its gate may close, or open again; the time of a layer says how many records the link can begin.
        """
        gate, cache, budget = self.gates[layer], self._caches[layer], self._budgets[layer]
        gate.note(outcomes)
        if cache is None or budget is None:
            return
        if step_seconds is not None:
            budget.note(step_seconds / len(self._caches))
        cache.set_prefetch_budget(budget.num_records if gate.is_open else 0)


class _Pair(NamedTuple):
    """One layer's guess, (T or 1, P) int64, and its true routing."""

    guessed: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor

    @property
    def widths(self) -> tuple[int, int]:
        return self.guessed.shape[1], self.topk_ids.shape[1]


class TruthSums:
    """How good the guesses were: the sums of `truth.Score` since the start, on the GPU and, a step later, on the host.

    A step is compared in one go at its last layer: all layers with as many guesses and experts per token as the first
    of them. Steps that do not reach the last layer in one wave are left out.
    """

    def __init__(self, device: torch.device, last_layer: int) -> None:
        self._last_layer = last_layer
        self._guesses: dict[int, torch.Tensor] = {}
        self._compared: list[_Pair] = []
        self._at = -1
        self._sums = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=device)
        options = HostMemoryOptions(pin=device.type == "cuda", cuda=device.type == "cuda")
        self._mirror = HostMemory(self._sums.nbytes, options).bytes.view(torch.float64)

    def expect(self, layer: int, guessed: torch.Tensor) -> None:
        """Hold the ids `guessed`, (T or 1, P) int64, against the routing of `layer`, later in this step."""
        self._guesses[layer] = guessed

    def compare(self, layer: int, signals: Signals, real: torch.Tensor) -> None:
        """The true routing of `layer` is known."""
        if layer <= self._at:  # another step; what an unfinished one has left lies in memory that may be gone
            self._guesses.clear()
            self._compared.clear()
        self._at = layer
        guess = self._guesses.pop(layer, None)
        if guess is not None:
            pair = _Pair(guess, signals.topk_ids, signals.topk_weights)
            if not self._compared or pair.widths == self._compared[0].widths:
                self._compared.append(pair)
        if layer == self._last_layer and self._compared:
            self._add(real)
            self._compared.clear()

    def totals(self) -> list[float]:
        """In the order of `Score`, as the GPU has last written them: no synchronisation."""
        return self._mirror.tolist()

    def _add(self, real: torch.Tensor) -> None:
        guessed, topk_ids, topk_weights = (
            torch.cat([part.expand(len(real), -1) for part in parts]) for parts in zip(*self._compared, strict=True)
        )
        self._sums += sums_of_real(guessed, topk_ids, topk_weights, real.repeat(len(self._compared)))
        self._mirror.copy_(self._sums, non_blocking=True)
