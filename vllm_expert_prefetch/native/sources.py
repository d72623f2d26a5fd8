"""A digest of the native sources: setup.py bakes it into each library, `library` compares it in a checkout."""

import hashlib
from pathlib import Path

SUFFIXES = {"host": (".cc", ".h"), "cuda": (".cc", ".cu", ".cuh", ".h")}


def source_digest(csrc: Path, part: str) -> str:
    """Hexadecimal digest of every file that `libvep_{part}.so` is compiled from; `part` is "host" or "cuda"."""
    files = [*csrc.glob("*.h"), *(path for path in (csrc / part).iterdir() if path.suffix in SUFFIXES[part])]
    digest = hashlib.sha256()
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(csrc)} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:16]
