"""A trace: which experts each layer's router chose, step by step, as served. Read from files and written to one.

A file is complete or not there, so that a recording that was interrupted ends with its last file. A folder of files
that follow each other is one trace.
"""

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.tracing.card import TraceCard, TraceError, card_of

SUFFIX = ".safetensors"
_STEPS = {"tokens": np.int32, "prefilling": np.int32, "decoding": np.int32, "seconds": np.float32, "stalls": np.float32}
"""One number for each step."""


@dataclass(frozen=True)
class Trace:
    """S steps of N tokens in all, in the order in which they were served."""

    card: TraceCard
    tokens: NDArray[np.int32]
    """(S): how many each step had."""
    prefilling: NDArray[np.int32]
    """(S): sequences in their prompt."""
    decoding: NDArray[np.int32]
    """(S): sequences beyond their first token."""
    seconds: NDArray[np.float32]
    """(S): what the step took; 0 where it was not timed."""
    stalls: NDArray[np.float32]
    """(S): of these seconds, waiting for records; 0 on a GPU, where nothing is timed."""
    ids: tuple[NDArray[np.generic], ...]
    """Of each layer (N, K): uint8 (255 for none) or int16 (-1 for none)."""
    states: tuple[NDArray[np.int64], ...] = ()
    """Of each layer: its planner's state when the recording began (csrc/residency.h). Empty: not known."""
    totals: NDArray[np.int64] | None = None
    """(2, L, W): the planners' words when the recording began and when it ended. None: not known."""
    requests: NDArray[np.int32] | None = None
    """(N): which request each token is of, counted from 0 in the recording; -1: not known. None: not recorded."""
    weights: tuple[NDArray[np.float16], ...] = ()
    """Of each layer (N, K): the gate weights of `ids`. Empty: not recorded."""

    def __len__(self) -> int:
        return len(self.tokens)

    def routed(self, layer: int) -> NDArray[np.int32]:
        """(N, K), -1 for none."""
        ids = self.ids[layer]
        wide = ids.astype(np.int32)
        return np.where(ids == 255, -1, wide).astype(np.int32) if ids.dtype == np.uint8 else wide

    @property
    def decodes(self) -> NDArray[np.bool_]:
        """(S): whether no sequence was in its prompt."""
        found: NDArray[np.bool_] = self.prefilling == 0
        return found

    def counted(self) -> list[Words] | None:
        """What the server itself counted for each layer while this was recorded; None where it is not known."""
        if self.totals is None:
            return None
        return [Words._make((after - before).tolist()) for before, after in zip(*self.totals, strict=True)]

    def last(self, num_steps: int) -> "Trace":
        """The last `num_steps` steps. What the caches held before them is not known."""
        first = max(0, len(self) - num_steps)
        start = int(self.tokens[:first].sum())
        cut = {name: getattr(self, name)[first:] for name in _STEPS}
        return replace(
            self,
            **cut,
            ids=tuple(ids[start:] for ids in self.ids),
            states=(),
            totals=None,
            requests=None if self.requests is None else self.requests[start:],
            weights=tuple(weights[start:] for weights in self.weights),
        )


def compact(ids: NDArray[np.generic], num_experts: int) -> NDArray[np.generic]:
    """`ids` (-1 for none) in the type that files have."""
    return ids.astype(np.uint8 if num_experts <= 255 else np.int16)


def tensors_of(trace: Trace) -> dict[str, NDArray[np.generic]]:
    """What one file holds, by name."""
    tensors: dict[str, NDArray[np.generic]] = {name: getattr(trace, name) for name in _STEPS}
    tensors |= {f"ids.{layer}": np.ascontiguousarray(ids) for layer, ids in enumerate(trace.ids)}
    tensors |= {f"state.{layer}": state for layer, state in enumerate(trace.states)}
    if trace.totals is not None:
        tensors["totals"] = trace.totals
    if trace.requests is not None:
        tensors["requests"] = trace.requests
    tensors |= {f"weights.{layer}": weights for layer, weights in enumerate(trace.weights)}
    return tensors


