"""The calibration text: read it, cut it into token windows. Its sources and licences: `data/README.md`."""

import gzip
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from vllm_expert_prefetch.demo import DemoError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Document:
    """A passage of one domain."""

    domain: str
    text: str


def calibration_bytes() -> bytes:
    """The compressed calibration file, as packaged."""
    return (files(__package__) / "data" / "calibration.jsonl.gz").read_bytes()


def load_documents() -> list[Document]:
    """All calibration documents, the domains taking turns."""
    lines = gzip.decompress(calibration_bytes()).decode("utf-8").splitlines()
    return [Document(**json.loads(line)) for line in lines]


def to_windows(documents: list[Document], tokenizer: Any, num_tokens: int) -> "torch.Tensor":
    """The first `num_tokens` tokens of each document long enough: int64 [num_windows, num_tokens].

    Raises DemoError when no document is long enough.
    """
    import torch

    encoded = [tokenizer(document.text).input_ids for document in documents]
    windows = [ids[:num_tokens] for ids in encoded if len(ids) >= num_tokens]
    if not windows:
        raise DemoError(f"no calibration document has {num_tokens} tokens; the longest has {max(map(len, encoded))}")
    return torch.tensor(windows, dtype=torch.int64)
