"""Once the row space is in place, no old expert tensor may be reachable from a layer: kernels keep references."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from vllm_expert_prefetch.serving.takeover import (
    TakeoverError,
    expert_parameters,
    reachable_tensors,
    replace_rows,
    verify_taken_over,
)

E = 16


class Kernel(nn.Module):
    """Stands for vLLM's quant method and kernel: `held` is what it captured before the takeover."""

    def __init__(self) -> None:
        super().__init__()
        self.held: object = None


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w13_weight = nn.Parameter(torch.randn(E, 6, 8), requires_grad=False)
        self.w13_bias = nn.Parameter(torch.randn(E, 6), requires_grad=False)
        self.e_score_correction_bias = nn.Parameter(torch.randn(E), requires_grad=False)
        self.quant_method = Kernel()


@dataclass
class QuantConfig:
    bias: torch.Tensor


Kernel.__module__ = QuantConfig.__module__ = "vllm.test"  # the walk follows vLLM's objects only


def rows_for(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(parameter) for name, parameter in expert_parameters(layer, E).items()}


def test_parameters_of_the_router_are_left_alone():
    assert set(expert_parameters(Layer(), E)) == {"w13_weight", "w13_bias"}


def test_an_unknown_parameter_with_a_row_per_expert_is_refused():
    layer = Layer()
    layer.mystery = nn.Parameter(torch.zeros(E, 3))
    with pytest.raises(TakeoverError, match=r"mystery \(16, 3\)"):
        expert_parameters(layer, E)


def test_a_transposed_parameter_is_refused():
    layer = Layer()
    layer.w2_weight = nn.Parameter(torch.zeros(E, 8, 6).transpose(1, 2), requires_grad=False)
    with pytest.raises(TakeoverError, match="w2_weight"):
        expert_parameters(layer, E)


def test_a_kernel_that_keeps_the_parameter_object_sees_the_row_space():
    layer = Layer()
    layer.quant_method.held = QuantConfig(layer.w13_bias)
    rows = rows_for(layer)
    replace_rows(layer, rows)
    assert layer.quant_method.held.bias.data_ptr() == rows["w13_bias"].data_ptr()
    assert layer.w13_bias.data_ptr() == rows["w13_bias"].data_ptr()


def test_the_loader_no_longer_sees_the_rows_as_parameters():
    layer = Layer()
    replace_rows(layer, rows_for(layer))
    assert {name for name, _ in layer.named_parameters()} == {"e_score_correction_bias"}
    assert not layer.state_dict().keys() & {"w13_weight", "w13_bias"}


@pytest.mark.parametrize(
    "capture",
    [
        lambda layer: layer.w13_bias.data,
        lambda layer: QuantConfig(layer.w13_weight.data[:, :3]),
        lambda layer: {"scales": [(layer.w13_bias.detach(),)]},
    ],
    ids=["data", "view inside a config", "detached inside containers"],
)
def test_a_kernel_that_keeps_the_full_tensor_is_found_by_name(capture):
    layer = Layer()
    layer.quant_method.held = capture(layer)
    with pytest.raises(TakeoverError, match=r"held.*still holds the full expert tensor"):
        replace_rows(layer, rows_for(layer))


def test_the_walk_ends_on_cycles():
    layer = Layer()
    layer.quant_method.held = {"layer": layer}
    paths = [path for path, _ in reachable_tensors(layer)]
    assert len(paths) == len(set(paths)) == 3


def test_a_model_without_taken_over_layers_fails_by_name():
    layer = Layer()
    layer.layer_name = "model.layers.3.mlp.experts"
    with pytest.raises(TakeoverError, match=r"model\.layers\.3\.mlp\.experts"):
        verify_taken_over([layer])
    with pytest.raises(TakeoverError, match="none of the model's layers"):
        verify_taken_over([])
    layer.is_taken_over = True
    verify_taken_over([layer])
