"""Hit rates and times: what they must do whatever the figures are, and how far they are from what was measured."""

import itertools

import pytest

from vllm_expert_prefetch.config import ExpertPrefetchConfig
from vllm_expert_prefetch.planning.budget import Load, Ranks
from vllm_expert_prefetch.planning.facts import load_facts
from vllm_expert_prefetch.planning.hits import hit_rates, needed_experts
from vllm_expert_prefetch.planning.model_files import find
from vllm_expert_prefetch.planning.plan import alternatives, make_plan
from vllm_expert_prefetch.planning.timing import Machine, Work

CARD = Machine(24e9, 1e12, 150e12, 25e9)
QWEN = find("Qwen3-30B-A3B")
MIXED = {
    2: [(0.488, 0.783, 0.922), (0.531, 0.843, 0.965)],
    4: [(0.427, 0.719, 0.897), (0.363, 0.697, 0.911)],
    8: [(0.382, 0.645, 0.866), (0.326, 0.594, 0.844)],
    16: [(0.331, 0.599, 0.824), (0.283, 0.556, 0.799)],
}
"""So many unrelated passages at once, recorded on the tiny and the SmolLM2 MoE (16 experts, top-2): hit rates with 25,
50 and 75 % of the experts in slots."""


def test_distinct_experts_are_those_of_uniform_routing():
    counts = [round(needed_experts(tokens, 128, 8)) for tokens in (1, 4, 8, 16, 32, 64)]
    assert counts == [8, 29, 52, 82, 112, 126]


@pytest.mark.parametrize("sequences", [1, 4, 16])
def test_more_slots_hit_more_and_a_range_is_in_order(sequences):
    found = [hit_rates(slots / 128, sequences, 128, 8) for slots in range(8, 129)]
    for fewer, more in itertools.pairwise(found):
        assert more.low >= fewer.low - 0.002
        assert more.high >= fewer.high - 0.002
    assert all(0 < one.low <= one.expected <= one.high <= 1 for one in found)
    assert found[-1].low == 1


def test_more_sequences_hit_less_down_to_the_share_of_slots():
    found = [hit_rates(0.5, sequences, 128, 8).expected for sequences in (1, 2, 8, 32, 1000)]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("recording", load_facts().recordings, ids=lambda recording: recording.name)
def test_with_one_sequence_every_recording_is_in_the_range(recording):
    for share, rate in zip(recording.shares, recording.hit_rates, strict=True):
        found = hit_rates(share, 1, recording.num_experts, recording.top_k)
        assert found.low - 1e-9 <= rate <= found.high + 1e-9


@pytest.mark.parametrize("sequences", MIXED)
def test_unrelated_sequences_hit_as_often_as_was_recorded_within_five_points(sequences):
    for recorded in MIXED[sequences]:
        for share, rate in zip((0.25, 0.5, 0.75), recorded, strict=True):
            found = hit_rates(share, sequences, 16, 2)
            assert found.low - 0.05 < rate < found.high + 0.05


def test_bounds_are_below_what_is_expected_and_look_ahead_helps():
    work = Work(read_bytes=4e9, flops=6e9, needed_bytes=3e9, layers=48)
    for rate in (0.3, 0.8, 0.99, 1.0):
        assert work.bound(CARD, rate) <= work.seconds(CARD, rate, 0.85) <= work.seconds(CARD, rate, 0.0)
    assert work.bound(CARD, 0.5) == pytest.approx(3e9 * 0.5 / 25e9), "the link"
    assert work.bound(CARD, 1.0) == pytest.approx(4e9 / 1e12), "the memory"
    assert Work(1e6, 150e12, 0, 1).bound(CARD, 1.0) == pytest.approx(1.0), "computing"


def test_a_plan_of_a_faster_link_is_faster_and_its_range_is_in_order():
    slow = make_plan(QWEN, CARD, Load(8192, 1))
    fast = make_plan(QWEN, Machine(24e9, 1e12, 150e12, 100e9), Load(8192, 1))
    assert fast.tpot.expected < slow.tpot.expected
    assert slow.tpot.low < slow.tpot.expected < slow.tpot.high
    assert slow.tpot.expected < slow.tpot_without.expected
    assert slow.ttft > slow.ttft_bound > slow.tpot.expected
    assert slow.bytes_per_token == pytest.approx(48 * 8 * 9_437_184 * (1 - slow.hits.expected))


def test_steps_too_wide_to_look_ahead_overlap_nothing_and_that_is_said():
    wide = make_plan(QWEN, Machine(24e9, 1e12, None, 25e9), Load(1024, 17))
    assert wide.tpot == wide.tpot_without
    assert any("do not look ahead" in note for note in wide.notes)


def test_ranks_share_the_link_traffic():
    alone, two = (make_plan(QWEN, CARD, Load(8192, 1), Ranks(tp=number)) for number in (1, 2))
    assert two.decode.needed_bytes == alone.decode.needed_bytes / 2
    assert two.host_bytes == alone.host_bytes == 48 * 128 * 9_437_184
    apart = make_plan(QWEN, CARD, Load(8192, 1), Ranks(tp=2, ep=2))
    assert apart.decode.needed_bytes == two.decode.needed_bytes


def test_a_second_area_of_overflow_rows_shortens_prompts_and_wide_steps():
    card, load = Machine(44e9, 1e12, 150e12, 25e9), Load(2048, 32)
    one, two = (make_plan(QWEN, card, load, config=ExpertPrefetchConfig(areas=areas)) for areas in (1, 2))
    assert (one.budget.areas, two.budget.areas) == (1, 2)
    assert make_plan(QWEN, card, load) == two, "it costs less than a twentieth of the cache"
    assert two.ttft < one.ttft
    assert two.tpot.expected < one.tpot.expected == one.tpot_without.expected
    assert one.notes
    assert not two.notes


def test_a_model_that_fits_needs_no_plugin_and_no_host_memory():
    plan = make_plan(find("OLMoE-1B-7B-0924"), CARD, Load(4096, 1))
    assert plan.budget.fits_whole
    assert (plan.host_bytes, plan.hits.low, plan.bytes_per_token) == (0, 1.0, 0)


def test_other_formats_are_planned_for_the_same_machine():
    others = alternatives(make_plan(QWEN, CARD, Load(8192, 1)))
    assert {form: other.model.serve for form, other in others.items()} == {
        "fp8": "Qwen/Qwen3-30B-A3B-FP8",
        "gptq-int4": "Qwen/Qwen3-30B-A3B-GPTQ-Int4",
    }
    assert others["gptq-int4"].budget.share > others["fp8"].budget.share
