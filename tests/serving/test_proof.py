"""The proof at start passes kernels that read an expert's rows and nothing else, and names the others."""

from types import SimpleNamespace

import pytest
import torch

from vllm_expert_prefetch.serving.expert_tensors import TakeoverError
from vllm_expert_prefetch.serving.proof import NUM_TOKENS, prove_kernels

E, H, TOP_K = 8, 16, 2


class TidyExperts:
    """Stands for a kernel of vLLM's."""


class Layer:
    """Computes with rows as a kernel does; `fault` says what its kernel reads beside them."""

    layer_name, local_num_experts, hidden_size, top_k, activation = "model.layers.3.mlp.experts", E, H, TOP_K, "silu"
    accelerator = torch.device("cpu")
    moe_config = SimpleNamespace(in_dtype=torch.float32)

    def __init__(self, fault=None, kernel=TidyExperts):
        generator = torch.Generator().manual_seed(1)
        views = {"w": torch.randn((E, H, H), generator=generator), "scale": torch.rand(E, generator=generator)}
        tensors = {name: torch.full_like(view, torch.nan) for name, view in views.items()}
        self.cache = SimpleNamespace(store=SimpleNamespace(views=views), tensors=tensors)
        self.quant_method = SimpleNamespace(
            moe_kernel=SimpleNamespace(fused_experts=kernel()), topk_indices_dtype=torch.int64
        )
        self.fault, self.num_calls = fault, 0

    def compute(self, x, topk_weights, topk_ids, row_ids):
        self.num_calls += 1
        rows = self.cache.tensors
        scales = self.cache.store.views["scale"] if self.fault == "a scale left behind" else rows["scale"]
        out = torch.zeros_like(x)
        for place in range(TOP_K):
            row = row_ids[:, place]
            product = torch.einsum("tij,tj->ti", rows["w"][row], x) * scales[row, None]
            out += topk_weights[:, place, None] * product
        if self.fault == "wide steps by the order of rows" and len(x) > 1:
            out += 1e-3 * row_ids.argmin()
        return out


def test_a_kernel_that_reads_rows_passes_and_the_experts_end_in_another_order():
    layer = Layer()
    prove_kernels([layer])
    views, rows = layer.cache.store.views["w"], layer.cache.tensors["w"]
    assert not torch.equal(rows, views)
    assert torch.equal(rows.flatten(1).sort(0).values, views.flatten(1).sort(0).values)


@pytest.mark.parametrize("fault", ["a scale left behind", "wide steps by the order of rows"])
def test_a_kernel_that_reads_anything_else_is_named(fault):
    with pytest.raises(TakeoverError, match=r"layers\.3\.mlp\.experts with TidyExperts .* not give the same bits"):
        prove_kernels([Layer(fault), Layer()])


def test_one_layer_of_each_kind_computes():
    class OtherExperts:
        """Another kernel: another kind."""

    layers = [Layer(), Layer(), Layer(kernel=OtherExperts)]
    prove_kernels(layers)
    assert [layer.num_calls for layer in layers] == [2 * len(NUM_TOKENS), 0, 2 * len(NUM_TOKENS)]


def test_bits_are_compared_so_that_what_is_not_a_number_may_come_out():
    layer = Layer()
    layer.cache.store.views["scale"][:] = torch.nan
    prove_kernels([layer])
