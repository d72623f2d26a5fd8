"""Routing that other programs have recorded, as traces."""

import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vllm_expert_prefetch.tracing.card import TraceCard, TraceError
from vllm_expert_prefetch.tracing.trace import Trace, compact, trace_of_steps

_COLUMNS = "turn,phase,step,layer,slot,expert"


def import_routing(path: Path, model: str | None, num_experts: int | None, prompt_tokens: int, by_token: bool) -> Trace:
    """A trace of `path`: `.csv`, or `.npy` and `.npz` with the `routed_experts` that vLLM returns.

    `model` and `num_experts`: where the file does not say. `prompt_tokens`: of each request in an array, the first step
    of it. `by_token`: every token of a prompt is a step. Raises TraceError.
    """
    try:
        if path.suffix == ".csv":
            return read_csv(path, model, num_experts, by_token)
        if path.suffix in (".npy", ".npz"):
            return _read_arrays(path, model, num_experts, prompt_tokens, by_token)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise TraceError(f"{path} cannot be read: {error}") from error
    raise TraceError(f"{path}: only .csv, .npy and .npz are read")


def read_csv(path: Path, model: str | None = None, num_experts: int | None = None, by_token: bool = False) -> Trace:
    """Lines `turn,phase,step,layer,slot,expert,...` behind `#` comments: one expert of one token, phase 0 for prompts.

    The comments may say `model=`, `n_expert=`, `n_expert_used=` and for each layer `expert_bytes=`.
    """
    comments: list[str] = []
    turns: dict[int, tuple[dict[int, dict[int, list[int]]], ...]] = defaultdict(lambda: ({}, {}))
    with path.open() as file:
        for line in file:
            if line.startswith("#"):
                comments.append(line)
            elif not line.startswith("turn"):
                turn, phase, step, layer, _, expert = map(int, line.split(",", 6)[:6])
                turns[turn][phase].setdefault(step, {}).setdefault(layer, []).append(expert)
    tokens = [token for turn in turns.values() for steps in turn for token in steps.values()]
    if not tokens:
        raise TraceError(f"{path} holds no routing: expected lines {_COLUMNS},...")
    layers = sorted({layer for token in tokens for layer in token})
    head = "".join(comments)
    named = {name: re.search(rf"\b{name}=(\S+)", head) for name in ("model", "n_expert", "n_expert_used")}
    sizes = dict(re.findall(r"layer=(\d+) expert_bytes=(\d+)", head))
    counted = max(expert for token in tokens for own in token.values() for expert in own) + 1
    known = num_experts or (int(named["n_expert"][1]) if named["n_expert"] else counted)
    if counted > known:
        raise TraceError(f"{path} routes to expert {counted - 1}, of {known} experts: give --experts")
    top_k = max(len(own) for token in tokens for own in token.values())
    card = TraceCard(
        model=model or (named["model"][1] if named["model"] else path.stem),
        layers=tuple(map(str, layers)),
        num_experts=(known,) * len(layers),
        top_k=(top_k,) * len(layers),
        record_bytes=tuple(int(sizes.get(str(layer), 1)) for layer in layers),
        made_by=f"imported from {path.name}",
    )
    steps: list[list[list[list[int]]]] = []
    prompts: list[bool] = []
    requests: list[int] = []
    for number, phases in enumerate(turns.values()):
        for phase, own in enumerate(phases):
            rows = [[[token.get(layer, [])] for layer in layers] for _, token in sorted(own.items())]
            if phase == 0 and not by_token and rows:
                rows = [[[ids for token in rows for ids in token[at]] for at in range(len(layers))]]
            steps += rows
            prompts += [phase == 0] * len(rows)
            requests += [number] * len(rows)
    return _marked(trace_of_steps(card, steps), prompts, requests)


def _marked(trace: Trace, prompts: list[bool], requests: list[int]) -> Trace:
    """`requests`: of each step, the number of the one whose tokens it has."""
    prefilling = np.array(prompts, dtype=np.int32)
    numbers = np.repeat(np.array(requests, dtype=np.int32), trace.tokens)
    return replace(trace, prefilling=prefilling, decoding=1 - prefilling, requests=numbers)


def _read_arrays(path: Path, model: str | None, num_experts: int | None, prompt_tokens: int, by_token: bool) -> Trace:
    """One array (tokens, layers, top-k) for each request; requests follow each other."""
    if num_experts is None:
        raise TraceError(f"{path} does not say how many experts each layer has: give --experts")
    loaded = np.load(path, allow_pickle=False)
    requests: list[NDArray[np.int32]] = [loaded] if isinstance(loaded, np.ndarray) else [loaded[n] for n in loaded]
    shapes = {own.shape[1:] for own in requests}
    if len(shapes) != 1 or requests[0].ndim != 3:
        raise TraceError(f"{path}: expected arrays (tokens, layers, top-k) of one model, found {sorted(shapes)}")
    if max(int(own.max(initial=0)) for own in requests) >= num_experts:
        raise TraceError(f"{path} routes to more than {num_experts} experts: give --experts")
    (num_layers, top_k), tokens, prompts = shapes.pop(), [], []
    for own in requests:
        first = min(prompt_tokens, len(own))
        own_tokens = [1] * len(own) if by_token or not first else [first, *[1] * (len(own) - first)]
        prompts += [start < first for start in np.cumsum([0, *own_tokens[:-1]]).tolist()]
        tokens += own_tokens
    card = TraceCard(
        model=model or path.stem,
        layers=tuple(map(str, range(num_layers))),
        num_experts=(num_experts,) * num_layers,
        top_k=(top_k,) * num_layers,
        record_bytes=(1,) * num_layers,
        made_by=f"imported from {path.name}",
    )
    together = np.concatenate(requests)
    ids = tuple(compact(np.ascontiguousarray(together[:, layer]), num_experts) for layer in range(num_layers))
    untimed, prefilling = np.zeros(len(tokens), dtype=np.float32), np.array(prompts, dtype=np.int32)
    numbers = np.repeat(np.arange(len(requests), dtype=np.int32), [len(own) for own in requests])
    steps = np.array(tokens, dtype=np.int32), prefilling, 1 - prefilling, untimed, untimed
    return Trace(card, *steps, ids, requests=numbers)
