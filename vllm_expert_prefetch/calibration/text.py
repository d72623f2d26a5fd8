"""Reading the text: JSON lines with a `text` or a `prompt`."""

import gzip
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vllm_expert_prefetch.calibration import CalibrationError

_SHORTEST = 8
"""Pieces of a document with fewer tokens are left out."""
_HELD_OUT = 8
"""One document in so many is for validation, and one for the report."""


@dataclass(frozen=True)
class Text:
    """Documents and the SHA-256 of the file they came from."""

    documents: list[str]
    sha256: str


@dataclass(frozen=True)
class Windows:
    """Token windows, no document in two of the splits (where there are enough documents)."""

    training: list[list[int]]
    validation: list[list[int]]
    test: list[list[int]]

    @property
    def all(self) -> list[list[int]]:
        return [*self.training, *self.validation, *self.test]


def read_text(path: Path) -> Text:
    """Read a .jsonl or .jsonl.gz file; raises CalibrationError naming the line that cannot be used."""
    try:
        content = path.read_bytes()
        plain = gzip.decompress(content) if path.suffix == ".gz" else content
        lines = plain.decode("utf-8").splitlines()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CalibrationError(f"cannot read {path}: {error}") from error
    documents = [_document(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not documents:
        raise CalibrationError(f"{path} is empty: expected JSON lines with a field `text` or `prompt`")
    return Text(documents, hashlib.sha256(content).hexdigest())


def _document(path: Path, number: int, line: str) -> str:
    where = f"{path}, line {number}"
    try:
        value = json.loads(line)
    except ValueError as error:
        raise CalibrationError(f"{where}: not JSON ({error}); expected one JSON object per line") from error
    text = value.get("text", value.get("prompt")) if isinstance(value, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise CalibrationError(f"{where}: no text; expected an object with a string `text` or `prompt`")
    return text


def cut(text: Text, tokenize: Callable[[str], list[int]], window: int, max_tokens: int) -> Windows:
    """Windows of at most `window` tokens, about `max_tokens` in all, shuffled documents split three ways."""
    documents: list[list[list[int]]] = []
    num_tokens = 0
    for document in random.Random(0).sample(text.documents, len(text.documents)):
        tokens = tokenize(document)[: max_tokens - num_tokens]
        pieces = [tokens[start : start + window] for start in range(0, len(tokens), window)]
        pieces = [piece for piece in pieces if len(piece) >= _SHORTEST]
        if pieces:
            documents.append(pieces)
            num_tokens += sum(map(len, pieces))
        if num_tokens >= max_tokens - _SHORTEST:
            break
    if len(documents) < 3:  # too few documents to keep apart: keep windows apart
        documents = [[piece] for pieces in documents for piece in pieces]
    if len(documents) < 3:
        raise CalibrationError(
            f"the text has {num_tokens} tokens in {len(documents)} windows of up to {window}; at least 3 windows are "
            "needed: give more text, or a smaller --window"
        )
    held_out = max(len(documents) // _HELD_OUT, 1)
    splits = documents[2 * held_out :], documents[:held_out], documents[held_out : 2 * held_out]
    return Windows(*([piece for pieces in split for piece in pieces] for split in splits))
