"""What there is to know of a model before its weights are downloaded: a name, a config.json, an index, a folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.planning.architecture import Architecture, read_architecture
from vllm_expert_prefetch.planning.checkpoint import read_layer_shapes
from vllm_expert_prefetch.planning.facts import find_model, load_facts, nearest
from vllm_expert_prefetch.planning.formats import FORMATS, format_of
from vllm_expert_prefetch.planning.sizing import LayerShape


@dataclass(frozen=True)
class Model:
    """A model and the format that is planned for."""

    name: str
    """For messages."""
    serve: str
    """What `vllm serve` takes."""
    architecture: Architecture
    form: str
    formats: Mapping[str, str] = field(default_factory=dict)
    """Other formats that were published, and where."""
    source: str = ""
    total_bytes: int | None = None
    """Of all weights, where an index or the files say it."""
    folder: Path | None = None
    """Of a checkpoint that is here."""

    def stored_layers(self, num_ranks: int) -> list[LayerShape]:
        """The MoE layers as the safetensors headers tell; empty where they do not."""
        if self.folder is None or self.form != "bf16":
            return []
        architecture = self.architecture
        return read_layer_shapes(self.folder, range(len(architecture.attention)), architecture.top_k, 2, num_ranks)


def find(name: str, quantization: str | None = None) -> Model:
    """`name`: of a well-known model or its repository, a config.json, an index, or a folder.

    `quantization`: the format to plan for; None: the checkpoint's own. Raises ConfigError, with the nearest names, for
    what cannot be found.
    """
    if quantization is not None and quantization not in FORMATS:
        raise ConfigError(f"--quantization {quantization} is not known: {', '.join(FORMATS)}")
    path = Path(name)
    if path.exists() or path.suffix == ".json":
        return _of_path(path, quantization)
    known = find_model(name)
    if known is None:
        return _of_hub_cache(name, quantization)
    model, form = known
    form = quantization or form
    if form not in model.formats and form not in ("fp8-channel", "int8"):
        raise ConfigError(
            f"no {form} checkpoint of {model.name} is known: {', '.join(model.formats)} are, fp8-channel and int8 are "
            "made by vLLM while it loads 16 bits. Give the config.json of the one you mean"
        )
    repository = model.formats.get(form) or model.formats.get("bf16")
    if repository is None:
        raise ConfigError(f"--quantization {form} is made of 16 bits, which {model.name} is not published in")
    architecture = read_architecture(model.config)
    return Model(model.name, repository, architecture, form, model.formats, model.source)


def _of_path(path: Path, quantization: str | None) -> Model:
    folder = path if path.is_dir() else path.parent
    config_file = path if path.is_file() and not path.name.endswith(".index.json") else folder / "config.json"
    if not config_file.is_file():
        raise ConfigError(f"{config_file} is missing: planning needs it, and no weights")
    config = _read_json(config_file)
    index = path if path.name.endswith(".index.json") else folder / "model.safetensors.index.json"
    total = _read_json(index).get("metadata", {}).get("total_size") if index.is_file() else None
    files = list(folder.glob("*.safetensors"))
    if total is None and len(files) == 1 and path.is_dir():
        total = files[0].stat().st_size
    own = format_of(config) if quantization is None else quantization
    is_own = quantization is None or quantization == _format_or_none(config)
    name = folder.resolve().name
    return Model(
        name=name,
        serve=str(folder) if files else name,
        architecture=read_architecture(config),
        form=own,
        source=str(config_file),
        total_bytes=int(total) if total and is_own and "num_nextn_predict_layers" not in config else None,
        folder=folder if files else None,
    )


def _of_hub_cache(name: str, quantization: str | None) -> Model:
    """A repository whose config.json was downloaded before."""
    if name.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            model = _of_path(Path(found), quantization)
            return Model(**{**vars(model), "name": name, "serve": name})
    names = [other for model in load_facts().models for other in (model.name, *model.also)]
    raise ConfigError(
        f"{name} is not known; did you mean {nearest(name, names)}? plan --list shows all. Of any other model give "
        "its config.json, or the folder that holds it"
    )


def _format_or_none(config: Mapping[str, Any]) -> str | None:
    try:
        return format_of(config)
    except ConfigError:
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} holds no JSON object")
    return found
