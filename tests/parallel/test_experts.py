"""Expert parallelism: a rank caches its own experts, and others' add nothing to what it computes.

One rank of a group is computed alone: what it adds to the sum of all ranks must be what plain vLLM's would. The CPU
build's kernel takes ids of all experts for rows of the rank's, which ends plain vLLM by a segmentation fault: the
reference calls it with rows.
"""

import dataclasses

import pytest
import torch
from engines import TINY_MODEL, caches, counters, greedy, layers, open_engine, prompts
from parallel.engines_of_two import SERVED
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig
from vllm.model_executor.layers.fused_moe.experts import cpu_moe

from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.serving.expert_share import ExpertShare, take_share

NUM_EXPERTS = 16


@pytest.fixture
def as_rank(monkeypatch):
    """`as_rank(rank, size)`: MoE layers that are made from now on are those of one rank of a group."""
    make = FusedMoEParallelConfig.make

    def be(rank, size):
        share = {"ep_size": size, "ep_rank": rank, "use_ep": True}
        monkeypatch.setattr(
            FusedMoEParallelConfig, "make", staticmethod(lambda *a, **k: dataclasses.replace(make(*a, **k), **share))
        )

    return be


def told_rows(patch):
    """Let plain vLLM's CPU kernel know which of the ids are a rank's: others get weight 0."""
    kernel, apply = cpu_moe.cpu_fused_moe, cpu_moe.CPUUnquantizedExperts.apply
    maps = []

    def apply_with_map(self, *args, **kwargs):
        maps.append(kwargs["expert_map"])
        apply(self, *args, **kwargs)

    def kernel_with_rows(output, x, w1, w2, b1, b2, weights, ids, *rest):
        rows = maps[-1][ids.long()].to(ids.dtype)
        kernel(output, x, w1, w2, b1, b2, weights * (rows >= 0), rows.clamp(min=0), *rest)

    patch.setattr(cpu_moe.CPUUnquantizedExperts, "apply", apply_with_map)
    patch.setattr(cpu_moe, "cpu_fused_moe", kernel_with_rows)


@pytest.mark.engine
@pytest.mark.parametrize(("rank", "size", "own"), [(1, 2, 8), (0, 3, 6)], ids=["a half", "the larger third"])
def test_a_rank_adds_what_plain_vllms_rank_adds(as_rank, rank, size, own):
    def run(config):
        as_rank(rank, size)
        with open_engine(TINY_MODEL, config, max_num_seqs=8) as llm:
            outputs = greedy(llm, prompts(16), 32)
            return outputs, [layer.local_num_experts for layer in layers(llm)], config and (counters(llm), caches(llm))

    served, shares, (ours, of_layers) = run(SERVED)
    resident = run(SERVED | {"cache_fraction": 1.0, "prefetch": "auto"})[0]
    with pytest.MonkeyPatch.context() as patch:
        told_rows(patch)
        expected, stock_shares, _ = run(None)
    assert shares == stock_shares == [own] * 8
    assert served == expected == resident
    assert [cache.num_experts for cache in of_layers] == [own] * 8
    assert [cache.num_slots for cache in of_layers] == [own // 2] * 8
    assert min(ours["lookups_total/miss"], ours["predictions_total/used"]) > 0
    assert ours["experts"] == 8 * own
