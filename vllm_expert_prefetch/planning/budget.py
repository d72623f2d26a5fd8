"""Whether a model fits: memory on each accelerator and on the host, by the arithmetic that the worker starts with."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.formats import other_bytes_per_parameter, row_bytes
from vllm_expert_prefetch.planning.model_files import Model
from vllm_expert_prefetch.planning.sizing import (
    GB,
    LayerShape,
    MemoryProfile,
    activation_bytes,
    areas_asked,
    cache_bytes,
    grow_cache,
    num_areas,
    size_cache,
)
from vllm_expert_prefetch.planning.timing import Machine

PAGE = 2 << 20
"""What CUDA maps at least."""
UTILIZATION = 0.9
"""`--gpu-memory-utilization` of the command that is recommended."""
_SHORTEST = 512
"""Tokens of a context below which none is recommended."""
BATCHED_TOKENS = 2048
"""Of the widest step, vLLM's default on GPUs below 80 GB."""


@dataclass(frozen=True)
class Ranks:
    """How a model is divided. `ep`: ranks that divide the experts of a layer instead of every expert."""

    tp: int = 1
    ep: int = 1
    pp: int = 1

    @property
    def number(self) -> int:
        """GPUs."""
        return self.tp * self.pp


ALONE = Ranks()


@dataclass(frozen=True)
class Load:
    """What is served at a time. `kv_element_bytes`: of a number in the KV cache."""

    context: int
    concurrency: int
    kv_element_bytes: float = 2.0


@dataclass(frozen=True)
class Budget:
    """Bytes of one rank, and slots of each of its MoE layers."""

    layers: tuple[LayerShape, ...]
    slots: tuple[int, ...]
    cache_bytes: int
    """Slots and overflow rows."""
    weights_bytes: int
    """That are no routed expert's."""
    activation_bytes: int
    kv_bytes: int
    requested_bytes: int
    """What vLLM may use."""
    experts_bytes: int
    """All experts of this rank, resident or not."""
    areas: int
    """Of overflow rows."""

    @property
    def record_bytes(self) -> int:
        """One expert of the first layer."""
        return sum(self.layers[0].row_bytes)

    @property
    def overflow_rows(self) -> int:
        """That the layers share."""
        return self.layers[0].num_experts - self.slots[0]

    @property
    def share(self) -> float:
        """Of the experts, with a slot."""
        return sum(self.slots) / sum(layer.num_experts for layer in self.layers)

    @property
    def fits_whole(self) -> bool:
        """Every expert has a slot: plain vLLM would do."""
        return self.share == 1


