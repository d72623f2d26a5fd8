"""Writes the profile of the experts that a worker's slots hold: when it ends, and before, as it may be killed."""

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from vllm_expert_prefetch.cache.base import LayerCache, by_hotness
from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.tracing.profile import Profile, write_profile

SECONDS = 60
"""Between two writes while steps are served."""
_STEPS = Words._fields.index("steps")
_logger = logging.getLogger("vllm.expert_prefetch")


class ProfileWriter:
    """Called by the thread that serves, which waits for the disk at the end alone. Before anything was served, nothing
    is written."""

    def __init__(self, path: Path, model: str, caches: Mapping[str, LayerCache]) -> None:
        """`caches`: of each layer, by its name."""
        self._path, self._model, self._caches = path, model, caches
        self._numbers = {name: _numbers(cache) for name, cache in caches.items()}
        self._due = time.monotonic() + SECONDS

    def step_ended(self) -> None:
        """A step is over, the next one has not begun."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + SECONDS
            threading.Thread(target=self._write, args=(self._states(),), daemon=True).start()

    def close(self) -> None:
        """The worker ends."""
        self._write(self._states())

    def _states(self) -> dict[str, torch.Tensor]:
        return {name: cache.state.to("cpu", copy=True) for name, cache in self._caches.items()}

    def _write(self, states: Mapping[str, torch.Tensor]) -> None:
        if not any(state[_STEPS] for state in states.values()):
            return
        uses = {name: _places(self._numbers[name], state) for name, state in states.items()}
        try:
            write_profile(self._path, Profile(self._model, uses))
        except OSError as error:
            _logger.warning("expert_prefetch: write_profile: %s: %s", self._path, error.strerror)


def _numbers(cache: LayerCache) -> list[int]:
    """Of every expert that the router knows, its number on this rank; -1 for those of others."""
    return [*range(cache.num_experts)] if cache.expert_map is None else cache.expert_map[:-1].tolist()


def _places(numbers: list[int], state: torch.Tensor) -> list[int]:
    """Of every expert of `numbers`, its place among this rank's, from 1 on, the hottest last; 0 for others."""
    place = {number: place for place, number in enumerate(by_hotness(state), 1)}
    return [place.get(number, 0) for number in numbers]
