"""Write a finished model to the user's path: all of it or nothing."""

import os
import shutil
from pathlib import Path

from vllm_expert_prefetch.demo import DemoError
from vllm_expert_prefetch.demo.manifest import MANIFEST, write_manifest


def check_replaceable(target: Path, force: bool) -> None:
    """Raise DemoError when `target` (absolute, links resolved) may not be written.

    A missing or empty directory always may, anything else only by `force`; the home directory, the current one and
    their parents never, because replacing deletes what was there.
    """
    if target.exists() and not target.is_dir():
        raise DemoError(f"{target} is a file; give the path of a directory")
    if not target.exists() or not any(target.iterdir()):
        return
    if not force:
        raise DemoError(f"{target} is not empty and is not this model; give another path, or --force to replace it")
    cwd, home = Path.cwd(), Path.home()
    if target in (cwd, *cwd.parents, home, *home.parents):
        raise DemoError(f"--force would delete everything in {target}; give the path of a subdirectory")


def publish(source: Path, target: Path, kind: str, recipe: str, link: bool) -> None:
    """Put the files of `source` and a manifest at `target`, by rename so that it never is half a model.

    `link`: weight files become hard links where the file system can, otherwise copies.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial, old = _sibling(target, "partial"), _sibling(target, "old")
    partial.mkdir()
    for path in source.iterdir():
        _place(path, partial / path.name, link and path.suffix == ".safetensors")
    if not (partial / MANIFEST).exists():
        write_manifest(partial, kind, recipe)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _sibling(target: Path, suffix: str) -> Path:
    """A free name on the same file system; what a killed run left there is removed."""
    path = target.with_name(f".{target.name}.{suffix}")
    if path.exists():
        shutil.rmtree(path)
    return path


def _place(source: Path, target: Path, link: bool) -> None:
    if link:
        try:
            os.link(source, target)
            return
        except OSError:  # another file system, or one without hard links
            pass
    shutil.copyfile(source, target)
