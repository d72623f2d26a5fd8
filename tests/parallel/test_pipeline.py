"""Pipeline parallelism: every stage caches its own layers, and looks ahead to its border."""

from types import SimpleNamespace

import pytest
from engines import TINY_MODEL

from parallel.engines_of_two import SERVED, run
from vllm_expert_prefetch.serving import activation, compat
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError
from vllm_expert_prefetch.tracing.profile import read_profile

COMPILED = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
"""vLLM's CPU build serves no pipeline eagerly: it makes the buffers between stages in a warm-up that it leaves out."""


@pytest.mark.proves("pipeline parallelism")
@pytest.mark.engine
def test_two_stages_give_the_tokens_of_plain_vllm_and_each_looks_ahead_within_itself(tmp_path):
    expected = run(None, pipeline_parallel_size=2, **COMPILED)
    asked = {"metrics_per_layer": True, "write_profile": str(tmp_path / "hot.json")}
    served = run(SERVED | asked, pipeline_parallel_size=2, **COMPILED)
    assert served.outputs == expected.outputs
    assert set(served.ranks) == {"0", "1"}
    for rank, first in (("0", 0), ("1", 4)):
        stage = served.ranks[rank]
        assert [name.split(".")[-1] for name in stage.layers] == [str(first + number) for number in range(4)]
        assert stage.value("moe_layers") == 4
        assert stage.value("slots") == 4 * 8
        assert min(stage.value("lookups_total/miss"), stage.value("predictions_total/used")) > 0
        assert [stage.value(f"lookahead_open_layers/{distance}") for distance in (1, 2, 3, 4)] == [3, 2, 1, 0]
    layers = {path.name: "".join(read_profile(path, str(TINY_MODEL)).uses) for path in tmp_path.iterdir()}
    assert layers == {"hot.json": "0123", "hot.json.rank1": "4567"}


def start(monkeypatch, layers, in_all, num_stages=2):
    def sum_of_stages(number):
        assert number == len(layers)
        assert num_stages > 1, "a collective among the stages of a pipeline that has one"
        return in_all

    monkeypatch.setattr(compat, "moe_layers_of", lambda model: layers)
    monkeypatch.setattr(compat, "sum_of_stages", sum_of_stages)
    activation.start_serving(None, SimpleNamespace(parallel_config=SimpleNamespace(pipeline_parallel_size=num_stages)))


def test_a_stage_may_have_no_moe_layer_where_another_has_one(monkeypatch):
    start(monkeypatch, [], 3)
    with pytest.raises(TakeoverError, match="none of the model's layers"):
        start(monkeypatch, [], 0)
    with pytest.raises(TakeoverError, match="none of the model's layers"):
        start(monkeypatch, [], 0, num_stages=1)


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_stage_with_moe_layers_is_started_when_all_were_counted(monkeypatch, num_stages):
    started = []
    layer = SimpleNamespace(layer_name="a", is_taken_over=True, worker=SimpleNamespace(start=started.append))
    start(monkeypatch, [layer], 1, num_stages)
    assert started == [None]
