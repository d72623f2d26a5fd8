"""Drafts of speculative decoding: vLLM builds them with the target's settings, and they are left to it, but for experts
that `draft_experts` gives a cache of their own.

A draft model has a configuration of its own. An EAGLE or MTP head is built with its target's, and its MoE layers are of
the same class: only the model that is being loaded tells them apart.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError, config_of_draft

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.draft_worker import DraftWorker

_is_being_built = False
_worker: "DraftWorker | None" = None
_with_a_worker: set[int] = set()
"""Ids of vLLM's SpeculativeConfig whose target's worker is in this process: what is configured with one later is for
the draft."""


@contextmanager
def building(is_draft: bool, worker: "DraftWorker | None" = None) -> Iterator[None]:
    """Within, MoE layers that are made belong to a draft, if `is_draft`: to its `worker`, or without one vLLM's own."""
    global _is_being_built, _worker
    before, (_is_being_built, _worker) = (_is_being_built, _worker), (is_draft, worker)
    try:
        yield
    finally:
        _is_being_built, _worker = before


def is_being_built() -> bool:
    """Whether this process builds a draft at the moment."""
    return _is_being_built


def worker_being_built() -> "DraftWorker | None":
    """Of the draft that this process builds; None where its experts are left to vLLM."""
    return _worker


@contextmanager
def naming_the_remedy(vllm_config: Any, model_config: Any) -> Iterator[None]:
    """Around the loading of a model: ConfigError where there is no memory for it and it is the draft of ours."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        if config_of_draft(vllm_config, model_config) is None:
            raise
        raise ConfigError(
            f"{CONFIG_KEY}: there is no memory left for the draft: {error}. Where it has experts, set draft_experts to "
            "the share of them that gets a slot, 0.25 for example; else make the target's cache smaller"
        ) from error


def worker_begins(vllm_config: Any) -> None:
    """The worker of a target is made in this process, whose configuration was checked where flags are read."""
    speculative = vllm_config.speculative_config
    if speculative is not None and id(speculative) not in _with_a_worker:
        _with_a_worker.add(id(speculative))
        weakref.finalize(speculative, _with_a_worker.discard, id(speculative))


def is_for_a_draft(vllm_config: Any) -> bool:
    """Whether vLLM makes this configuration to build a draft with, or a part of one."""
    return _is_being_built or id(getattr(vllm_config, "speculative_config", None)) in _with_a_worker


def check_shares_no_experts(runner: Any) -> None:
    """Raise ConfigError where the draft of vLLM's model `runner` computes with experts of the target."""
    from vllm_expert_prefetch.serving.compat import moe_layers_of

    drafter = getattr(runner, "drafter", None) or getattr(runner, "speculator", None)
    model = getattr(drafter, "model", None)
    if model is None:
        return
    cached = [layer for layer in moe_layers_of(runner.get_model()) if layer.cache is not None]
    rows = {_address(weight) for layer in cached for weight in _weights(layer)}
    for layer in moe_layers_of(model):
        if any(_address(weight) in rows for weight in _weights(layer)):
            raise ConfigError(
                f"{CONFIG_KEY}: the draft's {layer.layer_name} has the experts of the target, which it would read past "
                "the cache: drop --speculative-config, or choose a draft with weights of its own"
            )


def _weights(layer: Any) -> Iterator[Any]:
    for name in ("w13_weight", "w2_weight"):
        weight = getattr(layer, name, None)
        if weight is not None and weight.numel():
            yield weight


def _address(weight: Any) -> int:
    return int(weight.untyped_storage().data_ptr())
