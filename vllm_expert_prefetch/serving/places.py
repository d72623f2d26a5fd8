"""Where a worker's counters go, what tells them from those of other workers, and whose experts a worker has."""

from pathlib import Path
from typing import Any

from vllm_expert_prefetch.locks import is_locked
from vllm_expert_prefetch.metrics.counters import SUFFIX
from vllm_expert_prefetch.metrics.runtime_dir import ensure_runtime_dir


def place_of(vllm_config: Any) -> tuple[Path, dict[str, str]]:
    """The file of a worker's counters, and the labels that tell it from others: a second engine of one process
    has a number of its own.
    """
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    served = model.served_model_name or model.model
    stem = f"engine{parallel.data_parallel_rank}-rank{parallel.rank}"
    files = {int(path.stem.rsplit("-", 1)[1]): path for path in ensure_runtime_dir().glob(f"{stem}-*{SUFFIX}")}
    number = max(files, default=0) + 1
    is_second = any(is_locked(path) for path in files.values())
    labels = {
        "model_name": served if isinstance(served, str) else served[0],
        "engine": f"{parallel.data_parallel_rank}{f'.{number}' if is_second else ''}",
        "rank": str(parallel.rank),
    }
    return ensure_runtime_dir() / f"{stem}-{number:06d}{SUFFIX}", labels


def checkpoint_of(vllm_config: Any) -> dict[str, str]:
    """What a server's experts are made of, as far as its flags tell."""
    model = vllm_config.model_config
    folder = Path(model.model)
    return {
        "model": str(folder.resolve()) if folder.is_dir() else f"{model.model}@{model.revision or 'main'}",
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": str(model.quantization or "none"),
    }


def part_of_rank(vllm_config: Any) -> str:
    """Which part of every layer's experts a worker has."""
    parallel = vllm_config.parallel_config
    size = parallel.tensor_parallel_size
    return f"{'experts' if parallel.enable_expert_parallel else 'rank'}{parallel.rank % size}of{size}"
