"""Tiny random checkpoints of the model families, for engine tests.

`write_checkpoint("mixtral", directory)` writes `config.json` and `model.safetensors` (bfloat16, a few MB), which
stock vLLM loads. There is no tokenizer: start engines with `skip_tokenizer_init=True` and give prompts as token ids
below `VOCAB_SIZE`, `{"prompt_token_ids": [...]}`.

Names and shapes of the tensors come from the family's own Transformers class, the values from here. They are scaled
so that a wrong expert shows in the generated tokens: routing depends on the token and reaches all experts, and two
experts swapped in one layer, or only their biases, change most completions of 32 tokens. Only one token in
`LOUD_EVERY` has a large output row, which keeps the two best logits apart.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VOCAB_SIZE = 512
NUM_EXPERTS = 16
LOUD_EVERY = 16
PROMPT_LENGTHS = (5, 20, 40, 90)

# Sizes the CPU kernels of vLLM 0.32 accept: MoE sizes in multiples of 32, attention heads of 64.
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
GROUPED_QUERY: dict[str, Any] = {**COMMON, "num_hidden_layers": 3, "num_key_value_heads": 1}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
# vLLM's reference MLA kernel for CPUs has one head size, 576 = 512 + 64 (vllm/v1/attention/backends/mla/cpu_mla.py).
# YaRN as in the published models: with plain RoPE, vLLM 0.32 eager on CPU rotates the sliced queries of MLA wrongly,
# and a prompt's tokens change with the batch it is in.
DEEPSEEK: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 4,
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "n_routed_experts": NUM_EXPERTS,
    "moe_intermediate_size": 64,
}


@dataclass(frozen=True)
class Family:
    """One model family: its Transformers configuration and where its experts are.

    `config_class` is a class name of `transformers`, `config` its arguments. Each token of an MoE layer goes to
    `top_k` of `num_experts` experts (both 0 for a dense model). In vLLM the MoE layers are named
    `model.layers.{first_moe_layer..}.{experts_name}`. `prompt_seeds` are the seeds of `prompts`, one per length.
    """

    config_class: str
    config: Mapping[str, Any]
    prompt_seeds: tuple[int, ...]
    num_experts: int = NUM_EXPERTS
    top_k: int = 2
    first_moe_layer: int = 0
    experts_name: str = "mlp.experts"

    @property
    def moe_layers(self) -> list[str]:
        """vLLM's names of the MoE layers, first to last; empty for a dense model."""
        if not self.num_experts:
            return []
        layers = range(self.first_moe_layer, self.config["num_hidden_layers"])
        return [f"model.layers.{layer}.{self.experts_name}" for layer in layers]

    @property
    def prompts(self) -> list[dict[str, list[int]]]:
        """Four prompts of `PROMPT_LENGTHS` tokens, the best of 100 each for checkpoints of seed 0.

        In their first 32 greedy tokens the best token leads the second by 0.18 nats or more (vLLM 0.32 CPU, eager,
        bfloat16), at least three steps of a bfloat16 logit; of random prompts more than a quarter have an exact tie.
        That is enough for a difference in a last bit, not for other kernels: compiled and eager runs differ by more.
        """
        return [prompt(*pair) for pair in zip(PROMPT_LENGTHS, self.prompt_seeds, strict=True)]


