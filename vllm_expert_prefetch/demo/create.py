"""One call that puts a demo model at a path."""

from pathlib import Path

from vllm_expert_prefetch.demo import KINDS, SMOLLM2_MOE, TINY, tiny
from vllm_expert_prefetch.demo.manifest import holds
from vllm_expert_prefetch.demo.publish import check_replaceable, publish


def create(path: Path, kind: str, force: bool) -> bool:
    """Write the demo model `kind` at `path`; False when it already is there, intact, and nothing was done.

    Raises DemoError, naming the remedy, when the model cannot be made or `path` may not be replaced; OSError when a
    file cannot be written. `path` never holds half a model.
    """
    if kind not in KINDS:
        raise ValueError(f"kind = {kind!r}; there are {', '.join(KINDS)}")
    target = path.expanduser().resolve()
    return _create_tiny(target, force) if kind == TINY else _create_smollm2_moe(target, force)


def _create_tiny(target: Path, force: bool) -> bool:
    recipe = tiny.WEIGHTS_SHA256
    if holds(target, TINY, recipe):
        return False
    check_replaceable(target, force)
    # copies: a link would let a change at the path change the repository
    publish(tiny.tiny_folder(), target, TINY, recipe, link=False)
    return True


def _create_smollm2_moe(target: Path, force: bool) -> bool:
    from vllm_expert_prefetch.demo import smollm2

    recipe = smollm2.recipe()
    if holds(target, SMOLLM2_MOE, recipe):
        return False
    check_replaceable(target, force)  # before minutes of work
    cache = smollm2.cache_folder()
    with smollm2.exclusive(cache):
        publish(smollm2.smollm2_folder(cache), target, SMOLLM2_MOE, recipe, link=True)
    return True
