"""What a trace says of itself: the model, its experts, and the settings that it was recorded under."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

FORMAT = "vllm-expert-prefetch trace"
FORMAT_VERSION = 1


class TraceError(RuntimeError):
    """A trace that cannot be read, written or used. The message names the file and the remedy."""


@dataclass(frozen=True)
class TraceCard:
    """The same in every file of one trace. Sequences have one entry for each recorded layer."""

    model: str
    layers: tuple[str, ...]
    """Their names, in the order in which the model computes them."""
    num_experts: tuple[int, ...]
    top_k: tuple[int, ...]
    record_bytes: tuple[int, ...]
    """Of one expert."""
    num_slots: tuple[int, ...] = ()
    """Empty where nothing was cached: routing that another program has recorded."""
    policy: str = ""
    execution: str = ""
    prefetch: str = ""
    link_bytes_per_second: float = 0.0
    """As measured at start; 0: not known."""
    made_by: str = ""
    """Versions of this package and of vLLM, or what it was imported from."""
    recorded_at: str = ""
    """UTC, ISO 8601."""

    def metadata(self, chunk: int) -> dict[str, str]:
        """The safetensors metadata of file number `chunk`."""
        return {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "chunk": str(chunk),
            "card": json.dumps(asdict(self)),
        }

    @property
    def num_layers(self) -> int:
        """How many were recorded."""
        return len(self.layers)


def card_of(metadata: Mapping[str, str] | None, path: Path) -> tuple[TraceCard, int]:
    """The card and the number of the file `path` with this `metadata`. Raises TraceError for what is no trace."""
    if not metadata or metadata.get("format") != FORMAT:
        raise TraceError(f"{path} is no trace: it was not written by vllm-expert-prefetch trace")
    version = metadata.get("format_version", "")
    if version != str(FORMAT_VERSION):
        raise TraceError(
            f"{path} has format {version}, this version reads format {FORMAT_VERSION}: use the version of "
            "vllm-expert-prefetch that wrote it"
        )
    found = json.loads(metadata["card"])
    known = {entry.name for entry in fields(TraceCard)}
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    return TraceCard(**{name: value for name, value in values.items() if name in known}), int(metadata["chunk"])
