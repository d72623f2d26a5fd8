"""Where the counters of several engines go: each has a file and labels of its own, on one page."""

from types import SimpleNamespace

import pytest
from counter_files import INFO
from prometheus_client import CollectorRegistry, generate_latest

from vllm_expert_prefetch.metrics.collector import register_collector
from vllm_expert_prefetch.metrics.counters import Counters
from vllm_expert_prefetch.metrics.definitions import INDEX
from vllm_expert_prefetch.metrics.runtime_dir import ENVIRONMENT_VARIABLE, ensure_runtime_dir
from vllm_expert_prefetch.serving.places import checkpoint_of, part_of_rank, place_of


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The file and labels that one more worker of this process gets."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    model = SimpleNamespace(served_model_name=["served"], model="folder")
    parallel = SimpleNamespace(data_parallel_rank=0, rank=1)
    vllm_config = SimpleNamespace(model_config=model, parallel_config=parallel)
    return lambda: place_of(vllm_config)


def test_two_engines_of_one_process_are_told_apart_and_both_are_shown(place):
    counters = []
    for hits in (3, 5):
        counters.append(Counters(*place(), INFO))
        counters[-1].add(INDEX["lookups_total/hit"], hits)
    registry = CollectorRegistry()
    register_collector(registry, ensure_runtime_dir())
    page = generate_latest(registry).decode()
    for engine, hits in (("0", 3), ("0.2", 5)):
        labels = f'engine="{engine}",model_name="served",outcome="hit",rank="1"'
        assert f"vllm_expert_prefetch_lookups_total{{{labels}}} {hits}.0" in page


def test_an_engine_after_another_takes_its_labels(place):
    first = Counters(*place(), INFO)
    del first
    path, labels = place()
    assert labels == {"model_name": "served", "engine": "0", "rank": "1"}
    assert not path.exists()


def test_checkpoints_are_told_apart_by_model_revision_dtype_and_quantization(tmp_path):
    def checkpoint(**other):
        known = {"model": "org/m", "revision": None, "dtype": "torch.bfloat16", "quantization": None}
        return checkpoint_of(SimpleNamespace(model_config=SimpleNamespace(**(known | other))))

    assert checkpoint() == {"model": "org/m@main", "dtype": "bfloat16", "quantization": "none"}
    others = [{"model": "org/n"}, {"revision": "v2"}, {"dtype": "torch.float16"}, {"quantization": "fp8"}]
    assert len({tuple(checkpoint(**other).values()) for other in [{}, *others]}) == 5
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert checkpoint(model=str(link)) == checkpoint(model=str(tmp_path))


def test_ranks_that_have_different_parts_of_the_experts_are_told_apart_and_others_are_not():
    def part(rank, size, experts=False):
        parallel = SimpleNamespace(rank=rank, tensor_parallel_size=size, enable_expert_parallel=experts)
        return part_of_rank(SimpleNamespace(parallel_config=parallel))

    assert part(0, 1) == "rank0of1"
    assert len({part(0, 1), part(0, 2), part(1, 2), part(0, 2, True), part(1, 2, True)}) == 5
    assert part(2, 2) == part(0, 2), "the same part, of the layers of another stage"
