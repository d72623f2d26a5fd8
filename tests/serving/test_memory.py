"""Loading never holds a second full copy of the experts."""

import pytest
from families import FAMILIES, write_checkpoint
from peak_memory import peak_anonymous_bytes

pytestmark = pytest.mark.engine


@pytest.fixture
def wide_model(tmp_path, monkeypatch):
    """A checkpoint whose experts outweigh everything else: 24 layers x 16 experts, 0.9 GB, a layer 4 % of them."""
    config = dict(FAMILIES["qwen3-moe"].config)
    config |= {"num_hidden_layers": 24, "num_experts": 16, "hidden_size": 512, "moe_intermediate_size": 768}
    family = FAMILIES["qwen3-moe"]
    monkeypatch.setitem(FAMILIES, "wide", type(family)(family.config_class, config, family.prompt_seeds))
    return write_checkpoint("wide", tmp_path / "wide")


def test_peak_memory_of_loading_is_experts_plus_cache(wide_model):
    expert_bytes = 24 * 16 * 3 * 512 * 768 * 2
    stock = peak_anonymous_bytes(str(wide_model), None)
    plugin = peak_anonymous_bytes(str(wide_model), {"cache_fraction": 0.25, "stream_buffer": "off"})
    cache_bytes = expert_bytes // 4
    # Plain vLLM holds the experts as well, and both post-process one layer at a time.
    assert stock > expert_bytes
    assert plugin - stock <= cache_bytes + 0.1 * expert_bytes