def layer_shapes(model: Model, ranks: Ranks, capability: int = 90) -> list[LayerShape]:
    """The MoE layers of one rank: from the headers of the checkpoint where they tell, else from its configuration."""
    architecture = model.architecture
    num_layers, size = -(-architecture.moe_layers // ranks.pp), architecture.expert_intermediate
    if ranks.ep == 1 and size % ranks.tp:
        raise ConfigError(
            f"experts of intermediate size {size} cannot be divided over {ranks.tp} GPUs: use "
            f"{max(number for number in range(1, ranks.tp) if size % number == 0)}"
        )
    if ranks.ep == 1 and (stored := model.stored_layers(ranks.tp)):
        return stored[:num_layers]
    if architecture.num_experts % ranks.ep:
        raise ConfigError(f"--ep {ranks.ep}: {architecture.num_experts} experts cannot be divided by it")
    num_experts = architecture.num_experts // ranks.ep
    rows = row_bytes(model.form, architecture, 1 if ranks.ep > 1 else ranks.tp, capability)
    return [LayerShape(num_experts, min(architecture.top_k, num_experts), rows)] * num_layers


def other_weights_bytes(model: Model, layers: list[LayerShape], ranks: Ranks) -> int:
    """Of one rank, beside routed experts: what the files take, else counted from the configuration."""
    architecture = model.architecture
    if model.total_bytes is not None and ranks == ALONE:
        return max(0, model.total_bytes - sum(layer.bytes for layer in layers))
    dense = architecture.dense_parameters * other_bytes_per_parameter(model.form)
    return (dense + 2 * architecture.embedding_parameters) // (ranks.tp * ranks.pp)


def make_budget(
    model: Model,
    machine: Machine,
    load: Load,
    ranks: Ranks = ALONE,
    config: ExpertPrefetchConfig | None = None,
    page: int = PAGE,
) -> Budget:
    """What each rank holds. `config`: a size that is given for the cache; None: all that is left.

    Raises ConfigError, with what is missing and the nearest setting that works, where not even the experts of one token
    fit beside everything else.
    """
    layers = layer_shapes(model, ranks, machine.capability)
    asked = areas_asked(config or ExpertPrefetchConfig(), on_gpu=True)
    fewest = size_cache(config or ExpertPrefetchConfig(), layers, page, grows=True, areas=asked)
    smallest = cache_bytes(layers, fewest, page, asked)
    weights, activations = other_weights_bytes(model, layers, ranks), _activations(model, load)
    kv = kv_bytes(model, load, ranks)
    requested = int(UTILIZATION * machine.memory_bytes)
    available = requested - weights - activations - smallest
    if available < kv:
        raise ConfigError(_too_little(model, machine, load, ranks, weights + activations + smallest))
    slots = fewest
    if config is None or not config.sizes_given:
        profile = MemoryProfile(requested, activations, available, smallest, max(1, kv // load.concurrency), kv)
        slots = grow_cache(layers, fewest, profile, page, asked)
    areas = num_areas(layers, slots, page, asked)
    taken = cache_bytes(layers, slots, page, areas)
    experts = sum(layer.bytes for layer in layers)
    return Budget(tuple(layers), tuple(slots), taken, weights, activations, kv, requested, experts, areas)


def kv_bytes(model: Model, load: Load, ranks: Ranks) -> int:
    """KV cache and states of `load.concurrency` sequences of `load.context` tokens on one rank."""
    one = model.architecture.sequence_bytes(load.context, load.kv_element_bytes, ranks.tp)
    return math.ceil(load.concurrency * one / ranks.pp)


def _activations(model: Model, load: Load) -> int:
    shape = model.architecture
    return activation_bytes(BATCHED_TOKENS, shape.hidden_size, load.concurrency, shape.vocab_size)


def _too_little(model: Model, machine: Machine, load: Load, ranks: Ranks, fixed: int) -> str:
    """What is missing, and what would do. `fixed`: bytes that do not depend on context and concurrency."""
    kv = kv_bytes(model, load, ranks)
    needed = (fixed + kv) / UTILIZATION
    ways = [f"--gpu-memory {math.ceil(needed / GB)}", *_smaller_loads(model, load, ranks, machine, fixed)]
    more = next((own for own in _more_ranks(model, ranks) if _fits(model, machine, load, own)), None)
    if more:
        ways.append(f"--ep {more.ep}" if more.ep > 1 else f"--tp {more.tp}")
    return (
        f"{model.name} needs {needed / GB:.1f} GB on each GPU, and there are {machine.memory_bytes / GB:.1f} GB, of "
        f"which vLLM may use {UTILIZATION:.0%}: {fixed / GB:.1f} GB for weights that are no experts, activations and "
        f"the experts of one token, {kv / GB:.1f} GB for the KV cache of {load.concurrency} x {load.context} tokens. "
        f"Try {' or '.join(ways)}"
    )


def _smaller_loads(model: Model, load: Load, ranks: Ranks, machine: Machine, fixed: int) -> Iterator[str]:
    """A shorter context, and fewer sequences, that fit."""
    room = UTILIZATION * machine.memory_bytes - fixed
    tokens = load.context
    while tokens > _SHORTEST and kv_bytes(model, replace(load, context=tokens), ranks) > room:
        tokens //= 2
    if kv_bytes(model, replace(load, context=tokens), ranks) <= room:
        yield f"--context {tokens}"
    fewer = int(room / max(1, kv_bytes(model, replace(load, concurrency=1), ranks)))
    if fewer > 0:
        yield f"--concurrency {fewer}"


def _more_ranks(model: Model, ranks: Ranks) -> Iterator[Ranks]:
    """Twice as many and more, by which the experts can be divided."""
    for factor in (2, 4, 8, 16):
        if ranks.ep > 1 and model.architecture.num_experts % (ranks.ep * factor) == 0:
            yield replace(ranks, tp=ranks.tp * factor, ep=ranks.ep * factor)
        elif ranks.ep == 1 and model.architecture.expert_intermediate % (ranks.tp * factor) == 0:
            yield replace(ranks, tp=ranks.tp * factor)


def _fits(model: Model, machine: Machine, load: Load, ranks: Ranks) -> bool:
    layers = layer_shapes(model, ranks, machine.capability)
    smallest = cache_bytes(layers, [layer.top_k for layer in layers], PAGE)
    fixed = other_weights_bytes(model, layers, ranks) + _activations(model, load) + smallest
    return fixed + kv_bytes(model, load, ranks) <= UTILIZATION * machine.memory_bytes
