"""Notes what every layer serves, and hands complete files to a thread that writes them."""

import time
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_expert_prefetch.cache.base import LayerCache, Rows
from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.tracing.card import TraceCard
from vllm_expert_prefetch.tracing.folder import TraceFolder
from vllm_expert_prefetch.tracing.trace import Trace, compact

CHUNK_BYTES = 1 << 20
"""Of routed ids in one file."""
CHUNK_SECONDS = 30
_Noted = NDArray[np.generic] | tuple[torch.Tensor, torch.Tensor]
"""Routed ids; on a GPU with the rows that tell tokens from padding."""
_STALL = Words._fields.index("stall_ns")


class Recorder:
    """Records the layers of `caches`, in the order of `card`, into `folder`.

    A step is kept when every layer has served it once. Nothing here waits for the disk. Requests get numbers from 0 on:
    their names stay here.
    """

    def __init__(
        self, caches: Sequence[LayerCache], card: TraceCard, folder: TraceFolder, with_weights: bool = False
    ) -> None:
        """`with_weights`: gate weights as well, which take twice the room of the ids."""
        self.card, self.folder = card, folder
        self.num_steps = self.num_dropped = 0
        """Steps kept so far, and those that were not: a layer was not called, or more than once."""
        self._caches = caches
        self._plans_all = all(cache.expert_map is None for cache in caches)
        """Whether the planners see all that is routed: under expert parallelism a rank's see its own experts."""
        self._with_weights = with_weights
        self._weights_of_step: list[list[_Noted]] = [[] for _ in caches]
        self._numbers: dict[str, int] = {}
        """Of requests that are served, by their names."""
        self._num_requests = 0
        self._step: list[list[_Noted]] = [[] for _ in caches]
        self._host_states = [cache.state.numpy() for cache in caches if not cache.on_device]
        self._stalled = 0
        self._begin_chunk()

    def note(self, number: int, topk_ids: torch.Tensor, rows: Rows, topk_weights: torch.Tensor) -> None:
        """Layer `number` of the card serves `topk_ids` and `topk_weights` (T, K). `rows`: which of them are tokens, as
        caches have it."""
        if isinstance(rows, int):
            self._step[number].append(compact(topk_ids.numpy()[:rows], self.card.num_experts[number]))
        else:
            self._step[number].append((topk_ids.clone(), rows.clone()))
        if self._with_weights:
            halved = topk_weights.to(torch.float16, copy=True)
            own: _Noted = halved.numpy()[:rows] if isinstance(rows, int) else (halved, rows.clone())
            self._weights_of_step[number].append(own)

    def forget(self, names: Iterable[str]) -> None:
        """These requests are finished. Whoever has such a name next is another one."""
        for name in names:
            self._numbers.pop(name, None)

    def end_step(self, prefilling: int, decoding: int, seconds: float, tokens: Sequence[tuple[str, int]] = ()) -> None:
        """Every layer has served the step. `tokens`: requests, in the order in which the step has their tokens, and how
        many; empty: not known. On a GPU this waits for the step."""
        step, self._step = self._step, [[] for _ in self._caches]
        noted, self._weights_of_step = self._weights_of_step, [[] for _ in self._caches]
        if not any(step):
            return
        ids = [self._ids_of_tokens(number, own[0]) for number, own in enumerate(step) if len(own) == 1]
        if len(ids) < len(step) or len({len(own) for own in ids}) != 1:
            self.num_dropped += 1
            return
        weights = [_of_tokens(own[0]) for own in noted if own]
        for layer, own_weights in zip(self._weights, weights, strict=self._with_weights):
            layer.append(own_weights)
        self._requests.append(self._requests_of(tokens, len(ids[0])))
        before, self._stalled = self._stalled, self._stall_ns()
        self._steps.append((len(ids[0]), prefilling, decoding, seconds, (self._stalled - before) * 1e-9))
        for layer, own in zip(self._ids, ids, strict=True):
            layer.append(own)
        self.num_steps += 1
        self._num_bytes += sum(own.nbytes for own in (*ids, *weights))
        if self._num_bytes >= CHUNK_BYTES or time.monotonic() > self._began + CHUNK_SECONDS:
            self.folder.write(self._chunk())
            self._begin_chunk()

    def finish(self) -> None:
        """Write what there is, and wait for it."""
        self.folder.close(self._chunk() if self._steps else None)

    def _begin_chunk(self) -> None:
        self._began, self._num_bytes = time.monotonic(), 0
        self._steps: list[tuple[int, int, int, float, float]] = []
        self._ids: list[list[NDArray[np.generic]]] = [[] for _ in self._caches]
        self._weights: list[list[NDArray[np.generic]]] = [[] for _ in self._caches]
        self._requests: list[NDArray[np.int32]] = []
        self._states = self._read_states()
        self._stalled = self._stall_ns()

    def _chunk(self) -> Trace:
        num_words = len(Words._fields)
        totals = np.stack([[state[:num_words] for state in states] for states in (self._states, self._read_states())])
        tokens, prefilling, decoding, seconds, stalls = zip(*self._steps, strict=True)
        return Trace(
            self.card,
            tokens=np.array(tokens, dtype=np.int32),
            prefilling=np.array(prefilling, dtype=np.int32),
            decoding=np.array(decoding, dtype=np.int32),
            seconds=np.array(seconds, dtype=np.float32),
            stalls=np.array(stalls, dtype=np.float32),
            ids=tuple(np.concatenate(own) for own in self._ids),
            states=self._states if self._plans_all else (),
            totals=totals if self._plans_all else None,
            requests=np.concatenate(self._requests),
            weights=tuple(np.concatenate(own).astype(np.float16, copy=False) for own in self._weights if own),
        )

    def _requests_of(self, tokens: Sequence[tuple[str, int]], num_tokens: int) -> NDArray[np.int32]:
        """Of each token of a step, the number of its request."""
        if sum(count for _, count in tokens) != num_tokens:
            return np.full(num_tokens, -1, dtype=np.int32)
        for name, _ in tokens:
            if name not in self._numbers:
                self._numbers[name] = self._num_requests
                self._num_requests += 1
        numbers = [self._numbers[name] for name, _ in tokens]
        return np.repeat(np.array(numbers, dtype=np.int32), [count for _, count in tokens])

    def _read_states(self) -> tuple[NDArray[np.int64], ...]:
        return tuple(cache.state.to("cpu", copy=True).numpy() for cache in self._caches)

    def _stall_ns(self) -> int:
        """0 on a GPU, where nothing is timed."""
        return sum(int(state[_STALL]) for state in self._host_states)

    def _ids_of_tokens(self, number: int, noted: _Noted) -> NDArray[np.generic]:
        """Compact, whether they were noted on the host or on a GPU."""
        return compact(_of_tokens(noted), self.card.num_experts[number])


def _of_tokens(noted: _Noted) -> NDArray[np.generic]:
    """(tokens, K), without padding."""
    if isinstance(noted, np.ndarray):
        return noted
    values, rows = (tensor.cpu().numpy() for tensor in noted)
    found: NDArray[np.generic] = values[rows >= 0]
    return found
