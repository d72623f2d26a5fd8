"""The planner kernels against the specification, step for step: narrow steps and wide ones, of few ids and of
thousands, prefetches in every state included."""

import random

import pytest
import torch
from gpu_layer import CLAIMED, COPYING, QUEUED, READY, URGENT

from vllm_expert_prefetch.cache.base import initial_state
from vllm_expert_prefetch.cache.words import Words
from vllm_expert_prefetch.native.library import cuda_library, host_library
from vllm_expert_prefetch.residency import POLICIES, ExpertCache

NUM_WORDS = len(Words._fields)


def zeros(*shape):
    return torch.zeros(shape, dtype=torch.int32, device="cuda")


def stream():
    return torch.cuda.current_stream().cuda_stream


class Walk:
    """One layer planned twice, on the GPU and by the specification. Words of rows play the copies."""

    def __init__(self, num_experts, num_slots, top_k, policy, seed):
        self.rng = random.Random(seed)
        self.num_experts, self.num_slots, self.top_k = num_experts, num_slots, top_k
        self.cache = ExpertCache(num_experts, num_slots, POLICIES[policy])
        self.state = initial_state(num_experts, num_slots, top_k, policy).cuda()
        self.board, self.lane = zeros(cuda_library().board_ints(num_experts)), zeros(cuda_library().lane_ints())
        self.words = self.board[:num_experts]
        self.loads, self.num_loads = zeros(num_experts, 2), zeros(1)
        self.extra, self.num_extra = zeros(num_experts), zeros(1)
        names = "wide_steps hits late misses overflow evictions used unused displaced issued cancelled claimed demanded"
        self.totals = dict.fromkeys([*names.split(), "preloads"], 0)
        cuda_library().load_plan_kernels(num_experts, num_slots, torch.cuda.current_device())

    def states(self):
        return [number & 7 for number in self.words.tolist()]

    def set_states(self, states):
        numbers = zip(self.words.tolist(), states, strict=True)
        self.words.copy_(torch.tensor([number & ~7 | state for number, state in numbers]))

    def add(self, **counts):
        for name, count in counts.items():
            self.totals[name] += count

    def settle(self, needed):
        """What the kernels do first: landed prefetches are resident, unneeded ones that have not started are gone."""
        states = self.states()
        in_flight = [(slot, e) for slot, e in enumerate(self.cache.expert_in) if e in self.cache.in_flight]
        landed = [expert for slot, expert in in_flight if states[slot] == READY]
        dropped = [e for slot, e in in_flight if states[slot] == QUEUED and e not in needed]
        self.cache.settle(landed, dropped)
        self.add(cancelled=len(dropped))

    def look_ahead(self, num_tokens):
        count = self.rng.randrange(1, 2 * self.top_k)
        rows = [[self.rng.randrange(-1, self.num_experts) for _ in range(count)] for _ in range(num_tokens)]
        real = [-1 if self.rng.random() < 0.2 else 3 for _ in rows]
        counting = self.rng.randrange(count + 2)
        columns = list(zip(*rows, strict=True))[:counting]
        predicted = [expert for column in columns for expert, at in zip(column, real, strict=True) if at >= 0]
        budget = self.rng.randrange(-1, self.top_k + 1)
        is_far = self.rng.random() < 0.5
        likely = [row[: self.top_k] for row, at in zip(rows, real, strict=True) if at >= 0]
        in_order = [expert for row in likely for expert in row if expert >= 0]
        preloads = self.rng.random() < 0.7
        num_queued = sum(state == QUEUED for state in self.states())
        is_asked = preloads and (budget - num_queued * is_far > 0 or num_tokens * self.top_k > self.num_experts)
        is_wide = is_asked and len(set(in_order)) > self.num_slots
        self.settle(set(in_order if is_wide else predicted))
        self.lane[1] = num_queued
        if is_wide:
            plan = self.cache.plan_preload(in_order)
        else:
            plan = self.cache.plan_prefetch(predicted, budget - num_queued * is_far, is_far)
        budget_words = torch.tensor([budget, counting], dtype=torch.int32).cuda()
        cuda_library().plan_prefetch(
            *(self.state, self.board, self.lane),
            *(torch.tensor(rows, dtype=torch.int64).cuda(), torch.tensor(real).cuda()),
            *(budget_words.data_ptr(), is_far, preloads, self.loads, self.num_loads, self.extra, stream()),
        )
        assert self.listed() == [(load.expert, load.row) for load in plan.loads]
        words = self.words.tolist()
        assert all(words[load.row] >> 3 == self.extra[i].item() for i, load in enumerate(plan.loads))
        evictions = sum(load.victim >= 0 for load in plan.loads)
        self.add(issued=len(plan.loads), evictions=evictions, unused=plan.num_unused, preloads=is_wide)

    def play_lane(self):
        """Some queued copies start, some running ones land."""
        progress = {QUEUED: (QUEUED, COPYING, READY), COPYING: (COPYING, READY), CLAIMED: (READY,), URGENT: (READY,)}
        self.set_states([self.rng.choice(progress.get(state, (state,))) for state in self.states()])

    def step(self, num_tokens, num_topics):
        """`num_topics`: experts that there are to choose from."""
        pool = self.rng.sample(range(self.num_experts), num_topics)
        routed = [e for _ in range(num_tokens) for e in self.rng.sample(pool, self.top_k)]
        routed = [-1 if self.rng.random() < 0.02 else expert for expert in routed]
        real = [-1 if self.rng.random() < 0.15 else 3 for _ in range(num_tokens)]
        ids = [expert if real[i // self.top_k] >= 0 else -1 for i, expert in enumerate(routed)]
        needed = {expert for expert in ids if expert >= 0}
        self.settle(needed)
        late_rows = {self.cache.row_of[e]: e for e in needed if e in self.cache.in_flight}
        before = self.states()
        plan = self.cache.plan(ids)
        row_ids = self.run_kernel(routed, real)
        claimed = {(expert, row) for row, expert in late_rows.items() if before[row] == QUEUED}
        loads = [(load.expert, load.row) for load in plan.loads]
        listed = self.listed()
        assert listed[: len(loads)] == loads
        assert set(listed[len(loads) :]) == claimed
        waited = set(self.extra[: self.num_extra.item()].tolist())
        assert waited == {*late_rows, *plan.awaited} - {row for _, row in claimed}
        spare = next(iter(plan.rows.values()), 0)
        assert row_ids == [
            -1 if expert < 0 else plan.rows[expert] if real[i // self.top_k] >= 0 else spare
            for i, expert in enumerate(routed)
        ]
        self.add(
            wide_steps=plan.is_wide,
            hits=plan.num_hits,
            late=len(plan.late),
            misses=len(loads),
            overflow=sum(row >= self.num_slots for _, row in loads),
            evictions=plan.num_evictions,
            used=plan.num_used,
            unused=plan.num_unused,
            displaced=plan.num_displaced,
            claimed=len(claimed),
            demanded=len(listed),
        )
        after = self.states()
        assert {after[row] for _, row in listed} <= {CLAIMED}
        self.set_states([READY if state in (CLAIMED, URGENT) else state for state in after])
        self.check()

    def run_kernel(self, routed, real):
        ids = torch.tensor(routed, dtype=torch.int32).cuda().view(len(real), -1)
        row_ids = torch.full_like(ids, -9)
        cuda_library().plan_step(
            *(self.state, self.board, self.lane, ids, torch.tensor(real).cuda(), row_ids),
            *(self.loads, self.num_loads, self.extra, self.num_extra, 0, False, None, None, 0, stream()),
        )
        return row_ids.flatten().tolist()

    def listed(self):
        return [tuple(pair) for pair in self.loads[: self.num_loads.item()].tolist()]

    def check(self):
        self.cache.check_integrity()
        state = self.state.tolist()
        assert state[NUM_WORDS : NUM_WORDS + self.num_experts] == self.cache.row_of
        words = Words._make(state[:NUM_WORDS])._asdict() | {"preloads": self.totals["preloads"]}
        assert {name: words[name] for name in self.totals} == self.totals


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("num_experts", "num_slots", "top_k"), [(6, 4, 2), (64, 24, 4), (512, 300, 8), (1024, 600, 8)])
def test_every_plan_is_the_specified_one(num_experts, num_slots, top_k, policy):
    walk = Walk(num_experts, num_slots, top_k, policy, seed=num_experts)
    for number in range(300):
        if walk.rng.random() < 0.7:
            walk.look_ahead(walk.rng.randrange(1, 4) if number % 50 else 1100 // top_k)
        walk.play_lane()
        most = num_slots if walk.rng.random() < 0.7 else 3 * num_experts
        walk.step(walk.rng.randrange(1, most // top_k + 1), num_experts)
    assert walk.totals["wide_steps"] > 0
    assert walk.totals["overflow"] > 0
    assert walk.totals["claimed"] > 0
    assert walk.totals["preloads"] > 0


@pytest.mark.parametrize("num_topics", [8, 100, 128])
def test_a_prompt_of_thousands_is_planned_as_specified(num_topics):
    """65,536 ids at most, of few experts and of all."""
    walk = Walk(128, 64, 8, "lfru", seed=num_topics)
    for num_tokens in (2048, 1, 8192, 3, 500, 130):
        walk.look_ahead(num_tokens)
        walk.play_lane()
        walk.step(num_tokens, num_topics)
    assert walk.totals["wide_steps"] == (0 if num_topics == 8 else 4)


def test_the_library_names_the_words_as_python_does():
    assert cuda_library().word_names().split() == list(Words._fields) == host_library().word_names().split()
