"""A worker's switch for recordings of its routing, what each recording says of the server, and profiles."""

import weakref
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vllm_expert_prefetch import __version__
from vllm_expert_prefetch.config import CONFIG_KEY, OFF, ConfigError
from vllm_expert_prefetch.metrics.counters import SUFFIX as COUNTERS
from vllm_expert_prefetch.planning.warm_start import LayerStart, WarmStart
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.wording import short_name
from vllm_expert_prefetch.tracing.card import TraceCard, TraceError
from vllm_expert_prefetch.tracing.control import SUFFIX, serve_control
from vllm_expert_prefetch.tracing.folder import TraceFolder
from vllm_expert_prefetch.tracing.profile import read_profile
from vllm_expert_prefetch.tracing.profile_writer import ProfileWriter
from vllm_expert_prefetch.tracing.recorder import Recorder
from vllm_expert_prefetch.tracing.switch import TraceSwitch

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.worker import Worker


def create_switch(worker: "Worker", vllm_config: Any) -> TraceSwitch | None:
    """The switch of `worker`, whose publisher is there, and its control socket; None on ranks that route as another.

    Raises ConfigError when the key `trace` asks for what cannot be had.
    """
    assert worker.publisher is not None
    parallel, config = vllm_config.parallel_config, worker.config
    if parallel.rank % parallel.tensor_parallel_size:
        return None

    def attach(recorder: Recorder | None) -> None:
        served = [layer for layer in worker.layers if layer.cache is not None]
        for number, layer in enumerate(served):
            layer.recorded_number, layer.recorder = number, recorder

    switch = TraceSwitch(lambda folder, with_weights: _recorder(worker, vllm_config, folder, with_weights), attach)
    path = worker.publisher.counters.path
    try:
        socket = path.with_name(path.name.removesuffix(COUNTERS) + SUFFIX)
        switch.stop_answering = serve_control(socket, _answer_of(weakref.ref(switch)))
        weakref.finalize(switch, switch.stop_answering)  # an engine that fails to start is never shut down
    except OSError as error:
        compat.logger().warning("expert_prefetch: routing cannot be recorded on request: %s", error)
    if config.trace != OFF:
        try:
            started = switch.start(Path(config.trace), config.trace_mb, config.trace_weights)
        except TraceError as error:
            raise ConfigError(f"{CONFIG_KEY}: trace: {error}, or drop the key") from error
        compat.logger().info("expert_prefetch: routing is recorded into %s", started["recording"])
    return switch


def _answer_of(held: "weakref.ref[TraceSwitch]") -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """What the switch answers for as long as its worker lives: who asks does not keep it, nor its caches, alive."""

    def answer(request: Mapping[str, Any]) -> Mapping[str, Any]:
        switch = held()
        return {"error": "this engine has ended"} if switch is None else switch.answer(request)

    return answer


def warm_slots(worker: "Worker", vllm_config: Any) -> WarmStart | None:
    """Bring the experts that the profile of `worker` names as the most used, as one step would, and say how many.

    Of a layer's experts those that this rank has. A stage of a pipeline leaves layers cold that the profile does not
    name: it may come from a trace of another stage.
    Returns what finds out what that gains; None on a GPU, where nothing on the host sees the routing.
    Raises ConfigError where the profile does not fit the layers.
    """
    path, num_slots, cold = Path(str(worker.config.profile)), 0, []
    of_rank = _of_rank(path, vllm_config.parallel_config)
    path = of_rank if of_rank.exists() else path
    is_stage = vllm_config.parallel_config.pipeline_parallel_size > 1
    starts = {}
    try:
        profile = read_profile(path, vllm_config.model_config.model)
        for layer in worker.layers:
            if layer.cache is None:
                continue
            name, cache = short_name(layer.layer_name, layer.number), layer.cache
            if is_stage and name not in profile.uses:
                cold.append(name)
            else:
                ranked = profile.hottest(name, cache.num_routed, cache.num_routed)
                own = cache.local(torch.tensor(ranked, device=layer.accelerator))
                own = own[own >= 0][-cache.num_slots :].unsqueeze(0)
                cache.serve(own, torch.zeros(1, dtype=torch.int64, device=layer.accelerator) if cache.on_device else 1)
                num_slots += cache.num_slots
            if not cache.on_device:
                numbers = cache.num_experts, cache.num_slots, cache.top_k, cache.record_bytes
                starts[layer.number] = LayerStart(*numbers, cache.state.numpy().copy())
    except TraceError as error:
        raise ConfigError(f"{CONFIG_KEY}: profile: {path}: {error}") from error
    compat.logger().info("expert_prefetch: %d slots are warm with the most used experts of %s", num_slots, path)
    if cold:
        compat.logger().warning("expert_prefetch: %s says nothing of layers %s: they start cold", path, ", ".join(cold))
    return WarmStart(starts, worker.config.policy) if starts else None


def create_profile_writer(worker: "Worker", vllm_config: Any) -> ProfileWriter | None:
    """What writes the profile of `worker` that the key `write_profile` asks for; None on ranks that hold the same
    experts as another, and where every expert is resident."""
    asked, served = worker.config.write_profile, [layer for layer in worker.layers if layer.cache is not None]
    if asked is None or not served:
        return None
    parallel = vllm_config.parallel_config
    if _first_alike(parallel) != parallel.rank:
        return None
    caches = {short_name(layer.layer_name, layer.number): layer.cache for layer in served if layer.cache is not None}
    return ProfileWriter(_of_rank(Path(asked), parallel), str(vllm_config.model_config.model), caches)


def _of_rank(path: Path, parallel: Any) -> Path:
    """The profile of a rank among several files: `path` is the first one's, `path.rank2` that of rank 2."""
    rank = _first_alike(parallel)
    return path.with_name(f"{path.name}.rank{rank}") if rank else path


def _first_alike(parallel: Any) -> int:
    """The first rank that holds the same experts as this one."""
    return int(parallel.rank - parallel.rank % (parallel.tensor_parallel_size // compat.num_shares(parallel)))


def _recorder(worker: "Worker", vllm_config: Any, folder: TraceFolder, with_weights: bool) -> Recorder:
    """With the slots and links of all ranks together, among which the experts may be divided: their routing is one."""
    layers = [layer for layer in worker.layers if layer.cache is not None]
    caches = [layer.cache for layer in layers if layer.cache is not None]
    if not caches:
        raise TraceError("every expert has a slot: nothing is routed through a cache. Give fewer slots")
    if compat.captures_graphs(vllm_config):
        raise TraceError("nothing on the host sees the routing inside CUDA graphs: serve with --enforce-eager")
    assert worker.publisher is not None
    card = TraceCard(
        model=str(vllm_config.model_config.model),
        layers=tuple(short_name(layer.layer_name, layer.number) for layer in layers),
        num_experts=tuple(cache.num_routed for cache in caches),
        top_k=tuple(cache.top_k for cache in caches),
        record_bytes=tuple(cache.record_bytes for cache in caches),
        num_slots=tuple(cache.num_slots * cache.num_routed // cache.num_experts for cache in caches),
        policy=worker.config.policy,
        execution=worker.execution,
        prefetch=worker.prefetch,
        link_bytes_per_second=worker.publisher.counters.get("link_bytes_per_second")
        * compat.num_shares(vllm_config.parallel_config),
        made_by=f"vllm-expert-prefetch {__version__}, vLLM {compat.vllm_version()}",
        recorded_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return Recorder(caches, card, folder, with_weights)
