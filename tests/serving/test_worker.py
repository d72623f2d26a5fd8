"""What a worker says of a long load."""

import logging
from types import SimpleNamespace

import pytest
import torch

from vllm_expert_prefetch.config import ExpertPrefetchConfig
from vllm_expert_prefetch.serving import compat, worker


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
