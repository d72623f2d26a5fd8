"""From the configuration and the model's router gates to look-ahead, or to the reason why there is none."""

from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_expert_prefetch.cache.base import Caches
from vllm_expert_prefetch.config import (
    AUTO,
    BROKEN_GRAPHS,
    CONFIG_KEY,
    MOST_LOOKAHEAD_LAYERS,
    OFF,
    SPECULATIVE,
    ConfigError,
    ExpertPrefetchConfig,
)
from vllm_expert_prefetch.lookahead.after import LookAhead
from vllm_expert_prefetch.prediction import (
    Artifact,
    ArtifactError,
    Card,
    Gate,
    Ingredients,
    Predictor,
    create_predictor,
    fingerprint,
    load_artifact,
    with_next_token,
)

_AUTO_ON_GPU = 2
"""In the replay of docs/log.md two layers give most of what four give; each costs launches beside the kernels."""


def why_not(config: ExpertPrefetchConfig, num_layers: int, caches: Caches | None, breaks_graphs: bool) -> str | None:
    """Why this worker does not look ahead; None when it does. `caches`: None where every expert is resident.

    Raises ConfigError where what was asked for cannot be.
    """
    if config.prefetch == OFF:
        return "off"
    reason, speculates = None, config.execution == SPECULATIVE
    if caches is None:
        reason = "every expert has a slot"
    elif caches.on_device and breaks_graphs:
        reason = BROKEN_GRAPHS
    check_distance(config, num_layers, "MoE layers")
    if reason and speculates:
        raise ConfigError(f"{CONFIG_KEY}: execution is speculative and cannot be: {reason}. Set execution to exact")
    if reason and config.prefetch == "on" and caches is not None:
        raise ConfigError(f"{CONFIG_KEY}: prefetch is on and cannot be: {reason}. Set prefetch to auto or off")
    has_link = caches is not None and (caches.on_device or caches.link is not None)
    if reason is None and config.prefetch == AUTO and not has_link and not speculates:
        reason = "there is no link to hide: records are copied within host memory"
    return f"off: {reason}" if reason else None


def depth_of(config: ExpertPrefetchConfig, num_layers: int, on_device: bool) -> int:
    """How many layers ahead guesses are, at most."""
    if isinstance(config.lookahead_layers, int):
        return config.lookahead_layers
    return max(1, min(_AUTO_ON_GPU if on_device else MOST_LOOKAHEAD_LAYERS, num_layers - 1))


def check_distance(config: ExpertPrefetchConfig, num_layers: int, what: str) -> None:
    """Raise ConfigError where `lookahead_layers` reaches beyond the model's `num_layers`, which are `what`."""
    if isinstance(config.lookahead_layers, int) and config.lookahead_layers >= max(num_layers, 2):
        raise ConfigError(
            f"{CONFIG_KEY}: lookahead_layers is {config.lookahead_layers} and the model has {num_layers} {what}: "
            f"set it to {max(num_layers - 1, 1)} at most, or prefetch to off"
        )


def check_hybrid(config: ExpertPrefetchConfig, card: Card) -> None:
    """Raise ArtifactError where the predictor `hybrid` was asked for, and the artifact with this card has none."""
    if config.predictor == "hybrid" and not card.hybrid:
        raise ArtifactError(
            f"artifact {config.artifact} holds no hybrid: calibrate again, or set predictor to {AUTO}, which takes "
            "what is there"
        )


def create_look_ahead(
    config: ExpertPrefetchConfig,
    gates: Sequence[Gate],
    caches: Caches,
    link_bytes_per_second: float,
    device: torch.device,
    preloads: bool = False,
) -> LookAhead:
    """The look-ahead of a model with these router gates, one per MoE layer; `preloads`: as LookAhead has it. Raises
    ArtifactError."""
    predictors, artifact = choose_predictors(config, gates, caches.depth)
    speculates = config.execution == SPECULATIVE and artifact is not None
    allowed = allowed_layers(artifact.card, len(gates)) if speculates and artifact is not None else frozenset()
    forced = config.prefetch == "on"
    return LookAhead(predictors, caches, config.over_fetch, forced, link_bytes_per_second, device, allowed, preloads)


def allowed_layers(card: Card, num_layers: int) -> frozenset[int]:
    """The layers that may execute their guess: those of the artifact's allow list, never the first nor the last one."""
    return frozenset(layer for layer in card.allow_list if 0 < layer < num_layers - 1)


def choose_predictors(
    config: ExpertPrefetchConfig, gates: Sequence[Gate], depth: int
) -> tuple[list[Predictor], Artifact | None]:
    """The predictor that the configuration names, or the artifact found best, for distances 1 to `depth`, and the
    artifact. Farther ahead than a predictor reaches, the router predicts."""
    artifact = None
    if config.artifact:
        artifact = load_artifact(Path(config.artifact), fingerprint(gates)).on(gates[0].weight.device)
        check_hybrid(config, artifact.card)
    name = config.predictor
    if name == AUTO:
        name = "hybrid" if artifact is not None and artifact.card.hybrid else "router"
    reaches = {"router": depth, "previous": depth, "transition": 1}.get(name, artifact.card.depth if artifact else 1)
    predictors = []
    for distance in range(1, depth + 1):
        ingredients = Ingredients(gates, artifact, distance)
        predictor = create_predictor(name if distance <= reaches else "router", ingredients)
        if artifact is not None and distance == 1 and not predictor.crosses_tokens:
            predictor = with_next_token(predictor, create_predictor("transition", ingredients))
        predictors.append(predictor)
    return predictors, artifact
