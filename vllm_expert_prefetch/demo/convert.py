"""Every layer of a dense model to a MoE layer on disk, one file per layer, so that a killed run can go on."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from vllm_expert_prefetch.demo.checkpoint import layer_prefix, layer_tensor_names, save_shard, shard_name, tensor_names
from vllm_expert_prefetch.demo.moefy import DenseFFN, MoeSpec, fit_layer


def convert_layers(model: Any, windows: torch.Tensor, spec: MoeSpec, folder: Path) -> None:
    """Write the weight file of each MoE layer that `folder` lacks.

    `model`: a float32 transformers Llama for causal LM. `windows`: int64 [num_windows, num_tokens], the calibration
    text. Each layer is fitted in the middle of one forward pass, when its activations are at hand: one layer's are in
    memory at a time, not those of the whole model. Raises ValueError as `fit_layer` does.
    """
    from tqdm import tqdm

    layers = model.model.layers
    missing = missing_layers(folder, len(layers), spec)
    if not missing:
        return
    bar = tqdm(total=len(layers), initial=len(layers) - len(missing), desc="dense to MoE", unit="layer")
    inputs: dict[int, torch.Tensor] = {}

    def hold(layer: int, mlp: Any, args: tuple[torch.Tensor]) -> None:
        inputs[layer] = args[0].flatten(0, 1)

    def fit(layer: int, down_proj: Any, args: tuple[torch.Tensor]) -> None:
        neurons = args[0].flatten(0, 1)
        tensors = fit_layer(inputs.pop(layer), neurons, dense_ffn(layers[layer].mlp), spec, layer)
        shard = {layer_prefix(layer) + name: tensor for name, tensor in tensors.items()}
        save_shard(folder / shard_name(layer, len(layers)), shard)
        bar.update()

    hooks = [layers[layer].mlp.register_forward_pre_hook(partial(hold, layer)) for layer in missing]
    hooks += [layers[layer].mlp.down_proj.register_forward_pre_hook(partial(fit, layer)) for layer in missing]
    try:
        with torch.inference_mode(), bar:
            model.model(input_ids=windows, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()


def missing_layers(folder: Path, num_layers: int, spec: MoeSpec) -> list[int]:
    """Layers without a complete weight file in `folder`."""

    def is_complete(layer: int) -> bool:
        expected = sorted(layer_tensor_names(layer, spec.num_experts))
        return tensor_names(folder / shard_name(layer, num_layers)) == expected

    return [layer for layer in range(num_layers) if not is_complete(layer)]


def dense_ffn(mlp: Any) -> DenseFFN:
    """The weights of a transformers Llama MLP."""
    return DenseFFN(gate=mlp.gate_proj.weight, up=mlp.up_proj.weight, down=mlp.down_proj.weight)
