"""Reloading weights in a running engine: refused before anything changes."""

import pytest
from engines import TINY_MODEL, greedy, open_engine, prompts

from vllm_expert_prefetch.serving.expert_tensors import TakeoverError


@pytest.mark.proves("weights reloaded in a running engine", "any", says="an error, and the old weights serve on")
@pytest.mark.engine
def test_a_refused_reload_leaves_the_old_weights_serving():
    with open_engine(TINY_MODEL, {"cache_fraction": 0.5}) as llm:
        before = greedy(llm, prompts(2))
        with pytest.raises(TakeoverError, match="restart the server"):
            llm.collective_rpc("reload_weights")
        with pytest.raises(RuntimeError, match="Weight transfer not configured"):
            llm.collective_rpc("update_weights", args=({},))
        assert greedy(llm, prompts(2)) == before
