"""Once the row space is in place, no old expert tensor may be reachable from a layer: kernels keep references."""

from typing import Any

import pytest
import torch
from test_expert_tensors import Holder, Layer

from vllm_expert_prefetch.serving.expert_tensors import TakeoverError, find_expert_tensors
from vllm_expert_prefetch.serving.takeover import replace_rows, verify_rows, verify_taken_over

E = 16


def take_over(layer: Layer) -> dict[str, torch.Tensor]:
    """The rows that took the place of the layer's tensors."""
    found = find_expert_tensors(layer, E)
    rows = {name: torch.zeros_like(tensor.rows) for name, tensor in found.items()}
    replace_rows(layer, found, rows)
    verify_rows(layer, found, E)
    return rows


def test_a_kernel_that_keeps_the_parameter_object_sees_the_row_space():
    layer = Layer(w13_bias=torch.randn(E, 6))
    layer.quant_method.held = Holder(bias=layer.w13_bias)
    rows = take_over(layer)
    assert layer.quant_method.held.bias.data_ptr() == rows["w13_bias"].data_ptr()
    assert layer.w13_bias.data_ptr() == rows["w13_bias"].data_ptr()


def test_the_loader_no_longer_sees_parameters():
    """It would move them back to the host: what is one per layer too, which the kernel reads where it is."""
    layer = Layer(e_score_correction_bias=torch.randn(E), w13_input_scale=torch.tensor(3.0))
    scale = layer.w13_input_scale
    take_over(layer)
    assert {name for name, _ in layer.named_parameters()} == {"e_score_correction_bias"}
    assert layer.state_dict().keys() == {"e_score_correction_bias"}
    assert layer.w13_input_scale is scale


class Elsewhere(Holder):
    """Of a module that may hold anything, such as a model's own layer."""


Elsewhere.__module__ = "vllm.model_executor.models.test"


def hold(layer: Layer, **held: Any) -> Any:
    layer.quant_method.held = Elsewhere(**held)
    return layer


@pytest.mark.parametrize(
    "capture",
    [
        lambda layer: hold(layer, full=layer.w2_weight.data),
        lambda layer: hold(layer, part=layer.w13_weight.data[:, :3]),
        lambda layer: hold(layer, scales=[(layer.w2_weight.detach(),)]),
        lambda layer: hold(layer, one=layer.w2_weight.data[3]),
    ],
    ids=["full", "part of each row", "inside containers", "one expert"],
)
def test_whoever_keeps_the_full_tensor_is_found_by_name(capture):
    layer = capture(Layer())
    with pytest.raises(TakeoverError, match=r"held.*still holds the full expert tensor"):
        take_over(layer)


def data(layer: Layer) -> None:
    layer.w2_weight.data = torch.zeros_like(layer.w2_weight)


def whole_tensor(layer: Layer) -> None:
    layer.w2_weight = torch.zeros_like(layer.w2_weight)


def fewer_rows(layer: Layer) -> None:
    layer.w2_weight.data = layer.w2_weight.data[:3]


def scale_of_the_kernel(layer: Layer) -> None:
    layer.hold(scale=torch.randn(E, 5))


@pytest.mark.parametrize("change", [data, whole_tensor, fewer_rows, scale_of_the_kernel])
def test_whatever_was_replaced_since_is_found_by_name(change):
    layer = Layer()
    found = find_expert_tensors(layer, E)
    replace_rows(layer, found, {name: torch.zeros_like(tensor.rows) for name, tensor in found.items()})
    verify_rows(layer, found, E)
    change(layer)
    with pytest.raises(TakeoverError, match=r"(w2_weight|scale) .*"):
        verify_rows(layer, found, E)


def test_a_model_without_taken_over_layers_fails_by_name():
    layer = Layer()
    with pytest.raises(TakeoverError, match=r"model\.layers\.3\.mlp\.experts"):
        verify_taken_over([layer])
    with pytest.raises(TakeoverError, match="none of the model's layers"):
        verify_taken_over([])
    layer.is_taken_over = True
    verify_taken_over([layer])
