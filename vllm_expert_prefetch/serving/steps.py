"""The plugin's places in a vLLM worker: around each step, and around the measuring of memory."""

from typing import Any

from vllm_expert_prefetch.config import config_of
from vllm_expert_prefetch.serving import compat, drafts
from vllm_expert_prefetch.serving.adapters import watch_adapters
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError
from vllm_expert_prefetch.serving.takeover import CANNOT_RELOAD
from vllm_expert_prefetch.serving.worker import Worker, find_worker


def extend_worker() -> None:
    """Time the steps of every worker whose model is served by the plugin, and size its expert cache."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    init_device = WorkerWrapperBase.init_device

    def init_device_and_watch(self: Any) -> None:
        is_asked_for = config_of(self.vllm_config) is not None
        if is_asked_for:
            drafts.worker_begins(self.vllm_config)
        if is_asked_for and compat.on_cpu_platform():
            compat.allow_amx()
        init_device(self)
        runner = getattr(self.worker, "model_runner", None)
        if runner is not None and is_asked_for:
            watch_steps(runner, self.vllm_config)
            watch_memory(self.worker, self.vllm_config)
            watch_end(self.worker, self.vllm_config)
            watch_loading(runner)
            watch_adapters(runner)
            runner.reload_weights = refuse_reload

    WorkerWrapperBase.init_device = init_device_and_watch


def refuse_reload(*args: Any, **kwargs: Any) -> None:
    """Before vLLM has emptied the layers: the old weights keep serving."""
    raise TakeoverError(CANNOT_RELOAD)


def watch_loading(runner: Any) -> None:
    """Look at the draft of `runner`, if it has one, when it is loaded."""
    load = runner.load_model

    def load_and_look(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        drafts.check_shares_no_experts(runner)

    runner.load_model = load_and_look


def watch_steps(runner: Any, vllm_config: Any) -> None:
    """Let the worker's clock see each step of `runner`.

    A step is one `execute_model`, and the `sample_tokens` that follows when the former returns None. It also follows
    where a stage of a pipeline that is not the last one has returned what the next one needs.
    """
    execute, sample = runner.execute_model, runner.sample_tokens
    is_open = False

    def end(worker: Worker) -> None:
        nonlocal is_open
        if is_open:
            is_open = False
            worker.step_ended()

    def timed_execute(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal is_open
        worker = find_worker(vllm_config)
        if worker is None or worker.publisher is None:
            return execute(scheduler_output, *args, **kwargs)
        is_step = bool(scheduler_output.total_num_scheduled_tokens)
        if is_step:
            is_open = True
            worker.step_begins(*count_sequences(scheduler_output))
        output = execute(scheduler_output, *args, **kwargs)
        if worker.traces is not None and worker.traces.is_recording:
            worker.traces.note_tokens(tokens_by_request(runner, scheduler_output), scheduler_output.finished_req_ids)
        if is_step and output is not None:
            end(worker)
        return output

    def timed_sample(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        worker = find_worker(vllm_config)
        if worker is not None:
            end(worker)
        return output

    runner.execute_model, runner.sample_tokens = timed_execute, timed_sample


def watch_end(worker: Any, vllm_config: Any) -> None:
    """Let a recording of routing write what it has when vLLM shuts its `worker` down, and the profile be written."""
    shutdown = worker.shutdown

    def finish_and_shutdown() -> None:
        ours = find_worker(vllm_config)
        try:
            for unfinished in (ours.traces, ours.profile_writer) if ours is not None else ():
                if unfinished is not None:
                    unfinished.close()
        finally:
            shutdown()

    worker.shutdown = finish_and_shutdown


def watch_memory(worker: Any, vllm_config: Any) -> None:
    """Let the expert cache grow when vLLM has measured what is left for its KV cache. `worker`: vLLM's.

    vLLM measures nothing where the bytes of its KV cache are given, so that these are kept from it meanwhile.
    """
    measure, warm_up = worker.determine_available_memory, worker.compile_or_warm_up_model
    cache_config = vllm_config.cache_config

    def growing() -> Worker | None:
        found = find_worker(vllm_config)
        return found if found is not None and found.sizes.grows else None

    def measure_and_grow() -> int:
        ours = growing()
        if ours is None:
            return int(measure())
        given, cache_config.kv_cache_memory_bytes = cache_config.kv_cache_memory_bytes, None
        try:
            available = compat.least_of_ranks(measure())
        finally:
            cache_config.kv_cache_memory_bytes = given
        activations = worker.peak_activation_memory  # since 0.30 with CUDA graphs
        return ours.measured(worker.requested_memory, activations, available, compat.kv_bytes_of(worker))

    def start_and_warm_up() -> Any:
        ours = growing()  # a model without a KV cache: nothing was measured
        if ours is not None:
            ours.start_grown()
        return warm_up()

    worker.determine_available_memory, worker.compile_or_warm_up_model = measure_and_grow, start_and_warm_up


def count_sequences(scheduler_output: Any) -> tuple[int, int, bool]:
    """Sequences in their prompt, sequences beyond their first token, and whether any was in the step before.

    One that was preempted computes its tokens anew, like a prompt.
    """
    cached = scheduler_output.scheduled_cached_reqs
    outputs = cached.num_output_tokens
    num_prefilling = outputs.count(0)
    if cached.resumed_req_ids:
        resumed = cached.resumed_req_ids
        num_prefilling = sum(not n or name in resumed for name, n in zip(cached.req_ids, outputs, strict=True))
    num_decoding = len(outputs) - num_prefilling
    return num_prefilling + len(scheduler_output.scheduled_new_reqs), num_decoding, bool(outputs)


def tokens_by_request(runner: Any, scheduler_output: Any) -> list[tuple[str, int]]:
    """Requests of the step that `runner` has executed, in the order of their tokens, and how many each has."""
    scheduled = scheduler_output.num_scheduled_tokens
    return [(name, scheduled[name]) for name in compat.request_names(runner) if name in scheduled]
