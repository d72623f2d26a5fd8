"""Random LoRA adapters for the tiny model, in PEFT's format."""

import json
from pathlib import Path

import torch
from engines import TINY_MODEL
from safetensors.torch import save_file

RANK = 8
ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")


def write_adapter(folder: Path, modules: tuple[str, ...] = ATTENTION) -> Path:
    """An adapter of every layer's `modules`, the same for each call; as strong as what it is added to."""
    config = json.loads((TINY_MODEL / "config.json").read_text())
    hidden, generator = config["hidden_size"], torch.Generator().manual_seed(0)
    heads = {"q_proj": config["num_attention_heads"], "v_proj": config["num_key_value_heads"]}
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for module in modules:
            name = module.rpartition(".")[2]
            outputs = heads[name] * config["head_dim"] if name in heads else config["moe_intermediate_size"]
            for part, shape in (("lora_A", (RANK, hidden)), ("lora_B", (outputs, RANK))):
                weight = torch.randn(shape, generator=generator) / shape[1] ** 0.5
                tensors[f"base_model.model.model.layers.{layer}.{module}.{part}.weight"] = weight
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    peft = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": list(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(peft))
    return folder
