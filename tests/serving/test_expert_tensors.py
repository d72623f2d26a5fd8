"""Which tensors are an expert's: found in what the layer, its kernel and its quantisation config hold, or refused."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from vllm_expert_prefetch.serving.expert_tensors import (
    ExpertTensor,
    TakeoverError,
    check_weights_are_among,
    find_expert_tensors,
    leave_where_it_is,
    reachable_tensors,
)

E = 16


class Holder:
    """Stands for vLLM's quant method, kernel, or quantisation config."""

    def __init__(self, **held: Any) -> None:
        self.__dict__.update(held)


@dataclass
class Wrapper:
    """Stands for an object of triton_kernels around a weight."""

    storage: torch.Tensor


Holder.__module__ = "vllm.model_executor.layers.fused_moe.test"
Wrapper.__module__ = "triton_kernels.tensor"


class Layer(nn.Module):
    layer_name = "model.layers.3.mlp.experts"
    w13_weight: torch.Tensor
    w2_weight: torch.Tensor

    def __init__(self, **parameters: torch.Tensor) -> None:
        super().__init__()
        weights = {"w13_weight": torch.randn(E, 6, 8), "w2_weight": torch.randn(E, 8, 3)}
        for name, tensor in {**weights, **parameters}.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.quant_method: Any = Holder()

    def hold(self, **scales: torch.Tensor) -> None:
        """In the quantisation config."""
        self.quant_method.moe_quant_config = Holder(**scales)


def names(layer: Layer) -> set[str]:
    return set(find_expert_tensors(layer, E))


def test_the_layers_tensors_with_a_row_per_expert_are_found():
    layer = Layer(w13_bias=torch.randn(E, 6), w13_input_scale=torch.tensor(3.0), w2_weight_scale=torch.rand(E))
    assert names(layer) == {"w13_weight", "w2_weight", "w13_bias", "w2_weight_scale"}


def test_those_of_the_router_are_left_alone():
    layer = Layer(e_score_correction_bias=torch.randn(E))
    assert names(layer) == {"w13_weight", "w2_weight"}
    leave_where_it_is(layer)
    assert [name for name, _ in layer.named_parameters()] == ["e_score_correction_bias"]
    assert {name for name, _ in layer.named_buffers()} == {"w13_weight", "w2_weight"}


def test_a_vector_that_only_the_quantisation_config_holds_is_found():
    layer = Layer()
    layer.hold(alpha_or_gscale=torch.rand(E))
    assert names(layer) == {"w13_weight", "w2_weight", "quant_method.moe_quant_config.alpha_or_gscale"}


def test_the_quantisation_config_is_known_where_the_kernel_holds_it():
    layer = Layer()
    layer.hold(alpha_or_gscale=torch.rand(E))
    layer.quant_method.moe_kernel = Holder(quant_config=layer.quant_method.moe_quant_config)
    assert names(layer) == {"w13_weight", "w2_weight", "quant_method.moe_kernel.quant_config.alpha_or_gscale"}


def test_two_names_of_one_tensor_are_one_piece_of_memory():
    layer = Layer()
    layer.w13_qweight = layer.w13_weight
    layer.hold(scale=layer.w13_weight, same=layer.w13_weight.data)
    found = find_expert_tensors(layer, E)
    assert set(found) == {"w13_weight", "w2_weight"}
    assert len(found["w13_weight"].holders) == 2


@pytest.mark.parametrize("tensor", [torch.full((E,), 0.5), torch.tensor([[6, 8]] * E), torch.ones(1, 4).expand(E, 4)])
def test_short_rows_that_are_equal_for_all_stay_where_they_are(tensor):
    layer = Layer()
    layer.strides = tensor
    assert names(layer) == {"w13_weight", "w2_weight"}


def test_nothing_has_rows_of_no_bytes():
    assert names(Layer(w13_g_idx=torch.empty(E, 0))) == {"w13_weight", "w2_weight"}


