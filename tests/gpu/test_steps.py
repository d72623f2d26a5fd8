"""Whole steps, planned and staged on the device inside a CUDA graph, against tables that hold every expert."""

import pytest
import torch
from gpu_layer import GpuLayer

from vllm_expert_prefetch.experts.device_staging import DeviceLane
from vllm_expert_prefetch.native.library import cuda_library, host_library

NUM_EXPERTS, NUM_SLOTS, TOP_K, NUM_TOKENS, BUDGET = 32, 20, 4, 3, 6
NUM_USED = 15  # kUsed of residency.h: prefetched experts that a step needed


class PlannedLayer(GpuLayer):
    """A layer with its device planner: `step` writes the rows of the routed experts' tensors into `seen`."""

    def __init__(self, lane, policy):
        super().__init__([8192, 48], NUM_EXPERTS, NUM_SLOTS, lane=lane, num_demand_blocks=8, num_prefetch_blocks=4)
        host = host_library()
        state = torch.zeros(host.planner_words(NUM_EXPERTS, NUM_SLOTS), dtype=torch.int64)
        host.planner_init(state, NUM_EXPERTS, NUM_SLOTS, TOP_K, policy, 2, False)
        self.residency = state.cuda()
        self.ids = torch.zeros(NUM_TOKENS * TOP_K, dtype=torch.int32, device="cuda")
        self.predicted = torch.zeros_like(self.ids)
        self.slot_ids = torch.zeros_like(self.ids)
        self.real = torch.ones(NUM_TOKENS, dtype=torch.int64, device="cuda")
        self.budget = torch.full((1,), BUDGET, dtype=torch.int32, device="cuda")
        self.seen = {
            name: torch.zeros(len(self.ids), t.shape[1], dtype=t.dtype).cuda() for name, t in self.truth.items()
        }

    def look_ahead(self):
        cuda_library().plan_prefetch(
            self.residency,
            self.words,
            self.predicted.view(NUM_TOKENS, TOP_K),
            self.real,
            self.budget.data_ptr(),
            self.ahead.loads,
            self.ahead.num_loads,
            self.ahead.tickets,
            torch.cuda.current_stream().cuda_stream,
        )
        self.staging.prefetch(self.ahead)

    def step(self):
        demand, stream = self.demand, torch.cuda.current_stream().cuda_stream
        cuda_library().plan_step(
            self.residency,
            self.words,
            self.ids.view(NUM_TOKENS, TOP_K),
            self.real,
            self.slot_ids,
            demand.loads,
            demand.num_loads,
            demand.late,
            demand.num_late,
            0,
            stream,
        )
        self.staging.stage(demand)
        for name, tensor in self.pool.tensors.items():
            torch.index_select(tensor, 0, self.slot_ids, out=self.seen[name])

    def num_differing(self):
        return sum((self.seen[name] != truth[self.ids.long()]).sum() for name, truth in self.truth.items())


def route(layers, generator):
    """New routing for every layer; half of the predictions are right."""
    for layer in layers:
        rows = [torch.randperm(NUM_EXPERTS, device="cuda", generator=generator)[:TOP_K] for _ in range(2 * NUM_TOKENS)]
        layer.ids.copy_(torch.cat(rows[:NUM_TOKENS]))
        layer.predicted.copy_(torch.where(layer.ids % 2 == 0, layer.ids, torch.cat(rows[NUM_TOKENS:]).int()))


def run_layers(layers):
    """Each layer fetches ahead for the next one, beside its own step."""
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if following is not None:
            following.look_ahead()
        layer.step()
    layers[0].lane.join()


@pytest.mark.parametrize("policy", [0, 2], ids=["lru", "lfru"])
def test_replays_with_other_routing_fetch_their_own_experts_in_every_layer(policy):
    lane = DeviceLane(torch.device("cuda"))
    layers = [PlannedLayer(lane, policy) for _ in range(4)]
    generator = torch.Generator("cuda").manual_seed(11)
    route(layers, generator)
    run_layers(layers)  # warm-up, as vLLM does before a capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_layers(layers)
    differing = torch.zeros(1, dtype=torch.int64, device="cuda")
    for _ in range(1000):
        route(layers, generator)
        graph.replay()
        for layer in layers:
            differing += layer.num_differing()
    assert int(differing.item()) == 0
    assert lane.num_errors() == 0
    assert all(int(layer.residency[NUM_USED].item()) > 0 for layer in layers[1:]), "no prefetch was of use"