FAMILIES: dict[str, Family] = {
    "qwen3-moe": Family(
        "Qwen3MoeConfig",
        {
            **GROUPED_QUERY,
            "head_dim": 64,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "num_experts": NUM_EXPERTS,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        (87, 92, 20, 97),
    ),
    "qwen2-moe": Family(
        "Qwen2MoeConfig",
        {
            **GROUPED_QUERY,
            "intermediate_size": 256,
            "moe_intermediate_size": 64,
            "shared_expert_intermediate_size": 96,
            "num_experts": NUM_EXPERTS,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
        },
        (30, 6, 56, 77),
        top_k=4,
    ),
    "mixtral": Family(
        "MixtralConfig",
        {
            **GROUPED_QUERY,
            "intermediate_size": 64,
            "num_local_experts": NUM_EXPERTS,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
        (46, 84, 5, 80),
        experts_name="block_sparse_moe.experts",
    ),
    "olmoe": Family(
        "OlmoeConfig",
        {
            **GROUPED_QUERY,
            "intermediate_size": 64,
            "num_experts": NUM_EXPERTS,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
        },
        (79, 46, 77, 43),
        top_k=4,
    ),
    "deepseek-v2": Family(
        "DeepseekV2Config",
        {
            **DEEPSEEK,
            "num_key_value_heads": 2,
            "q_lora_rank": None,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
        },
        (90, 45, 11, 31),
        top_k=4,
        first_moe_layer=1,
    ),
    "deepseek-v3": Family(
        "DeepseekV3Config",
        {
            **DEEPSEEK,
            "num_key_value_heads": 2,
            "q_lora_rank": 64,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "num_nextn_predict_layers": 0,
        },
        (90, 68, 50, 46),
        top_k=4,
        first_moe_layer=1,
    ),
    "gpt-oss": Family(
        "GptOssConfig",
        {
            **GROUPED_QUERY,
            "head_dim": 64,
            "intermediate_size": 64,
            "num_local_experts": NUM_EXPERTS,
            "num_experts_per_tok": 4,
            "sliding_window": 32,
            "rope_parameters": {**YARN, "rope_theta": 150000.0, "truncate": False},
        },
        (76, 89, 93, 88),
        top_k=4,
    ),
    "llama": Family(
        "LlamaConfig",
        {**GROUPED_QUERY, "intermediate_size": 256},
        (61, 51, 5, 35),
        num_experts=0,
        top_k=0,
    ),
}

_EXPERTS = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
_LOCAL_EXPERTS = {"num_local_experts": NUM_EXPERTS, "num_experts_per_tok": 2}
_ROUTED_EXPERTS = {"n_routed_experts": NUM_EXPERTS, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
_SIZES = {"intermediate_size": 256, "moe_intermediate_size": 64}
_SMALL = {**GROUPED_QUERY, "intermediate_size": 64}
_LINEAR_ATTENTION = {
    "head_dim": 64,
    "shared_expert_intermediate_size": 64,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
# Name -> Transformers' configuration class, its arguments, and how many of its layers are MoE layers.
OTHER_FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "granite-moe": ("GraniteMoeConfig", {**_SMALL, **_LOCAL_EXPERTS}, 3),
    "granite-moe-shared": ("GraniteMoeSharedConfig", {**_SMALL, **_LOCAL_EXPERTS, "shared_intermediate_size": 96}, 3),
    "llama4": (
        "Llama4TextConfig",
        {
            **_SMALL,
            "head_dim": 64,
            "intermediate_size_mlp": 128,
            "num_local_experts": NUM_EXPERTS,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 256,
        },
        3,
    ),
    "hunyuan": ("HunYuanMoEV1Config", {**_SMALL, "head_dim": 64, "num_experts": NUM_EXPERTS, "moe_topk": 2}, 3),
    "glm4-moe": (
        "Glm4MoeConfig",
        {**GROUPED_QUERY, **_SIZES, **_ROUTED_EXPERTS, "head_dim": 64, "n_shared_experts": 1},
        2,
    ),
    "ernie4.5": (
        "Ernie4_5_MoeConfig",
        {
            **GROUPED_QUERY,
            **_SIZES,
            "moe_num_experts": NUM_EXPERTS,
            "moe_k": 2,
            "moe_layer_end_index": 2,
            "tie_word_embeddings": True,
        },
        2,
    ),
    "dots1": (
        "Dots1Config",
        {**GROUPED_QUERY, **_SIZES, **_ROUTED_EXPERTS, "first_k_dense_replace": 1, "n_shared_experts": 1},
        2,
    ),
    "lfm2-moe": (
        "Lfm2MoeConfig",
        {
            **GROUPED_QUERY,
            **_SIZES,
            **_EXPERTS,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "tie_word_embeddings": True,
        },
        2,
    ),
    "qwen3-next": (
        "Qwen3NextConfig",
        {
            **GROUPED_QUERY,
            **_SIZES,
            **_EXPERTS,
            **_LINEAR_ATTENTION,
        },
        3,
    ),
    "exaone-moe": ("ExaoneMoeConfig", {**GROUPED_QUERY, **_SIZES, **_EXPERTS, "n_group": 1, "topk_group": 1}, 2),
    "flex-olmo": ("FlexOlmoConfig", {**_SMALL, **_EXPERTS}, 3),
    "phimoe": (
        "PhimoeConfig",
        {
            **_SMALL,
            **_LOCAL_EXPERTS,
            "attention_bias": True,
            "lm_head_bias": True,
            "architectures": ["PhiMoEForCausalLM"],
        },
        3,
    ),
    "cohere2-moe": (
        "Cohere2MoeConfig",
        {**_SMALL, **_EXPERTS, "head_dim": 64, "sliding_window": 32, "tie_word_embeddings": True},
        3,
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {
            **GROUPED_QUERY,
            **_SIZES,
            "enable_moe_block": True,
            "num_experts": NUM_EXPERTS,
            "top_k_experts": 2,
            "head_dim": 64,
            "global_head_dim": 64,
            "hidden_size_per_layer_input": 0,
            "sliding_window": 32,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "tie_word_embeddings": True,
        },
        3,
    ),
    "granite-moe-hybrid": (
        "GraniteMoeHybridConfig",
        {
            **_SMALL,
            **_LOCAL_EXPERTS,
            "shared_intermediate_size": 96,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 4,
            "mamba_d_state": 64,
            "mamba_d_head": 64,
        },
        3,
    ),
    "glm4-moe-lite": (
        "Glm4MoeLiteConfig",
        {
            **DEEPSEEK,
            "num_key_value_heads": 2,
            "q_lora_rank": 64,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        },
        3,
    ),
    "afmoe": (
        "AfmoeConfig",
        {
            **GROUPED_QUERY,
            **_SIZES,
            **_EXPERTS,
            "head_dim": 64,
            "num_dense_layers": 1,
            "num_shared_experts": 1,
            "sliding_window": 32,
            "global_attn_every_n_layers": 2,
            "score_func": "sigmoid",
            "route_norm": True,
            "n_group": 1,
            "topk_group": 1,
        },
        2,
    ),
    "qwen3.5-moe": (
        "Qwen3_5MoeTextConfig",
        {**GROUPED_QUERY, **_EXPERTS, **_LINEAR_ATTENTION, "moe_intermediate_size": 64},
        3,
    ),
    "qwen3-vl-moe": (
        "Qwen3VLMoeConfig",
        {
            "text_config": {
                **GROUPED_QUERY,
                **_SIZES,
                **_EXPERTS,
                "head_dim": 64,
                "norm_topk_prob": True,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 10, 10]},
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 64,
                "intermediate_size": 64,
                "num_heads": 2,
                "out_hidden_size": 128,
                "num_position_embeddings": 64,
                "deepstack_visual_indexes": [0],
            },
            "image_token_id": VOCAB_SIZE - 1,
            "video_token_id": VOCAB_SIZE - 2,
            "vision_start_token_id": VOCAB_SIZE - 3,
            "vision_end_token_id": VOCAB_SIZE - 4,
            "tie_word_embeddings": False,
        },
        3,
    ),
    "longcat": (
        "LongcatFlashConfig",
        {
            **COMMON,
            "num_layers": 2,
            "num_key_value_heads": 2,
            "rope_parameters": DEEPSEEK["rope_parameters"],
            "q_lora_rank": 64,
            "kv_lora_rank": 512,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 64,
            "head_dim": 64,
            "n_routed_experts": NUM_EXPERTS,
            "ffn_hidden_size": 256,
            "expert_ffn_hidden_size": 64,
            "moe_topk": 4,
            "zero_expert_num": 8,
            "zero_expert_type": "identity",
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
        },
        2,
    ),
}


def _like_longcat(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    """Experts that compute nothing have no weights in a published checkpoint."""
    found = re.search(r"experts\.(\d+)\.", name)
    return None if found and int(found[1]) >= NUM_EXPERTS else tensor


def _like_qwen3_vl(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """All experts in one tensor, inputs before outputs."""
    return tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor


# Family -> what a published checkpoint has in place of a tensor that Transformers writes.
PUBLISHED = {"longcat": _like_longcat, "qwen3-vl-moe": _like_qwen3_vl}


def write_checkpoint(name: str, directory: Path | str, seed: int = 0, **changes: Any) -> Path:
    """Write a random checkpoint of the family `name` into `directory` (created if needed) and return the directory.

    `changes` of the family's configuration. The same arguments and library versions give the same values. KeyError if
    there is no such family.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.models.auto import modeling_auto

    config = config_of(name, **changes)
    is_text = type(config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    auto: Any = modeling_auto.AutoModelForCausalLM if is_text else modeling_auto.AutoModelForImageTextToText
    architectures = config.architectures
    with torch.device("meta"):
        model = auto.from_config(config)
    model.to_empty(device="cpu")
    random_weights(model, seed)
    model.save_pretrained(directory)
    if architectures:  # Transformers writes the name of its own class
        config.architectures = architectures
        config.save_pretrained(directory)
    if name in PUBLISHED:
        path = Path(directory) / "model.safetensors"
        published = {key: PUBLISHED[name](key, tensor) for key, tensor in load_file(path).items()}
        save_file({key: tensor for key, tensor in published.items() if tensor is not None}, path, {"format": "pt"})
    return Path(directory)


def config_of(name: str, **changes: Any) -> Any:
    """Transformers' configuration of the family `name`, with `changes`. KeyError if there is no such family."""
    import transformers

    if name in FAMILIES:
        config_class, given = FAMILIES[name].config_class, FAMILIES[name].config
    else:
        config_class, given, _ = OTHER_FAMILIES[name]
    return getattr(transformers, config_class)(**{**given, **changes}, dtype="bfloat16")


def random_weights(model: Any, seed: int = 0) -> None:
    """Give every tensor of a model of Transformers random values."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    for tensor_name, tensor in model.state_dict().items():
        tensor.copy_(random_values(tensor_name, tensor, generator))


def prompt(length: int, seed: int) -> dict[str, list[int]]:
    """A prompt of `length` random tokens, in the form vLLM takes without a tokenizer."""
    chance = random.Random(seed)
    return {"prompt_token_ids": [chance.randrange(VOCAB_SIZE) for _ in range(length)]}


def random_values(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random float32 values in the shape of the parameter `like`, scaled by what its Transformers name says it is.

    Uniform, not normal: the last bits of `torch.randn` may depend on the vector width of the CPU.
    """
    import torch

    unit = (torch.rand(like.shape, generator=generator) - 0.5) * 12**0.5
    if "norm" in name or name.endswith(("scale", "scalar")):
        return (1 + 0.1 * unit) * (2.5 if "q_norm" in name or "k_norm" in name else 1)
    if name.endswith("embed_tokens.weight"):
        return unit
    if name.endswith(("e_score_correction_bias", "expert_bias")):
        return 0.3 * unit
    if like.dim() == 1 or name.endswith("_bias"):
        return 0.5 * unit
    if name.endswith("lm_head.weight"):
        unit *= loudness(like.shape[0])[:, None]
    return gain(name) * unit / like.shape[-1] ** 0.5


def loudness(vocab_size: int) -> torch.Tensor:
    """Scale of each token's output row, shape (vocab_size,): 4 for one token in `LOUD_EVERY`, 0.5 for the others."""
    import torch

    scales = torch.full((vocab_size,), 0.5)
    scales[::LOUD_EVERY] = 4.0
    return scales


_SHARP = (
    "mlp.gate.weight",
    "mlp.router.weight",
    "router.gate.weight",
    "q_proj.weight",
    "q_b_proj.weight",
    "k_proj.weight",
)


def gain(name: str) -> float:
    """Root mean square of a weight's product with a normalised input (within a factor of 1.5 for gpt-oss's experts)."""
    if name.endswith(_SHARP):
        return 2.5
    return 2.0 if "gate_proj" in name or "up_proj" in name else 1.0
