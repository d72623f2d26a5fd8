"""The planner kernel against the Python planner, step for step, prefetches in every state included."""

import random

import pytest
import torch
from gpu_layer import CLAIMED, COPYING, QUEUED, READY, URGENT

from vllm_expert_prefetch.native.library import cuda_library, host_library
from vllm_expert_prefetch.residency import ExpertCache, Planner, create_policy

SLOT_OF = slice(24, None)  # kHeaderWords of residency.h
TOTALS = slice(11, 18)  # kHits to kDisplacedHits
POLICIES = {"lru": 0, "lfu": 1, "lfru": 2}


class Walk:
    """One layer planned twice, on the GPU and by the specification. Words of slots play the copies."""

    def __init__(self, num_experts, num_slots, top_k, policy, seed):
        self.rng = random.Random(seed)
        self.num_experts, self.num_slots, self.top_k = num_experts, num_slots, top_k
        self.cache = ExpertCache(num_experts, num_slots, create_policy(policy))
        self.planner = Planner(self.cache, top_k, 2)
        host = host_library()
        state = torch.zeros(host.planner_words(num_experts, num_slots), dtype=torch.int64)
        host.planner_init(state, num_experts, num_slots, top_k, POLICIES[policy], 2, False)
        self.device_state = state.cuda()
        self.words = zeros(num_slots)
        self.loads, self.num_loads = zeros(num_slots, 2), zeros(1)
        self.extra, self.num_extra = zeros(num_slots), zeros(1)
        self.totals = [0] * 7

    def states(self):
        return [word & 7 for word in self.words.tolist()]

    def set_states(self, states):
        self.words.copy_(
            torch.tensor([word & ~7 | state for word, state in zip(self.words.tolist(), states, strict=True)])
        )

    def settle(self, needed):
        """What the kernel does first: landed prefetches are resident, unneeded ones that have not started are gone."""
        states = self.states()
        in_flight = [(slot, e) for slot, e in enumerate(self.cache.expert_in) if e in self.cache.in_flight]
        landed = [expert for slot, expert in in_flight if states[slot] == READY]
        dropped = [e for slot, e in in_flight if states[slot] == QUEUED and needed is not None and e not in needed]
        self.planner.settle(landed, dropped)

    def would_wait(self, needed):
        """Whether running copies leave the step too few slots: the kernel would wait until they have landed."""
        states = self.states()
        running = {expert for slot, expert in enumerate(self.cache.expert_in) if states[slot] == COPYING}
        return len((running | needed) - {-1}) > self.num_slots

    def look_ahead(self):
        num_tokens, count = self.rng.randrange(1, 4), self.rng.randrange(1, 2 * self.top_k)
        rows = [[self.rng.randrange(-1, self.num_experts) for _ in range(count)] for _ in range(num_tokens)]
        real = [-1 if self.rng.random() < 0.2 else 3 for _ in rows]
        predicted = [
            expert for column in zip(*rows, strict=True) for expert, at in zip(column, real, strict=True) if at >= 0
        ]
        budget = self.rng.randrange(-1, self.top_k + 1)
        self.settle(None)
        unused = self.cache.num_unused
        plan = self.planner.plan_prefetch(predicted, budget)
        ids = torch.tensor(rows, dtype=torch.int32).cuda()
        budget_word = torch.full((1,), budget, dtype=torch.int32).cuda()
        cuda_library().plan_prefetch(
            *(self.device_state, self.words, ids, torch.tensor(real).cuda(), budget_word.data_ptr()),
            *(self.loads, self.num_loads, self.extra, torch.cuda.current_stream().cuda_stream),
        )
        assert self.listed() == [(load.expert, load.slot) for load in plan.loads]
        words = self.words.tolist()
        assert all(words[load.slot] >> 3 == self.extra[i].item() for i, load in enumerate(plan.loads))
        self.totals[3] += plan.num_evictions
        self.totals[5] += self.cache.num_unused - unused

    def play_lane(self):
        """Some queued copies start, some running ones land."""
        progress = {QUEUED: (QUEUED, COPYING, READY), COPYING: (COPYING, READY), CLAIMED: (READY,), URGENT: (READY,)}
        self.set_states([self.rng.choice(progress.get(state, (state,))) for state in self.states()])

    def step(self):
        num_tokens = self.rng.randrange(1, self.num_slots // self.top_k + 1)
        ids = [e for _ in range(num_tokens) for e in self.rng.sample(range(self.num_experts), self.top_k)]
        routed = [-1 if self.rng.random() < 0.1 else expert for expert in ids]
        real = [-1 if self.rng.random() < 0.15 else 3 for _ in range(num_tokens)]
        ids = [expert if real[i // self.top_k] >= 0 else -1 for i, expert in enumerate(routed)]
        needed = set(ids)
        if self.would_wait(needed):
            self.set_states([READY if state == COPYING else state for state in self.states()])
        self.settle(needed)
        before = self.states()
        plan = self.planner.plan(ids)
        self.run_kernel(routed, real)
        waves = plan.waves
        late = [(expert, self.cache.slot_of[expert]) for expert in (waves[0].late if waves else ())]
        claimed = [pair for pair in late if before[pair[1]] == QUEUED]
        loads = [(load.expert, load.slot) for load in (waves[0].loads if waves else ())]
        assert self.listed() == loads + claimed
        assert self.extra[: self.num_extra.item()].tolist() == [slot for e, slot in late if (e, slot) not in claimed]
        assert self.slot_ids.tolist() == [
            self.cache.slot_of[expert] if expert >= 0 else i % self.num_slots for i, expert in enumerate(ids)
        ]
        counts = (
            plan.num_hits,
            plan.num_late,
            plan.num_misses,
            plan.num_evictions,
            plan.num_used,
            plan.num_unused,
            plan.num_displaced,
        )
        self.totals = [total + count for total, count in zip(self.totals, counts, strict=True)]
        self.planner.complete(plan)
        after = self.states()
        assert {after[slot] for _, slot in loads + claimed} <= {CLAIMED}
        self.set_states([READY if state in (CLAIMED, URGENT) else state for state in after])
        self.check()

    def run_kernel(self, ids, real):
        routed = torch.tensor(ids, dtype=torch.int32).cuda()
        self.slot_ids = torch.full_like(routed, -9)
        cuda_library().plan_step(
            *(self.device_state, self.words, routed.view(len(real), -1), torch.tensor(real).cuda(), self.slot_ids),
            *(self.loads, self.num_loads, self.extra, self.num_extra, 0, torch.cuda.current_stream().cuda_stream),
        )

    def listed(self):
        return [tuple(pair) for pair in self.loads[: self.num_loads.item()].tolist()]

    def check(self):
        self.cache.check_integrity()
        state = self.device_state.tolist()
        assert state[SLOT_OF][: self.num_experts] == self.cache.slot_of
        assert state[TOTALS] == self.totals


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("num_experts", "num_slots", "top_k"), [(6, 4, 2), (64, 24, 4), (512, 300, 8)])
def test_every_plan_is_the_specified_one(num_experts, num_slots, top_k, policy):
    walk = Walk(num_experts, num_slots, top_k, policy, seed=num_experts)
    for _ in range(400):
        if walk.rng.random() < 0.7:
            walk.look_ahead()
        walk.play_lane()
        walk.step()
