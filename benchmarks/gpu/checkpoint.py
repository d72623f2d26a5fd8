"""Checkpoints of Qwen3-MoE's architecture with random weights, and what their routing is like."""

import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import block_fp8
import torch
from chain import Chain, ChainOptions, make_chain, walk
from random_layers import LayerWeights, Probe, Tensors
from safetensors.torch import save_file
from shapes import MoeShape


@dataclass(frozen=True)
class CheckpointOptions:
    """What to write. `fp8`: linear layers and experts in FP8 by blocks; embeddings, gates and norms stay bfloat16."""

    shape: MoeShape
    chain: ChainOptions
    fp8: bool = False
    num_probed: int = 384


def write_checkpoint(folder: Path, options: CheckpointOptions, device: torch.device) -> dict[str, Any]:
    """Write the model, unless it is there already; its measured routing and its size."""
    done = folder / "made_by.json"
    asked = asdict(options)
    if done.exists() and (made := json.loads(done.read_text()))["options"] == json.loads(json.dumps(asked)):
        return made["result"]
    folder.mkdir(parents=True, exist_ok=True)
    done.unlink(missing_ok=True)
    shape = options.shape
    chain = make_chain(shape.vocab, shape.hidden, options.chain, device)
    probe = Probe(shape, options.chain, chain.embeddings[walk(shape.vocab, 0, options.num_probed)])
    num_bytes = 0
    for name, tensors in itertools.chain([("rest", _rest(chain))], _layers(options, probe, device)):
        _save(folder / f"model-{name}.safetensors", tensors)
        num_bytes += sum(tensor.nbytes for tensor in tensors.values())
    config = json.dumps(model_config(options), indent=1)
    (folder / "config.json").write_text(config + "\n")
    result = {"gb": round(num_bytes / 1e9, 3), "routing": probe.statistics()}
    done.write_text(json.dumps({"options": asked, "result": result}) + "\n")
    return result


def _save(path: Path, tensors: Tensors) -> None:
    save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, path, {"format": "pt"})


def _rest(chain: Chain) -> Tensors:
    ones = torch.ones(chain.embeddings.shape[1])
    tensors = {"model.embed_tokens": chain.embeddings, "lm_head": chain.outputs, "model.norm": ones}
    return {f"{name}.weight": tensor.bfloat16() for name, tensor in tensors.items()}


def _layers(options: CheckpointOptions, probe: Probe, device: torch.device) -> Iterator[tuple[str, Tensors]]:
    for layer in range(options.shape.num_layers):
        generator = torch.Generator(device).manual_seed(options.chain.seed * 1000 + layer)
        weights = LayerWeights.random(options.shape, generator)
        probe.through(weights)
        yield f"{layer:05d}", weights.tensors(f"model.layers.{layer}.", options.fp8)


def model_config(options: CheckpointOptions) -> dict[str, Any]:
    """`config.json`."""
    shape = options.shape
    kept = ["lm_head", *(f"model.layers.{layer}.mlp.gate" for layer in range(shape.num_layers))]
    fp8 = {"quantization_config": {**block_fp8.CONFIG, "modules_to_not_convert": kept}}
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": 3 * shape.hidden,
        "moe_intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_size,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.top_k,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **(fp8 if options.fp8 else {}),
    }
