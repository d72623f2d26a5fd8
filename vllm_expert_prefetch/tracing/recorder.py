"""Notes what every layer serves, and hands complete files to a thread that writes them."""

import time
from collections.abc import Sequence

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

    A step is kept when every layer has served it once. Nothing here waits for the disk.
    """

    def __init__(self, caches: Sequence[LayerCache], card: TraceCard, folder: TraceFolder) -> None:
        self.card, self.folder = card, folder
        self.num_steps = self.num_dropped = 0
        """Steps kept so far, and those that were not: a layer was not called, or more than once."""
        self._caches = caches
        self._step: list[list[_Noted]] = [[] for _ in caches]
        self._host_states = [cache.state.numpy() for cache in caches if not cache.on_device]
        self._stalled = 0
        self._begin_chunk()

    def note(self, number: int, topk_ids: torch.Tensor, rows: Rows) -> None:
        """Layer `number` of the card serves `topk_ids` (T, K). `rows`: which of them are tokens, as caches have it."""
        if isinstance(rows, int):
            self._step[number].append(compact(topk_ids.numpy()[:rows], self.card.num_experts[number]))
        else:
            self._step[number].append((topk_ids.clone(), rows.clone()))

    def end_step(self, prefilling: int, decoding: int, seconds: float) -> None:
        """Every layer has served the step. On a GPU this waits for it."""
        step, self._step = self._step, [[] for _ in self._caches]
        if not any(step):
            return
        ids = [self._ids_of_tokens(number, own[0]) for number, own in enumerate(step) if len(own) == 1]
        if len(ids) < len(step) or len({len(own) for own in ids}) != 1:
            self.num_dropped += 1
            return
        before, self._stalled = self._stalled, self._stall_ns()
        self._steps.append((len(ids[0]), prefilling, decoding, seconds, (self._stalled - before) * 1e-9))
        for layer, own in zip(self._ids, ids, strict=True):
            layer.append(own)
        self.num_steps += 1
        self._num_bytes += sum(own.nbytes for own in ids)
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
            states=self._states,
            totals=totals,
        )

    def _read_states(self) -> tuple[NDArray[np.int64], ...]:
        return tuple(cache.state.to("cpu", copy=True).numpy() for cache in self._caches)

    def _stall_ns(self) -> int:
        """0 on a GPU, where nothing is timed."""
        return sum(int(state[_STALL]) for state in self._host_states)

    def _ids_of_tokens(self, number: int, noted: _Noted) -> NDArray[np.generic]:
        if isinstance(noted, np.ndarray):
            return noted
        ids, rows = (tensor.cpu().numpy() for tensor in noted)
        return compact(ids[rows >= 0], self.card.num_experts[number])
