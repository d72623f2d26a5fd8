"""Loading never holds a second full copy of the experts."""

import pytest
from families import write_checkpoint
from peak_memory import peak_bytes

pytestmark = pytest.mark.engine


@pytest.fixture
def wide_model(tmp_path):
    """A checkpoint whose experts outweigh everything else: 24 layers x 16 experts, 0.9 GB, a layer 4 % of them."""
    sizes = {"num_hidden_layers": 24, "num_experts": 16, "hidden_size": 512, "moe_intermediate_size": 768}
    return write_checkpoint("qwen3-moe", tmp_path / "wide", **sizes)


def test_peak_memory_of_loading_is_experts_and_cache_and_one_layers_overflow_rows(wide_model):
    expert_bytes = 24 * 16 * 3 * 512 * 768 * 2
    stock = peak_bytes(str(wide_model), None)
    plugin = peak_bytes(str(wide_model), {"cache_fraction": 0.25})
    cache_bytes = expert_bytes // 4 + expert_bytes // 24 * 3 // 4
    # Plain vLLM holds the experts as well, and both post-process one layer at a time.
    assert stock > expert_bytes
    assert plugin - stock <= cache_bytes + 0.1 * expert_bytes
