"""Expert parallelism: a rank caches its own experts, and others' add nothing to what it computes.

Two ranks run in a process each. One rank of three is computed alone: what it adds to the sum of all ranks must be what
plain vLLM's would. The CPU build's kernel takes ids of all experts for rows of the rank's, which ends plain vLLM by a
segmentation fault: the reference calls it with rows.
"""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from engines import TINY_MODEL, caches, counters, greedy, layers, open_engine, prompts
from formats import standins
from formats.checkpoints import family_of, write_quantised
from vllm.model_executor.layers.fused_moe.config import FusedMoEParallelConfig

from parallel import engines_of_two
from parallel.engines_of_two import SERVED
from parallel.rows_of_stock import told_rows
from vllm_expert_prefetch.cache.base import tables_of
from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.serving.expert_share import own_experts, take_share
from vllm_expert_prefetch.tracing.profile import profile_of, read_profile, write_profile
from vllm_expert_prefetch.tracing.trace import read_trace


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


@pytest.mark.engine
def test_a_rank_with_the_larger_third_adds_what_plain_vllms_rank_adds(as_rank):
    own = 6

    def run(config):
        as_rank(0, 3)
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


@pytest.mark.engine
def test_a_rank_records_what_the_router_chose_and_is_warmed_with_its_own_part_of_it(as_rank, tmp_path):
    as_rank(1, 3)
    config = {"cache_fraction": 0.5, "prefetch": "off"}
    with open_engine(TINY_MODEL, config | {"trace": str(tmp_path / "t")}) as llm:
        greedy(llm, prompts(4), 8)
        own = own_of(layers(llm)[0])
    trace = read_trace(tmp_path / "t")
    assert {*trace.routed(0).flatten().tolist()} == {*range(16)}
    assert trace.card.num_experts == (16,) * 8
    write_profile(tmp_path / "p", profile_of(trace))
    with open_engine(TINY_MODEL, config | {"profile": str(tmp_path / "p")}) as llm:
        for layer, cache in enumerate(caches(llm)):
            hottest = [expert for expert in profile_of(trace).hottest(str(layer), 16, 16) if expert in own]
            row_of = tables_of(cache.state)[1][0]
            warm = {own[number] for number, row in enumerate(row_of) if row >= 0}
            assert warm == {*hottest[-cache.num_slots :]}


def own_of(layer):
    """The router's ids of the experts of a layer on this rank, in the order of its numbers for them."""
    return [expert for expert, number in enumerate(layer.share.expert_map.tolist()) if number >= 0]


@pytest.mark.proves("expert parallelism", says="proven, against plain vLLM whose kernel was told the rows")
@pytest.mark.engine
@pytest.mark.long
def test_two_ranks_together_give_the_tokens_of_plain_vllm(tmp_path):
    """In a process each."""
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    stock = engines_of_two.run(None, worker_extension_cls="parallel.rows_in_workers.ToldRows", **options)
    served = engines_of_two.run(SERVED | {"write_profile": str(tmp_path / "hot.json")}, **options)
    assert served.outputs == stock.outputs
    assert set(served.ranks) == {"0", "1"}
    for rank in served.ranks.values():
        assert (rank.value("experts"), rank.value("slots"), rank.value("moe_layers")) == (64, 32, 8)
        assert min(rank.value("lookups_total/miss"), rank.value("predictions_total/used")) > 0
    # Each plans its own experts: what one has to fetch is not what the other has.
    assert len({rank.value("transfer_bytes_total/demand") for rank in served.ranks.values()}) == 2
    uses = {path.name: read_profile(path, str(TINY_MODEL)).uses["7"] for path in tmp_path.iterdir()}
    held = {name: [expert for expert, place in enumerate(own) if place] for name, own in uses.items()}
    assert held == {"hot.json": [*range(8)], "hot.json.rank1": [*range(8, 16)]}


