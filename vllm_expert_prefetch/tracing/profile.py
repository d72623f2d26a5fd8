"""A profile: how much each expert of each layer was needed, as a small JSON file. It warms the slots at start."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from vllm_expert_prefetch.config import ExpertPrefetchConfig
from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.trace import Trace, write_whole

FORMAT, FORMAT_VERSION = "vllm-expert-prefetch profile", 1
_REMEDY = "vllm-expert-prefetch simulate TRACE --write-profile FILE makes one"


@dataclass(frozen=True)
class Profile:
    """Of each layer, by its name: how many tokens chose each expert, or its place among those that a server held."""

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


def joined(profiles: Sequence[Profile]) -> Profile:
    """One of all stages of a pipeline. Raises TraceError for those of engines that have the same layers."""
    uses = {layer: own for profile in profiles for layer, own in profile.uses.items()}
    if len(uses) < sum(len(profile.uses) for profile in profiles):
        raise TraceError("several engines were recorded: make a profile of each, with simulate TRACE --write-profile")
    return Profile(profiles[0].model, uses)


def check_can_write(path: Path) -> None:
    """Raise TraceError where no profile can be written to `path`."""
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise TraceError(f"{path} cannot be written: name a file in a folder that exists and may be written to")


def write_profile(path: Path, profile: Profile) -> None:
    """Write it for this user alone; it is there when it is whole. Raises OSError."""
    write_whole(path, json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, **asdict(profile)}).encode())


def is_first_start(config: ExpertPrefetchConfig) -> bool:
    """Whether the profile to read is that which the server writes, and no server has ended yet."""
    return config.profile == config.write_profile and not Path(str(config.profile)).exists()


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
