"""Facts that ship with the package: well-known models, GPUs, links and measured hit rates, each with its source."""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, TypeVar

from vllm_expert_prefetch.config import ConfigError

LINK_SHARE = 0.8
"""Of a link's nominal rate that the gather kernel reached: 51.2 of 64 GB/s, PCIe 5.0 x16, H100 (docs/gpu-check.md)."""


@dataclass(frozen=True)
class KnownModel:
    """A published model."""

    name: str
    formats: dict[str, str]
    """Format of the experts -> repository; the first one is what `name` means."""
    config: dict[str, Any]
    """What planning reads of its config.json, in that file's own words."""
    source: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """Bandwidth in GB/s (10^9 bytes), dense BF16 TFLOPS (None: not known), compute capability as 89 for 8.9."""

    name: str
    memory_bytes: int
    bandwidth_gbps: float
    bf16_tflops: float | None
    capability: int
    link: str
    source: str
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Link:
    """One direction, GB/s."""

    name: str
    nominal_gbps: float
    source: str

    @property
    def gbps(self) -> float:
        """What copies can be expected to reach."""
        return LINK_SHARE * self.nominal_gbps


@dataclass(frozen=True)
class Recording:
    """Hit rates of one sequence by share of experts with a slot, measured on recorded routing."""

    name: str
    num_experts: int
    top_k: int
    shares: tuple[float, ...]
    hit_rates: tuple[float, ...]
    source: str


@dataclass(frozen=True)
class Facts:
    """All of facts.json."""

    models: tuple[KnownModel, ...]
    gpus: tuple[Gpu, ...]
    links: tuple[Link, ...]
    recordings: tuple[Recording, ...]


_Named = TypeVar("_Named", KnownModel, Gpu)


@cache
def load_facts() -> Facts:
    """Read once."""
    text = (files("vllm_expert_prefetch.planning") / "facts.json").read_text(encoding="utf-8")
    data = json.loads(text)

    def made(kind: Any, key: str) -> tuple[Any, ...]:
        return tuple(kind(**{name: _frozen(value) for name, value in row.items()}) for row in data[key])

    return Facts(made(KnownModel, "models"), made(Gpu, "gpus"), made(Link, "links"), made(Recording, "recordings"))


def find_model(name: str) -> tuple[KnownModel, str] | None:
    """The model of that name, repository or quantised repository, and its format; None where it is not known."""
    wanted = _plain(name)
    for model in load_facts().models:
        for form, repository in model.formats.items():
            if wanted in (_plain(repository), _plain(repository.split("/")[1])):
                return model, form
        if wanted in map(_plain, (model.name, *model.also)):
            return model, next(iter(model.formats))
    return None


def find_gpu(name: str) -> Gpu:
    """Raises ConfigError, with the nearest names, for one that is not known."""
    wanted = _plain(name)
    for gpu in load_facts().gpus:
        if wanted in map(_plain, (gpu.name, *gpu.also)):
            return gpu
    names = [other for gpu in load_facts().gpus for other in (gpu.name, *gpu.also)]
    raise ConfigError(
        f"--gpu {name} is not known; did you mean {nearest(name, names)}? Or give --gpu-memory and --link-gbps"
    )


def gpu_like(memory_bytes: float) -> Gpu:
    """The one with the nearest memory: what is assumed where none is named."""
    return min(load_facts().gpus, key=lambda gpu: abs(gpu.memory_bytes - memory_bytes))


def find_link(name: str) -> Link:
    """Of a GPU."""
    return next(link for link in load_facts().links if link.name == name)


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """The most alike of `names`, for a message."""
    by_plain = {_plain(other): other for other in names}
    found = difflib.get_close_matches(_plain(name), by_plain, n=count, cutoff=0.3) or list(by_plain)[:count]
    return ", ".join(by_plain[plain] for plain in found)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("nvidia ").removeprefix("geforce "))


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else dict(value) if isinstance(value, Mapping) else value
