"""A MoE model's shape, from its config.json: no weights, no torch, no vLLM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.planning.attention import Attention, attention_of

_NUM_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts", "moe_k", "moe_topk")
_SHARED = (
    "moe_shared_expert_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "share_expert_dim",
)
_NUM_SHARED = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
_EXPERT_INPUT = ("moe_latent_size", "routed_expert_hidden_size")
"""Experts that work on fewer numbers than the hidden size, between two projections of the layer."""


@dataclass(frozen=True)
class Architecture:
    """What planning needs to know of a model. Sizes are numbers of elements, not bytes."""

    model_type: str
    hidden_size: int
    vocab_size: int
    max_context: int
    num_experts: int
    top_k: int
    moe_layers: int
    expert_hidden: int
    expert_intermediate: int
    is_gated: bool
    """Gate and up projections, or one alone."""
    has_bias: bool
    attention: tuple[Attention, ...]
    """Of every layer."""
    embedding_parameters: int
    dense_parameters: int
    """All others that are no routed expert's: attention, dense layers, shared experts, routers."""
    shared_intermediate: int
    dense_layers: int

    @property
    def expert_parameters(self) -> int:
        """Of one expert, biases left out."""
        return (3 if self.is_gated else 2) * self.expert_hidden * self.expert_intermediate

    @property
    def total_parameters(self) -> int:
        """Of the language model, without vision or audio towers and layers of drafts."""
        return (
            self.moe_layers * self.num_experts * self.expert_parameters
            + self.dense_parameters
            + self.embedding_parameters
        )

    @property
    def active_parameters(self) -> int:
        """What one token multiplies: everything but the embedding's table and the experts that are not its own."""
        return (
            self.moe_layers * self.top_k * self.expert_parameters
            + self.dense_parameters
            + self.vocab_size * self.hidden_size
        )

    def sequence_bytes(self, num_tokens: int, element_bytes: float, num_ranks: int) -> float:
        """KV cache and states of one sequence, on each of `num_ranks` tensor-parallel ranks."""
        return sum(layer.sequence_bytes(num_tokens, element_bytes, num_ranks) for layer in self.attention)


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """From config.json. Raises ConfigError for a model without routed experts, and names a key that is missing."""
    text = text_config(config)
    num_experts, top_k = _first(text, _NUM_EXPERTS), _first(text, _TOP_K)
    if not num_experts or not top_k:
        raise ConfigError(
            f"{config.get('model_type', 'this model')} has no routed experts: config.json has none of "
            f"{', '.join(_NUM_EXPERTS)}. Plain vLLM serves it"
        )
    try:
        return _read(text, int(num_experts), int(top_k))
    except KeyError as missing:
        raise ConfigError(
            f"config.json of {text.get('model_type', 'this model')} has no {missing.args[0]}: this kind of layer is "
            "not known to plan"
        ) from None


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of the language model, where config.json holds several."""
    inner = config.get("text_config")
    return inner if isinstance(inner, Mapping) and inner else config


def _read(text: Mapping[str, Any], num_experts: int, top_k: int) -> Architecture:
    hidden, vocab = text["hidden_size"], text["vocab_size"]
    attention = tuple(attention_of(text))
    moe_layers = _moe_layers(text, len(attention))
    dense_layers = 0 if _has_blocks(text) else len(attention) - moe_layers
    expert_hidden = _first(text, _EXPERT_INPUT) or hidden
    intermediate = text.get("moe_intermediate_size") or text["intermediate_size"]
    is_gated = text.get("mlp_hidden_act") != "relu2"
    matrices = 3 if is_gated else 2
    shared = _shared_intermediate(text, intermediate)
    beside = matrices * hidden * shared + hidden * num_experts
    if expert_hidden != hidden:
        beside += 2 * hidden * expert_hidden
    dense = _first(text, ("intermediate_size_mlp", "dense_intermediate_size", "intermediate_size")) or 0
    parameters = sum(layer.parameters for layer in attention)
    parameters += moe_layers * beside + dense_layers * matrices * hidden * dense
    return Architecture(
        model_type=str(text.get("model_type", "")),
        hidden_size=hidden,
        vocab_size=vocab,
        max_context=text.get("max_position_embeddings") or 4096,
        num_experts=num_experts,
        top_k=top_k,
        moe_layers=moe_layers,
        expert_hidden=expert_hidden,
        expert_intermediate=intermediate,
        is_gated=is_gated,
        has_bias=text.get("model_type") == "gpt_oss",
        attention=attention,
        embedding_parameters=vocab * hidden * (1 if text.get("tie_word_embeddings") else 2) + _ngram_parameters(text),
        dense_parameters=parameters,
        shared_intermediate=shared,
        dense_layers=dense_layers,
    )


def _moe_layers(text: Mapping[str, Any], num_layers: int) -> int:
    """Each family says it in its own way."""
    blocks = text.get("layers_block_type") or text.get("hybrid_override_pattern")
    if blocks:
        return sum(block in ("moe", "E") for block in blocks)
    if text.get("mlp_layer_types"):
        return sum(kind == "sparse" for kind in text["mlp_layer_types"])
    if isinstance(text.get("moe_layer_freq"), list):
        return sum(map(bool, text["moe_layer_freq"]))
    for key in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"):
        if key in text:
            return num_layers - int(text[key])
    if "interleave_moe_layer_step" in text:
        return num_layers // int(text["interleave_moe_layer_step"])
    step, dense = text.get("decoder_sparse_step") or 1, text.get("mlp_only_layers") or []
    return sum((layer + 1) % step == 0 and layer not in dense for layer in range(num_layers))


def _shared_intermediate(text: Mapping[str, Any], intermediate: int) -> int:
    """Rows of a layer's shared experts together."""
    if text.get("enable_moe_block"):  # Gemma 4: a dense network beside the experts
        return int(text["intermediate_size"])
    if text.get("model_type") == "llama4_text":
        return intermediate
    given = _first(text, _SHARED)
    return int(given) if given is not None else int(_first(text, _NUM_SHARED) or 0) * intermediate


def _ngram_parameters(text: Mapping[str, Any]) -> int:
    """Of tables that are looked up by n-grams of tokens (Qwen3.8-Flash-Next): 51 B beside its 125 B."""
    tables = len(text.get("ple_layer_ids") or [])
    width = text.get("ple_embed_dim") or text["hidden_size"]
    return int(tables * text.get("ngram_vocab_size_base", 20_000_000) * width)


def _has_blocks(text: Mapping[str, Any]) -> bool:
    """Whether a layer is either attention or experts, not both."""
    return bool(text.get("layers_block_type") or text.get("hybrid_override_pattern"))


def _first(text: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((text[name] for name in names if text.get(name) is not None), None)
