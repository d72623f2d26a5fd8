"""A profile: how often each expert of each layer was needed, as a small JSON file. It warms the slots at start."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.trace import Trace

FORMAT, FORMAT_VERSION = "vllm-expert-prefetch profile", 1
_REMEDY = "vllm-expert-prefetch simulate TRACE --write-profile FILE makes one"


@dataclass(frozen=True)
class Profile:
    """Of each recorded layer, by its name: how many tokens chose each expert."""

    model: str
    uses: dict[str, list[int]]

    def hottest(self, layer: str, num_experts: int, count: int) -> list[int]:
        """The `count` experts of `layer` that were chosen most, the most chosen last. Raises TraceError."""
        uses = self.uses.get(layer)
        if uses is None or len(uses) != num_experts:
            found = "nothing" if uses is None else f"{len(uses)} experts"
            raise TraceError(f"the profile of {self.model} says {found} of layer {layer}, which has {num_experts}")
        return sorted(range(num_experts), key=lambda expert: (uses[expert], -expert))[num_experts - count :]


def profile_of(trace: Trace) -> Profile:
    """What the tokens of decode steps chose; of all steps, where there is none."""
    is_counted = np.repeat(trace.decodes if trace.decodes.any() else ~trace.decodes, trace.tokens)
    uses = {}
    for layer, name in enumerate(trace.card.layers):
        ids = trace.routed(layer)[is_counted]
        uses[name] = np.bincount(ids[ids >= 0], minlength=trace.card.num_experts[layer]).tolist()
    return Profile(trace.card.model, uses)


def write_profile(path: Path, profile: Profile) -> None:
    """Write it for this user alone. Raises OSError."""
    text = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(profile)})
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)


def read_profile(path: Path, model: str) -> Profile:
    """The profile in `path`, which must be of `model`: a name, or a folder of that name. Raises TraceError."""
    try:
        found = json.loads(path.read_text())
        kind, version = found["format"], found["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{path} is no profile ({error}): {_REMEDY}") from error
    if kind != FORMAT or version != FORMAT_VERSION:
        raise TraceError(f"{path} is {kind} {version}, this version reads {FORMAT} {FORMAT_VERSION}: {_REMEDY}")
    if Path(found["model"]).name != Path(model).name:
        raise TraceError(f"{path} was recorded of {found['model']}, and {model} is served: {_REMEDY}")
    return Profile(found["model"], found["uses"])