def write_trace(path: Path, trace: Trace, chunk: int = 1) -> int:
    """Write one file, for this user alone, which is there when it is whole. Returns its size in bytes.

    Raises OSError; what was begun is then removed.
    """
    from safetensors.numpy import save

    content = save(tensors_of(trace), trace.card.metadata(chunk))
    write_whole(path, content)
    return len(content)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file as `write_trace` does."""
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.rename(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def read_trace(path: Path) -> Trace:
    """The trace in a file, or in a folder: its files in their order.

    Raises TraceError for what is missing, damaged, of another format, or of more than one recording.
    """
    parts = [_read_file(file) for file in _files(path)]
    parts.sort(key=lambda part: part[1])
    for (first, number, file), (second, following, other) in itertools.pairwise(parts):
        if second.card.model != first.card.model:
            raise TraceError(f"{other} is of {second.card.model}, {file} of {first.card.model}: keep them apart")
        if second.card != first.card:
            raise TraceError(f"{other} and {file} are of different recordings: keep them apart")
        if following != number + 1:
            raise TraceError(f"{path}: there is file {number} and file {following}, what is between them is missing")
    return _joined([part for part, _, _ in parts])


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise TraceError(f"{path} is not there: give a trace, a file or a folder that vllm-expert-prefetch trace wrote")
    files = sorted(path.glob(f"*{SUFFIX}"))
    recordings = sorted({file.parent.name for file in path.glob(f"*/*{SUFFIX}")})
    if not files and len(recordings) == 1:
        return sorted((path / recordings[0]).glob(f"*{SUFFIX}"))
    if not files:
        found = f"{len(recordings)} recordings, give one of them: {', '.join(recordings)}" if recordings else "no trace"
        raise TraceError(f"{path} holds {found}")
    return files


def _read_file(path: Path) -> tuple[Trace, int, Path]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            card, chunk = card_of(file.metadata(), path)
            names = set(file.keys())
            steps = {name: file.get_tensor(name) for name in _STEPS}
            ids = tuple(file.get_tensor(f"ids.{layer}") for layer in range(card.num_layers))
            has_states = f"state.{card.num_layers - 1}" in names
            states = tuple(file.get_tensor(f"state.{layer}") for layer in range(card.num_layers) if has_states)
            totals = file.get_tensor("totals") if "totals" in names else None
            requests = file.get_tensor("requests") if "requests" in names else None
            has_weights = f"weights.{card.num_layers - 1}" in names
            weights = tuple(file.get_tensor(f"weights.{layer}") for layer in range(card.num_layers) if has_weights)
    except (SafetensorError, KeyError, OSError, ValueError) as error:
        raise TraceError(f"{path} is truncated or damaged ({error}): remove it, or record again") from error
    num_tokens = int(steps["tokens"].sum())
    of_tokens = [*ids, *weights, *([] if requests is None else [requests])]
    if any(len(own) != num_tokens for own in of_tokens) or len({len(own) for own in steps.values()}) != 1:
        raise TraceError(f"{path} is damaged: its layers and steps disagree about the number of tokens")
    if totals is not None and totals.shape[2] != len(Words._fields):
        states, totals = (), None  # a planner that counts other things
    found = Trace(card, **steps, ids=ids, states=states, totals=totals, requests=requests, weights=weights)
    return found, chunk, path


def _joined(parts: Sequence[Trace]) -> Trace:
    first, last = parts[0], parts[-1]
    if len(parts) == 1:
        return first
    totals = None
    if first.totals is not None and last.totals is not None:
        totals = np.stack([first.totals[0], last.totals[1]])
    steps = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _STEPS}
    ids = tuple(np.concatenate(own) for own in zip(*(part.ids for part in parts), strict=True))
    requests = [part.requests for part in parts if part.requests is not None]
    return Trace(
        first.card,
        **steps,
        ids=ids,
        states=first.states,
        totals=totals,
        requests=np.concatenate(requests) if len(requests) == len(parts) else None,
        weights=tuple(np.concatenate(own) for own in zip(*(part.weights for part in parts), strict=True)),
    )


def trace_of_steps(card: TraceCard, steps: Sequence[Sequence[Sequence[Sequence[int]]]], num_prompt: int = 0) -> Trace:
    """Steps that are not timed: of each step and layer, the experts of each token. The first `num_prompt` prefill.

    A token may have fewer experts than others.
    """
    prefilling = np.array([index < num_prompt for index in range(len(steps))], dtype=np.int32)
    tokens = np.array([max(map(len, step), default=0) for step in steps], dtype=np.int32)
    untimed = np.zeros(len(steps), dtype=np.float32)
    ids = []
    for layer, num_experts in enumerate(card.num_experts):
        rows = list(_padded(card.top_k[layer], layer, steps, tokens))
        ids.append(compact(np.array(rows, dtype=np.int32).reshape(-1, card.top_k[layer]), num_experts))
    return Trace(card, tokens, prefilling, np.where(prefilling, 0, tokens), untimed, untimed, tuple(ids))


def _padded(
    top_k: int, layer: int, steps: Sequence[Sequence[Sequence[Sequence[int]]]], tokens: NDArray[np.int32]
) -> Iterator[list[int]]:
    for step, num_tokens in zip(steps, tokens, strict=True):
        for experts in itertools.islice(itertools.chain(step[layer], itertools.repeat(())), int(num_tokens)):
            yield [*experts, *[-1] * (top_k - len(experts))]
