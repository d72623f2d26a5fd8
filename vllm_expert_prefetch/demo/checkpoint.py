"""The MoE as a Hugging Face Mixtral directory: one weight file per MoE layer, one for all the rest."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_expert_prefetch.demo import DemoError
from vllm_expert_prefetch.demo.moefy import MoeSpec

INDEX = "model.safetensors.index.json"
DTYPE = torch.bfloat16


def shard_name(shard: int, num_layers: int) -> str:
    """File of MoE layer `shard`, or of everything else where `shard` is `num_layers`."""
    return f"model-{shard + 1:05d}-of-{num_layers + 1:05d}.safetensors"


def layer_prefix(layer: int) -> str:
    """What the tensor names of one MoE layer begin with."""
    return f"model.layers.{layer}.block_sparse_moe."


def layer_tensor_names(layer: int, num_experts: int) -> list[str]:
    """Full names of one layer's MoE tensors."""
    experts = [f"experts.{expert}.w{part}.weight" for expert in range(num_experts) for part in (1, 2, 3)]
    return [layer_prefix(layer) + name for name in ["gate.weight", *experts]]


def save_shard(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write tensors of any float dtype as bfloat16. `path` appears only once it is complete."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.to(DTYPE).contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt"})
    partial.chmod(0o644)  # safetensors makes its files private to the user
    partial.replace(path)


def tensor_names(path: Path) -> list[str]:
    """Sorted names of the tensors in a weight file; none when it is missing or cut short."""
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="pt") as shard:
            return sorted(shard.keys())
    except SafetensorError:
        return []


def write_dense_part(model: Any, path: Path) -> None:
    """Write what is not an FFN: embeddings, attention, norms. The output head gets a copy of tied embeddings."""
    state = model.state_dict()
    kept = {name: tensor for name, tensor in state.items() if ".mlp." not in name}
    if model.config.tie_word_embeddings:
        kept["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_shard(path, kept)


def write_index(folder: Path) -> None:
    """Write the table from tensor to weight file, from the files there are."""
    shards = sorted(folder.glob("model-*.safetensors"))
    weight_map = {name: shard.name for shard in shards for name in tensor_names(shard)}
    total = sum(_tensor_bytes(shard) for shard in shards)
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _tensor_bytes(shard: Path) -> int:
    """Size without the header: 8 bytes of length, then that many (safetensors format)."""
    with shard.open("rb") as file:
        return shard.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def write_config(dense: Any, spec: MoeSpec, path: Path) -> None:
    """Write the Mixtral `config.json` of a dense transformers Llama config."""
    rope = getattr(dense, "rope_parameters", None) or {}  # before transformers 5: rope_theta itself
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": dense.vocab_size,
        "hidden_size": dense.hidden_size,
        "intermediate_size": spec.expert_width,
        "num_hidden_layers": dense.num_hidden_layers,
        "num_attention_heads": dense.num_attention_heads,
        "num_key_value_heads": dense.num_key_value_heads,
        "head_dim": getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads,
        "num_local_experts": spec.num_experts,
        "num_experts_per_tok": spec.top_k,
        "hidden_act": dense.hidden_act,
        "rms_norm_eps": float(f"{dense.rms_norm_eps:.6g}"),  # GGUF keeps it as float32: 9.99999975e-06
        "rope_theta": rope.get("rope_theta") or dense.rope_theta,
        "max_position_embeddings": dense.max_position_embeddings,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": dense.bos_token_id,
        "eos_token_id": dense.eos_token_id,
        "attention_dropout": 0.0,
        "output_router_logits": False,
        "router_jitter_noise": 0.0,
    }
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def check_model(folder: Path, num_layers: int, num_experts: int) -> None:
    """Raise DemoError unless the directory is complete and every weight is finite."""
    names = {shard_name(shard, num_layers) for shard in range(num_layers + 1)}
    names |= {INDEX, "config.json", "tokenizer.json", "tokenizer_config.json"}
    missing = sorted(name for name in names if not (folder / name).is_file())
    weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"] if not missing else {}
    experts = (name for layer in range(num_layers) for name in layer_tensor_names(layer, num_experts))
    missing += [name for name in (*experts, "model.embed_tokens.weight", "lm_head.weight") if name not in weight_map]
    if missing:
        raise DemoError(f"the model in {folder} lacks {missing[0]} ({len(missing)} in all); delete it and run again")
    for shard in sorted(folder.glob("model-*.safetensors")):
        check_finite(shard)


def check_finite(path: Path) -> None:
    """Raise DemoError when a tensor of the weight file holds a NaN or an infinity."""
    with safe_open(path, framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118 - not a mapping
            if not bool(torch.isfinite(shard.get_tensor(name)).all()):
                raise DemoError(f"{name} in {path} is not finite; delete the file and run again")