def test_an_unknown_tensor_with_a_row_per_expert_is_refused():
    layer = Layer()
    layer.quant_method.kernel = Holder(mystery=torch.randn(E, 3))
    with pytest.raises(TakeoverError, match=r"quant_method\.kernel\.mystery \(16, 3\)"):
        find_expert_tensors(layer, E)


def test_a_view_with_rows_of_another_length_is_refused():
    layer = Layer()
    layer.hold(scale=torch.as_strided(layer.w13_weight.data, (E, 8), (8, 1)))
    with pytest.raises(TakeoverError, match=r"scale \(16, 8\).*rows of another length"):
        find_expert_tensors(layer, E)


def test_rows_that_are_not_apart_are_refused():
    with pytest.raises(TakeoverError, match=r"w13_scale.*rows that are not apart"):
        find_expert_tensors(Layer(w13_scale=torch.randn(3, E).T), E)


def test_a_layer_without_experts_is_refused():
    layer = Layer()
    del layer.w13_weight, layer.w2_weight
    with pytest.raises(TakeoverError, match="no expert weights"):
        find_expert_tensors(layer, E)


def test_a_weight_inside_a_wrapper_is_refused_although_its_bias_is_there():
    layer = Layer(w13_bias=torch.randn(E, 6))
    weight = layer.w13_weight.data
    del layer.w13_weight
    layer.w13_weight = Wrapper(weight.reshape(1, -1))
    found = find_expert_tensors(layer, E)
    with pytest.raises(TakeoverError, match=r"w13_weight of model\.layers\.3\.mlp\.experts is a Wrapper"):
        check_weights_are_among(layer, found)


def test_a_wrapped_tensor_with_a_row_per_expert_is_refused_by_its_path():
    layer = Layer()
    layer.quant_method.weight = Wrapper(torch.randn(E, 40))
    with pytest.raises(TakeoverError, match=r"quant_method\.weight\.storage \(16, 40\)"):
        find_expert_tensors(layer, E)


def other_rows(tensor: ExpertTensor) -> torch.Tensor:
    """Rows of the same shape and dtype, each byte another than before."""
    bytes_of_rows = tensor.rows.reshape(len(tensor.rows), -1).view(torch.uint8)
    return (bytes_of_rows + 1).view(tensor.rows.dtype).reshape(tensor.rows.shape)


@pytest.mark.parametrize(
    "view",
    [
        lambda base: base,
        lambda base: base[:, 2:],
        lambda base: base.view(torch.int8),
        lambda base: base.transpose(1, 2),
        lambda base: base[:, ::2, 3],
    ],
    ids=["itself", "second part", "other type", "transposed", "every second"],
)
def test_every_view_sees_the_rows_that_took_their_place(view):
    layer = Layer()
    held = view(layer.w13_weight.data)
    layer.hold(scale=held)
    tensor = find_expert_tensors(layer, E)["w13_weight"]
    rows = other_rows(tensor)
    tensor.replace(rows)
    assert layer.w13_weight.data_ptr() == rows.data_ptr()
    assert torch.equal(held.float().nan_to_num(7), view(rows).float().nan_to_num(7))
    assert held.stride() == view(rows).stride()


@pytest.mark.parametrize("pad", [0, 5])
def test_rows_in_another_order_of_dimensions_or_with_a_gap_between_them_are_taken_whole(pad):
    memory = torch.randn(E, 8 * 4 + pad)
    layer = Layer(w13_scale=memory[:, :32].unflatten(1, (4, 8)).transpose(1, 2))
    tensor = find_expert_tensors(layer, E)["w13_scale"]
    assert tensor.rows.shape == ((E, 32 + pad))
    assert torch.equal(tensor.rows, memory)
    rows = torch.randn(E, 32 + pad)
    tensor.replace(rows)
    assert torch.equal(layer.w13_scale.data, rows[:, :32].unflatten(1, (4, 8)).transpose(1, 2))


def test_the_walk_ends_on_cycles():
    layer = Layer()
    layer.quant_method.held = {"layer": layer, "again": [layer.quant_method]}
    paths = [path for path, _ in reachable_tensors(layer, "Layer", lambda module: True)]
    assert len(paths) == len(set(paths)) == 2
