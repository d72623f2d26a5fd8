"""`demo-model.json`: which demo model a directory holds, and the SHA-256 of each of its files."""

import hashlib
import json
from pathlib import Path
from typing import Any

MANIFEST = "demo-model.json"


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file. Raises OSError when it cannot be read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, kind: str, recipe: str) -> None:
    """Record every file now in `folder`. `recipe` changes whenever the bytes of the model would."""
    sums = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    content = {"kind": kind, "recipe": recipe, "sha256": sums}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def holds(folder: Path, kind: str, recipe: str) -> bool:
    """Whether `folder` is this very model with every file intact. Files beside the model do not matter."""
    manifest = _read(folder / MANIFEST)
    if manifest.get("kind") != kind or manifest.get("recipe") != recipe:
        return False
    sums = manifest.get("sha256", {})
    return all((folder / name).is_file() and sha256_of(folder / name) == sha for name, sha in sums.items())


def _read(path: Path) -> dict[str, Any]:
    """The manifest, or {} where there is none that can be read: then it is not a demo model."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
