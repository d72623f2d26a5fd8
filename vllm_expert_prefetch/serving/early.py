"""Settings that cannot work, found in the process that reads the flags: before anything is loaded, message last."""

import contextlib
import mmap
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from vllm_expert_prefetch.config import (
    AUTO,
    CONFIG_KEY,
    OFF,
    RESIDENT,
    ConfigError,
    ExpertPrefetchConfig,
    draft_model_of,
)
from vllm_expert_prefetch.lookahead.create import check_distance, check_hybrid
from vllm_expert_prefetch.memory.host_limit import check_experts_fit
from vllm_expert_prefetch.memory.host_memory import check_can_lock, check_huge_pages
from vllm_expert_prefetch.memory.shared_store import check_store, remove_dead_stores
from vllm_expert_prefetch.planning.checkpoint import read_layer_shapes
from vllm_expert_prefetch.planning.sizing import Areas, areas_asked, share_of, size_cache
from vllm_expert_prefetch.prediction import ArtifactError
from vllm_expert_prefetch.prediction.artifact import load_card
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.places import checkpoint_of
from vllm_expert_prefetch.serving.scheduling import check_scheduler
from vllm_expert_prefetch.tracing.card import TraceError
from vllm_expert_prefetch.tracing.profile import check_can_write, is_first_start, read_profile

_WITHOUT_ARTIFACT = (AUTO, "router", "previous")
_NODES = Path("/sys/devices/system/node")


def check_settings(vllm_config: Any, config: ExpertPrefetchConfig) -> None:
    """Raise ConfigError for a setting that does not fit the model, as far as its configuration tells, or this host."""
    model = vllm_config.model_config
    num_shares = compat.num_shares(vllm_config.parallel_config)
    _check_slots(
        config, model.get_num_experts() // num_shares, getattr(model.hf_text_config, "num_experts_per_tok", None)
    )
    num_layers = getattr(model.hf_text_config, "num_hidden_layers", None)
    if isinstance(num_layers, int) and config.prefetch != OFF:
        stages = compat.stages_of(num_layers, vllm_config.parallel_config)
        what = "layers" if len(stages) == 1 else "layers in a stage of its pipeline"
        check_distance(config, min(len(stage) for stage in stages), what)
    check_scheduler(vllm_config, config)
    areas = areas_asked(config, compat.on_cuda_platform(), compat.breaks_graphs(vllm_config))
    _check_bytes(vllm_config, config, areas)
    if config.profile is not None and not is_first_start(config):
        try:
            read_profile(Path(config.profile), model.model)
        except TraceError as error:
            raise ConfigError(f"{CONFIG_KEY}: profile: {error}") from error
    if config.artifact is None and config.predictor not in _WITHOUT_ARTIFACT:
        raise ConfigError(
            f"{CONFIG_KEY}: predictor {config.predictor} needs an artifact: vllm-expert-prefetch calibrate makes one"
        )
    if config.draft_experts != RESIDENT and draft_model_of(vllm_config) is None:
        raise ConfigError(
            f"{CONFIG_KEY}: draft_experts is {config.draft_experts:g}, and no draft with weights of its own is asked "
            "for: leave the key out, or give --speculative-config"
        )
    if vllm_config.parallel_config.distributed_executor_backend != "ray":  # its workers may be on other hosts
        _check_host(config)
        if config.shared_store != OFF:
            remove_dead_stores()
            Finalize(None, remove_dead_stores, exitpriority=-1)  # below 0: once this process's children have ended
            check_store(config.shared_store, checkpoint_of(vllm_config))


def _check_slots(config: ExpertPrefetchConfig, num_experts: int, top_k: Any) -> None:
    """Models whose layers differ tell lists, or nothing: their layers are checked when they are loaded."""
    slots, key = config.slots_per_layer, "slots_per_layer"
    if config.cache_fraction is not None:
        slots, key = share_of(num_experts, config.cache_fraction), "cache_fraction"
    if slots is None:
        return
    given = f"{CONFIG_KEY}: {key} = {getattr(config, key)} gives {slots} slots per layer"
    fewest = min(top_k, num_experts) if isinstance(top_k, int) else 0
    if slots < fewest:
        raise ConfigError(
            f"{given}, and one token needs {fewest} (top-k). Give at least slots_per_layer = {fewest}, "
            f"of {num_experts} experts"
        )
    if slots > num_experts:
        raise ConfigError(
            f"{given}, more than the {num_experts} experts of a rank. Give at most slots_per_layer = {num_experts}, or "
            f"drop {CONFIG_KEY}: the experts fit"
        )


def _check_bytes(vllm_config: Any, config: ExpertPrefetchConfig, areas: Areas) -> None:
    """Whether the experts fit the cache and this host: where the checkpoint is here and not quantised; else when the
    model is loaded.
    """
    model, text = vllm_config.model_config, vllm_config.model_config.hf_text_config
    folder = _folder_of(vllm_config)
    top_k, num_layers = getattr(text, "num_experts_per_tok", None), getattr(text, "num_hidden_layers", None)
    if folder is None or model.quantization or not isinstance(top_k, int) or not isinstance(num_layers, int):
        return
    parallel = vllm_config.parallel_config
    num_shares = compat.num_shares(parallel)
    stages = [
        read_layer_shapes(
            folder, numbers, top_k, model.dtype.itemsize, parallel.tensor_parallel_size // num_shares, num_shares
        )
        for numbers in compat.stages_of(num_layers, parallel)
    ]
    num_bytes = [sum(layer.bytes for layer in layers) for layers in stages]
    for layers in stages:
        if layers and config.cache_gb is not None:
            size_cache(config, layers, mmap.PAGESIZE, areas=areas)
    check_experts_fit(sum(num_bytes) * compat.ranks_on_this_host(parallel) // len(stages))
    if config.pin_memory == "on" and compat.on_cpu_platform():
        check_can_lock(max(num_bytes))


def _folder_of(vllm_config: Any) -> Path | None:
    """The folder of the checkpoint's files; None where they still have to be downloaded, or are not in a folder."""
    model = vllm_config.model_config
    if Path(model.model).is_dir():
        return Path(model.model)
    cache = vllm_config.load_config.download_dir
    with contextlib.suppress(LocalEntryNotFoundError, HFValidationError):
        return Path(snapshot_download(model.model, revision=model.revision, cache_dir=cache, local_files_only=True))
    return None


def _check_host(config: ExpertPrefetchConfig) -> None:
    if config.numa_node is not None and _NODES.is_dir() and not (_NODES / f"node{config.numa_node}").is_dir():
        nodes = sorted(int(path.name.removeprefix("node")) for path in _NODES.glob("node[0-9]*"))
        raise ConfigError(
            f"{CONFIG_KEY}: numa_node is {config.numa_node}, and this host has {', '.join(map(str, nodes))}: name one "
            "of them, or leave the key out"
        )
    if config.huge_pages == "on":
        check_huge_pages(config.shared_store != OFF)
    if config.write_profile is not None:
        try:
            check_can_write(Path(config.write_profile))
        except TraceError as error:
            raise ConfigError(f"{CONFIG_KEY}: write_profile: {error}, or leave the key out") from error
    if config.artifact is not None:
        try:
            check_hybrid(config, load_card(Path(config.artifact)))
        except ArtifactError as error:
            raise ConfigError(f"{CONFIG_KEY}: {error}") from error
