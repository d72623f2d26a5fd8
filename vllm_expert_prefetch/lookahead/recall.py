"""How good the guesses were, against the routing that came: sums that the worker's counters grow by."""

from typing import NamedTuple

import torch

from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions
from vllm_expert_prefetch.metrics.counters import Counters, layer_start
from vllm_expert_prefetch.metrics.definitions import INDEX, LAYER_INDEX
from vllm_expert_prefetch.prediction.base import Signals
from vllm_expert_prefetch.prediction.truth import Score, sums_of_real

_SERIES = ("scored_tokens_total", "recall_routed_total", "recall_found_total/top_k", "recall_found_total/fetched")
_MISSING = "missing_gate_mass_total"


class _Pair(NamedTuple):
    """One layer's guess, (T or 1, P) int64, and its true routing."""

    layer: int
    guessed: torch.Tensor
    topk_ids: torch.Tensor
    topk_weights: torch.Tensor

    @property
    def widths(self) -> tuple[int, int]:
        return self.guessed.shape[1], self.topk_ids.shape[1]


class Recall:
    """The sums of `truth.Score` since the start. A step is compared in one go, at its last layer.

    On a GPU every step is compared there, all layers with as many guesses and experts per token as the first of them in
    one sum, which the host sees a step later. Steps that do not reach the last layer are left out. On the host the sums
    are kept by layer.
    """

    scored_every = 64
    """On the host one step in so many of those with guesses is compared: recall at negligible cost."""

    def __init__(self, num_layers: int, last_layer: int, device: torch.device, on_device: bool) -> None:
        """`on_device`: as `Caches` has it."""
        self._last_layer = last_layer
        self._on_device = on_device
        self._guesses: dict[int, torch.Tensor] = {}
        self._compared: list[_Pair] = []
        self._at = -1
        self._num_steps = 0
        shape = (1 if self._on_device else num_layers, len(Score._fields))
        self._sums = torch.zeros(shape, dtype=torch.float64, device=device)
        options = HostMemoryOptions(pin=self._on_device, cuda=self._on_device)
        self._seen = HostMemory(self._sums.nbytes, options).bytes.view(torch.float64).view(shape)
        self._published = torch.zeros(shape, dtype=torch.float64)
        self._has_grown = on_device
        """Whether there may be something to publish; on a GPU nobody knows."""

    def expect(self, layer: int, guessed: torch.Tensor) -> None:
        """Hold the ids `guessed`, (T or 1, P) int64, against the routing of `layer`, later in this step."""
        self._guesses[layer] = guessed

    def is_idle(self, layer: int) -> bool:
        """Whether there is nothing to compare at `layer`, nor anything of this step to add up there."""
        return layer not in self._guesses and not self._compared

    def compare(self, layer: int, true: Signals, rows: int | torch.Tensor) -> None:
        """The true routing of `layer` is known; `rows` as in `cache.base.Rows`."""
        if layer <= self._at:  # another step; what an unfinished one has left lies in memory that may be gone
            self._compared.clear()
        self._at = layer
        guess = self._guesses.pop(layer, None)
        if guess is not None and len(guess) in (1, len(true.topk_ids)):
            pair = _Pair(layer, guess, true.topk_ids, true.topk_weights)
            if not self._compared or pair.widths == self._compared[0].widths or not self._on_device:
                self._compared.append(pair)
        if layer == self._last_layer:
            if self._compared and (self._on_device or self._num_steps % self.scored_every == 0):
                self._add(rows)
            self._num_steps += bool(self._compared)
            self._compared.clear()

    def _add(self, rows: int | torch.Tensor) -> None:
        self._has_grown = True
        if isinstance(rows, torch.Tensor):
            pairs = self._compared
            parts = zip(*(pair[1:] for pair in pairs), strict=True)
            guessed, ids, weights = (torch.cat([part.expand(len(rows), -1) for part in column]) for column in parts)
            self._sums[0] += sums_of_real(guessed, ids, weights, rows.repeat(len(pairs)))
        else:
            for pair in self._compared:
                every = torch.zeros(len(pair.topk_ids), dtype=torch.int64)
                self._sums[pair.layer] += sums_of_real(pair.guessed, pair.topk_ids, pair.topk_weights.double(), every)
        self._seen.copy_(self._sums, non_blocking=True)

    def publish(self, counters: Counters) -> None:
        """Add what has come since the last time, as far as the host has seen it: no synchronisation."""
        if not self._has_grown:
            return
        self._has_grown = self._on_device
        now = self._seen.clone()
        grown = (now - self._published).tolist()
        self._published = now
        for layer, (*amounts, mass) in enumerate(grown):
            if amounts[0] <= 0:
                continue
            for series, amount in zip((*_SERIES, _MISSING), (*amounts, max(amounts[0] - mass, 0.0)), strict=True):
                counters.add(INDEX[series], amount)
                if counters.layers and not self._on_device:
                    counters.add(layer_start(layer) + LAYER_INDEX[f"layer_{series}"], amount)
