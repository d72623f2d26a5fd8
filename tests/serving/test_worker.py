"""What a worker says of a long load, and what it asks of the host before."""

import logging
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.memory import host_limit
from vllm_expert_prefetch.serving import compat, worker
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError
from vllm_expert_prefetch.serving.layer import CachedRoutedExperts


class Layer:
    """A layer whose records are 250 MB each, as far as it tells."""

    accelerator, local_num_experts, top_k, unprocessed_row_bytes = torch.device("cpu"), 4, 1, (4,)

    def __init__(self, of: worker.Worker) -> None:
        memory = SimpleNamespace(notes=[])
        self.cache = SimpleNamespace(store=SimpleNamespace(num_bytes=10**9, memory=memory))
        self.number = of.register(self)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seconds_each", "said"),
    [
        (1, []),
        (8, ["2 of 3 MoE layers are in host memory, 2 GB at 0.12 GB/s, about 8 s to go"]),
        (
            11,
            [
                f"{n} of 3 MoE layers are in host memory, {n} GB at 0.091 GB/s, about {33 - 11 * n} s to go"
                for n in (1, 2, 3)
            ],
        ),
    ],
)
def test_a_long_load_says_every_ten_seconds_how_far_it_is_and_how_long_it_will_take(
    monkeypatch, caplog, seconds_each, said
):
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: False)
    now = [100.0]
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: now[0]))
    loading = worker.Worker(None, ExpertPrefetchConfig(slots_per_layer=2))
    layers = [Layer(loading) for _ in range(3)]
    with caplog.at_level(logging.INFO, "vllm.expert_prefetch"):
        for layer in layers:
            loading.num_slots_of(layer, {"w": torch.zeros(4, 1)})  # type: ignore[arg-type]
            now[0] += seconds_each
            for each in layers[layer.number + 1 :]:
                each.cache.store.num_bytes = 0  # not there yet
            layer.cache.store.num_bytes = 10**9
            loading.layer_taken_over()
    assert [message.removeprefix("expert_prefetch: ") for message in caplog.messages] == said


def test_whoever_writes_the_profile_is_told_of_every_step(monkeypatch):
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: False)
    serving = worker.Worker(None, ExpertPrefetchConfig())
    serving.publisher, serving.profile_writer = Mock(), Mock()
    serving.step_ended()
    serving.profile_writer.step_ended.assert_called_once_with()


@pytest.mark.parametrize(("made_while_loading", "num_ranks", "fits"), [(0, 1, True), (0, 2, False), (1, 2, True)])
def test_more_experts_than_the_host_holds_are_refused_before_the_first_weight(
    monkeypatch, made_while_loading, num_ranks, fits
):
    """Three layers of 16 bytes on each rank of a host of 48. What vLLM makes smaller while it loads is not known."""
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: False)
    monkeypatch.setattr(host_limit, "host_limit", lambda: host_limit.HostLimit(48, "the memory of this host"))
    parallel = SimpleNamespace(
        distributed_executor_backend="mp", local_world_size=num_ranks, tensor_parallel_size=num_ranks
    )
    loading = worker.Worker(SimpleNamespace(parallel_config=parallel), ExpertPrefetchConfig())
    layers = [Layer(loading) for _ in range(3)]
    for layer in layers:
        layer.quant_method = SimpleNamespace(uses_meta_device=bool(made_while_loading))
    if fits:
        loading.loading_begins()
    else:
        with pytest.raises(ConfigError, match=r"all experts take 9\.6e-08 GB of host memory"):
            loading.loading_begins()
    loading.loading_begins()  # asked once


def test_other_stages_of_a_pipeline_have_other_experts(monkeypatch):
    """48 bytes on each of four ranks: two have parts of these layers, the others of others."""
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: False)
    monkeypatch.setattr(host_limit, "host_limit", lambda: host_limit.HostLimit(96, "the memory of this host"))
    parallel = SimpleNamespace(distributed_executor_backend="mp", local_world_size=4, tensor_parallel_size=2)
    loading = worker.Worker(SimpleNamespace(parallel_config=parallel), ExpertPrefetchConfig())
    layers = [Layer(loading) for _ in range(3)]
    for layer in layers:
        layer.quant_method = SimpleNamespace()
    loading.loading_begins()


@pytest.mark.parametrize(("pin", "says"), [("on", True), ("off", False)])
def test_little_room_beside_page_locked_experts_is_said(monkeypatch, caplog, pin, says):
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: False)
    monkeypatch.setattr(host_limit, "host_limit", lambda: host_limit.HostLimit(50, "the memory of this host"))
    parallel = SimpleNamespace(distributed_executor_backend="ray", local_world_size=8, tensor_parallel_size=8)
    loading = worker.Worker(SimpleNamespace(parallel_config=parallel), ExpertPrefetchConfig(pin_memory=pin))
    layers = [Layer(loading) for _ in range(3)]
    for layer in layers:
        layer.quant_method = SimpleNamespace()
    with caplog.at_level(logging.WARNING, "vllm.expert_prefetch"):
        loading.loading_begins()
    assert any("less than a tenth is left" in message for message in caplog.messages) == says


def test_graphs_are_broken_where_they_are_captured(monkeypatch):
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: True)
    eager, captured = (SimpleNamespace(model_config=SimpleNamespace(enforce_eager=eager)) for eager in (True, False))
    for value, broken in (("0", False), ("1", True)):
        monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", value)
        assert (compat.breaks_graphs(eager), compat.breaks_graphs(captured)) == (False, broken)


@pytest.mark.parametrize("is_in_step", [True, False])
def test_a_layer_that_finds_no_token_in_a_step_that_has_some_computes_nothing(monkeypatch, is_in_step):
    """It would compute with experts' numbers for rows. Dummy and profile runs have none."""
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: False)
    monkeypatch.setattr(compat, "rows_of", lambda x: 0)
    serving = worker.Worker(None, ExpertPrefetchConfig())
    serving.publisher = SimpleNamespace(step_begins=lambda *_: None, step_ended=lambda: None)  # type: ignore[assignment]
    serving.step_begins(0, 1, True)
    if not is_in_step:
        serving.step_ended()
    layer = SimpleNamespace(worker=serving, layer_name="layers.7", cache=SimpleNamespace(local=lambda ids: ids))
    layer.compute = lambda x, weights, ids, rows: x
    x = torch.zeros(1, 2)
    if is_in_step:
        with pytest.raises(TakeoverError, match=r"layers\.7 finds no token in a step that has some"):
            CachedRoutedExperts.run_step(layer, x, x, x.int())
    else:
        assert CachedRoutedExperts.run_step(layer, x, x, x.int()) is x
