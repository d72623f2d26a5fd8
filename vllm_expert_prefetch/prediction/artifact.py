"""What calibration leaves for serving: a directory with `predictor.safetensors` and `card.json`."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vllm_expert_prefetch.prediction.defaults import DefaultVectors
from vllm_expert_prefetch.prediction.estimator import Estimator, EstimatorShape

FORMAT = 2
TENSORS = "predictor.safetensors"
CARD = "card.json"
_ESTIMATOR = "estimator."


class ArtifactError(RuntimeError):
    """The artifact cannot be used; the message says why and what to do."""


@dataclass(frozen=True)
class Card:
    """Everything about an artifact that is not a tensor. Layers are numbers among the MoE layers."""

    model: str
    fingerprint: str
    """`gates.fingerprint` of the model that was calibrated."""
    layers: list[str]
    depth: int
    """Guesses of 1 to so many layers ahead."""
    versions: dict[str, str]
    data: dict[str, Any]
    """Hash and size of the text, and how it was split."""
    over_fetch: int
    recall: dict[str, list[list[float] | None]]
    """Predictor -> per target layer, one layer ahead, [recall@k, recall@(k + over_fetch), missing gate mass of the
    first k], or None where it has no guess."""
    recall_ahead: dict[str, list[float]] = field(default_factory=dict)
    """Predictor -> mean recall@k, 1 to `depth` layers ahead."""
    hybrid: list[list[str]] = field(default_factory=list)
    """For 1 to `depth` layers ahead, and per source layer, the predictor that the hybrid uses."""
    allow_list: list[int] = field(default_factory=list)
    """Target layers that speculative execution may touch."""
    guard: dict[str, Any] | None = None
    """How these were chosen: `candidates`, the most promising first, and what was measured."""
    estimator: dict[str, Any] | None = None
    """`m`, `n`, `default_vectors` and the training record."""
    tensors: dict[str, Any] = field(default_factory=dict)
    """`sha256` and `bytes` of the tensor file; filled in on saving."""
    format: int = FORMAT


@dataclass(frozen=True)
class Artifact:
    """`frequency` (num_layers, E), `transition` (num_layers, E, E), both float32; see `baselines`."""

    card: Card
    defaults: DefaultVectors | None
    frequency: torch.Tensor
    transition: torch.Tensor
    estimator: Estimator | None = None

    def with_card(self, **changes: Any) -> "Artifact":
        """The same with other entries in its card."""
        return replace(self, card=replace(self.card, **changes))

    def on(self, device: torch.device) -> "Artifact":
        """The same, every tensor on `device`; the estimator itself moves there."""
        return Artifact(
            self.card,
            None if self.defaults is None else self.defaults.to(device),
            self.frequency.to(device),
            self.transition.to(device),
            None if self.estimator is None else self.estimator.to(device),
        )


def save_artifact(artifact: Artifact, directory: Path) -> None:
    """Write both files; the card last, so that a directory with a card is complete."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / CARD).unlink(missing_ok=True)
    tensors = {"frequency": artifact.frequency, "transition": artifact.transition}
    if artifact.defaults is not None:
        tensors |= {"defaults": artifact.defaults.vectors, "scales": artifact.defaults.scales}
    if artifact.estimator is not None:
        tensors |= {_ESTIMATOR + name: value for name, value in artifact.estimator.state_dict().items()}
    path = directory / TENSORS
    _replace(path, lambda to: save_file({name: t.contiguous() for name, t in tensors.items()}, to))
    described = asdict(artifact.card) | {"tensors": {"sha256": _sha256(path), "bytes": path.stat().st_size}}
    _replace(directory / CARD, lambda to: to.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8"))


def load_artifact(directory: Path, model_fingerprint: str | None = None) -> Artifact:
    """Read an artifact. With `model_fingerprint`, it must have been made for that model.

    Raises ArtifactError when it is missing, damaged, of a newer format or of another model.
    """
    card = load_card(directory)
    if model_fingerprint is not None and card.fingerprint != model_fingerprint:
        raise ArtifactError(
            f"artifact {directory} was made for another model: {card.model}, whose gate weights have the fingerprint "
            f"{card.fingerprint[:12]}; this model's is {model_fingerprint[:12]}. Calibrate this model"
        )
    path = directory / TENSORS
    if not path.is_file() or path.stat().st_size != card.tensors.get("bytes"):
        found = f"{path.stat().st_size} bytes" if path.is_file() else "missing"
        raise ArtifactError(
            f"artifact {directory} is damaged: {TENSORS} is {found}, expected {card.tensors.get('bytes')} bytes. "
            "Copy it again, or calibrate again"
        )
    if _sha256(path) != card.tensors.get("sha256"):
        raise ArtifactError(f"artifact {directory} is damaged: {TENSORS} does not have the hash that {CARD} gives")
    try:
        tensors = load_file(path)
        defaults = DefaultVectors(tensors["defaults"], tensors["scales"]) if "defaults" in tensors else None
        return Artifact(card, defaults, tensors["frequency"], tensors["transition"], _estimator(card, tensors))
    except (SafetensorError, KeyError, RuntimeError, TypeError) as error:
        raise ArtifactError(f"artifact {directory} is damaged: {error}") from error


def load_card(directory: Path) -> Card:
    """What an artifact says of itself. Raises ArtifactError when it is missing, damaged or of a newer format."""
    path = directory / CARD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            f"no artifact at {directory}: there is no {CARD}. vllm-expert-prefetch calibrate makes one"
        ) from None
    except (OSError, ValueError) as error:
        raise ArtifactError(f"artifact {directory} is damaged: {CARD} cannot be read ({error})") from error
    version = values.get("format") if isinstance(values, dict) else None
    if not isinstance(version, int):
        raise ArtifactError(f"{path} is not the card of an artifact: it has no format number")
    if version > FORMAT:
        raise ArtifactError(
            f"artifact {directory} has format {version}, newer than the {FORMAT} that this version of "
            "vllm-expert-prefetch reads: install a newer version, or calibrate again"
        )
    if version == 1:
        values = _of_format_1(directory, values)
    try:
        return Card(**values)
    except TypeError as error:
        raise ArtifactError(f"artifact {directory} is damaged: {CARD}: {error}") from error


def _of_format_1(directory: Path, values: dict[str, Any]) -> dict[str, Any]:
    """What a card of format 1, which spoke of one distance, says in this one's words."""
    if values.get("distance") != 1:
        raise ArtifactError(
            f"artifact {directory} has format 1 and speaks of {values.get('distance')} layers ahead alone: calibrate "
            "again"
        )
    kept = {name: value for name, value in values.items() if name != "distance"}
    return kept | {"depth": 1, "hybrid": [values["hybrid"]] if values.get("hybrid") else [], "format": FORMAT}


def _estimator(card: Card, tensors: dict[str, torch.Tensor]) -> Estimator | None:
    if card.estimator is None:
        return None
    state = {name.removeprefix(_ESTIMATOR): t for name, t in tensors.items() if name.startswith(_ESTIMATOR)}
    shape = EstimatorShape(
        hidden_size=state["reduce.weight"].shape[1],
        num_experts=state["logits.weight"].shape[0],
        num_sources=state["layer.weight"].shape[0],
        m=card.estimator["m"],
        n=card.estimator["n"],
    )
    estimator = Estimator(shape)
    estimator.load_state_dict(state)
    return estimator


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _replace(path: Path, write: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    write(partial)
    partial.chmod(0o644)
    os.replace(partial, path)