@pytest.mark.proves("expert parallelism", "shim")
@pytest.mark.engine
@pytest.mark.parametrize(("name", "backend"), [("gptq", "marlin"), ("int8", "triton")])
def test_kernels_of_gpus_leave_out_other_ranks_experts(as_rank, monkeypatch, tmp_path, name, backend):
    """vLLM's expert classes, which read its expert map, over stand-ins for the CUDA operators."""
    standins.install(monkeypatch)
    model, given = write_quantised(name, tmp_path / name), family_of(name).prompts[:3]
    options = {"skip_tokenizer_init": True, "moe_backend": backend, "dtype": "bfloat16", "max_model_len": 256}

    def run(config):
        as_rank(1, 3)
        with open_engine(model, config, max_num_batched_tokens=256, **options) as llm:
            outputs = [greedy(llm, given, 8), greedy(llm, given[:1], 8)]
            return outputs, config and [cache.words() for cache in caches(llm)]

    expected, _ = run(None)
    served, words = run({"cache_fraction": 0.8, "prefetch": "on", "emulated_link_gbps": 0.05})
    resident, _ = run({"cache_fraction": 1.0})
    assert served == expected == resident
    assert all(min(layer.hits, layer.misses) > 0 for layer in words)
    assert sum(layer.used for layer in words) > 0


def layer_of(expert_map, kernel):
    method = SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=kernel()))
    return SimpleNamespace(
        layer_name="layer.7",
        local_num_experts=sum(number >= 0 for number in expert_map),
        _expert_map=torch.tensor(expert_map, dtype=torch.int32),
        quant_method=method,
    )


class TritonExperts:
    """By its name a kernel that reads an expert map."""


class OtherExperts:
    """By its name one that does not."""


MAP = [-1, 0, -1, 1, 2, -1]


def test_rows_stand_for_themselves_in_the_map_and_others_lead_nowhere():
    layer = layer_of(MAP, TritonExperts)
    assert own_experts(layer) == [1, 3, 4]
    share = take_share(layer, torch.device("cpu"))
    assert layer._expert_map.tolist() == [0, 1, 2, -1, -1, -1]
    ids = torch.tensor([[1, 0], [4, -1]], dtype=torch.int32)
    own = share.local(ids)
    assert own.tolist() == [[0, -1], [2, -1]]
    assert own.dtype == torch.int32
    weights, experts, rows = share.without_others(torch.ones(2, 2), own, torch.tensor([[2, -1], [0, -1]]))
    assert weights.tolist() == [[1, 1], [1, 1]]
    assert rows.tolist() == [[2, 3], [0, 3]]
    assert experts.tolist() == [[0, 3], [2, 3]]
    assert layer._expert_map[rows].tolist() == [[2, -1], [0, -1]]


def test_the_cpu_kernel_computes_a_row_that_is_needed_with_weight_0():
    share = take_share(layer_of(MAP, OtherExperts), torch.device("cpu"))
    weights, _, rows = share.without_others(torch.ones(2, 2), torch.zeros(2, 2), torch.tensor([[2, -1], [0, -1]]))
    assert weights.tolist() == [[1, 0], [1, 0]]
    assert rows.tolist() == [[2, 2], [0, 2]]
    none = share.without_others(torch.ones(1, 2), torch.zeros(1, 2), torch.full((1, 2), -1))
    assert none[2].tolist() == [[0, 0]]


def test_a_kernel_that_takes_no_map_is_refused_on_a_gpu_by_name():
    with pytest.raises(ConfigError, match=r"OtherExperts of layer\.7 takes no expert map: choose --moe-backend"):
        take_share(layer_of(MAP, OtherExperts), torch.device("meta"))


def test_a_layer_with_all_experts_has_no_share():
    layer = SimpleNamespace(_expert_map=None, local_num_experts=3)
    assert take_share(layer, torch.device("cpu")) is None
    assert own_experts(layer) == [0, 1, 2]
