"""Recorded windows on disk: one file each, so that an interrupted calibration goes on where it was."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file

from vllm_expert_prefetch.calibration import CalibrationError
from vllm_expert_prefetch.prediction import Gate, Signals
from vllm_expert_prefetch.prediction.defaults import DefaultSums

_STATE = "state.json"
_SAVE_EVERY = 16
"""Windows between two saves of the running sums."""

Progress = Callable[[str, int, int], None]
"""(what, done, of how many)."""


class Engine(Protocol):
    """What runs the model: `studies.recording.RecordingEngine`, or a stand-in for tests."""

    @property
    def gates(self) -> list[Gate]: ...

    def tokenize(self, text: str) -> list[int]: ...

    def record(self, tokens: Sequence[int], defaults: DefaultSums | None = None) -> list[Signals]: ...


class Recordings:
    """The directory. Window i holds the signals of every MoE layer for its tokens."""

    def __init__(self, directory: Path, key: dict[str, Any]) -> None:
        """`key` says what is recorded; a directory with another key is started afresh."""
        self.directory = directory
        state = directory / _STATE
        if not state.is_file() or json.loads(state.read_text(encoding="utf-8")) != key:
            if directory.exists() and not state.is_file() and any(directory.iterdir()):
                raise CalibrationError(f"{directory} is needed for recordings and holds something else; move it away")
            self.remove()
            directory.mkdir(parents=True)
            state.write_text(json.dumps(key), encoding="utf-8")

    def remove(self) -> None:
        if self.directory.exists():
            shutil.rmtree(self.directory)

    def load(self, number: int) -> list[Signals]:
        """The signals of window `number`, one entry per MoE layer."""
        tensors = load_file(self._path(number))
        return [
            Signals(*(tensors[name][layer] for name in Signals._fields)) for layer in range(len(tensors["topk_ids"]))
        ]

    def fill(
        self,
        engine: Engine,
        windows: Sequence[Sequence[int]],
        num_training: int,
        sums: DefaultSums | None,
        tell: Progress,
    ) -> None:
        """Record what is missing. The first `num_training` windows also go into `sums`."""
        done = self._restore(sums)
        for number in range(done, len(windows)):
            tell("recording", number, len(windows))
            self._save(number, engine.record(windows[number], sums if number < num_training else None))
            if (number + 1) % _SAVE_EVERY == 0 or number + 1 == len(windows):
                self._save_progress(number + 1, sums)
        tell("recording", len(windows), len(windows))

    def _path(self, number: int) -> Path:
        return self.directory / f"window-{number:06d}.safetensors"

    def _save(self, number: int, signals: list[Signals]) -> None:
        fields = zip(Signals._fields, zip(*signals, strict=True), strict=True)
        _save(self._path(number), {name: torch.stack(values) for name, values in fields})

    def _save_progress(self, done: int, sums: DefaultSums | None) -> None:
        tensors = {"done": torch.tensor(done)} | ({} if sums is None else sums.state())
        _save(self.directory / "progress.safetensors", tensors)

    def _restore(self, sums: DefaultSums | None) -> int:
        path = self.directory / "progress.safetensors"
        if not path.is_file():
            return 0
        tensors = load_file(path)
        if sums is not None:
            sums.restore(tensors)
        return int(tensors["done"])


class Split:
    """Some windows of the recordings, in order."""

    def __init__(self, recordings: Recordings, numbers: range) -> None:
        self._recordings = recordings
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[Signals]]:
        return map(self._recordings.load, self.numbers)

    def __getitem__(self, index: int) -> list[Signals]:
        return self._recordings.load(self.numbers[index])


def _save(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)
