"""Where a worker's counters go, and the labels that tell them from those of other workers."""

from pathlib import Path
from typing import Any

from vllm_expert_prefetch.metrics.counters import SUFFIX
from vllm_expert_prefetch.metrics.locks import is_locked
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
