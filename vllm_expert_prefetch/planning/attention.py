"""What a model's layers hold beside their experts, from its config.json: attention's weights, and what it caches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FULL, SLIDING, LATENT, LINEAR, MAMBA, CONV, COMPRESSED, NOTHING = (
    "full",
    "sliding",
    "latent",
    "linear",
    "mamba",
    "conv",
    "compressed",
    "nothing",
)
_NAMES = {
    "full_attention": FULL,
    "attention": FULL,
    "*": FULL,
    "chunked_attention": FULL,
    "indexed_attention": FULL,
    "minimax_m3_sparse": FULL,
    "sliding_attention": SLIDING,
    "linear_attention": LINEAR,
    "mamba": MAMBA,
    "M": MAMBA,
    "conv": CONV,
    "moe": NOTHING,
    "E": NOTHING,
    "mlp": NOTHING,
    "-": NOTHING,
}
"""How configurations call them. Chunked attention may see all tokens, as vLLM allocates for it."""
_FLOAT32_BYTES, _INDEX_BYTES = 4, 132
"""An index key: 128 bytes of FP8 and a scale (vLLM's DeepseekV32IndexerCache)."""


@dataclass(frozen=True)
class Attention:
    """One layer. Numbers, not bytes, unless it says so."""

    parameters: int
    cached: int = 0
    """Of one token, on one rank; of keys and values together."""
    heads: int = 0
    """Among how many heads `cached` can be divided over ranks; 0: every rank holds all of it."""
    window: int | None = None
    """Tokens that are kept; None: all."""
    ratio: int = 1
    """So many tokens share an entry."""
    index_bytes: int = 0
    """Of one token, whatever the cache's type: keys of a sparse attention's index."""
    state_bytes: int = 0
    """Of one sequence, whatever its length."""

    def sequence_bytes(self, num_tokens: int, element_bytes: float, num_ranks: int) -> float:
        """What a sequence of so many tokens takes on each of `num_ranks` tensor-parallel ranks."""
        kept = num_tokens if self.window is None else min(num_tokens, self.window)
        divisor = max(1, min(num_ranks, self.heads))
        entries = -(-kept // self.ratio)
        return entries * (self.cached / divisor * element_bytes + self.index_bytes) + self.state_bytes / num_ranks


def attention_of(text: Mapping[str, Any]) -> list[Attention]:
    """Of every layer. `text`: the configuration of the language model."""
    makers = {
        FULL: _full,
        SLIDING: _sliding,
        LATENT: _latent,
        LINEAR: _linear,
        MAMBA: _mamba,
        CONV: _conv,
        NOTHING: lambda text: Attention(0),
    }
    if "compress_ratios" in text:
        ratios = text["compress_ratios"][: text["num_hidden_layers"]]
        return [_compressed(text, ratio) for ratio in ratios]
    made = {kind: makers[kind](text) for kind in set(kinds_of(text))}
    return [made[kind] for kind in kinds_of(text)]


def kinds_of(text: Mapping[str, Any]) -> Sequence[str]:
    """The kind of every layer."""
    named = text.get("layers_block_type") or text.get("hybrid_override_pattern") or text.get("layer_types")
    number = text.get("num_hidden_layers") or len(named or [])
    linear = text.get("linear_attn_config") or {}
    full = LATENT if text.get("kv_lora_rank") else FULL
    if "hybrid_layer_pattern" in text:
        return [SLIDING if is_sliding else full for is_sliding in text["hybrid_layer_pattern"]]
    if "kda_layers" in linear:
        return [LINEAR if layer + 1 in linear["kda_layers"] else full for layer in range(number)]
    if named:
        kinds = [_NAMES.get(name, full) for name in named]
        return [full if kind == FULL else kind for kind in kinds]
    if "full_attention_interval" in text:
        interval = text["full_attention_interval"]
        return [full if (layer + 1) % interval == 0 else LINEAR for layer in range(number)]
    is_sliding = text.get("sliding_window") and text.get("use_sliding_window", True)
    return [SLIDING if is_sliding else full] * number


def _full(text: Mapping[str, Any]) -> Attention:
    heads = text.get("num_global_key_value_heads") or text.get("num_key_value_heads") or text["num_attention_heads"]
    return _grouped(text, heads, text.get("global_head_dim") or _head_dim(text), bool(text.get("attention_k_eq_v")))


def _sliding(text: Mapping[str, Any]) -> Attention:
    heads = text.get("swa_num_key_value_heads") or text.get("num_key_value_heads") or text["num_attention_heads"]
    layer = _grouped(text, heads, text.get("swa_head_dim") or _head_dim(text), False)
    return Attention(layer.parameters, layer.cached, layer.heads, window=text["sliding_window"])


def _grouped(text: Mapping[str, Any], kv_heads: int, head_dim: int, has_one_kv: bool) -> Attention:
    """`has_one_kv`: values are keys, so that they have no projection of their own."""
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    value_dim = text.get("v_head_dim") or head_dim
    gate = heads * head_dim if text.get("attn_output_gate") else 0
    projections = heads * head_dim + gate + kv_heads * (head_dim + (0 if has_one_kv else value_dim))
    return Attention(
        hidden * (projections + heads * value_dim), cached=kv_heads * (head_dim + value_dim), heads=kv_heads
    )


def _latent(text: Mapping[str, Any]) -> Attention:
    """Multi-head latent attention (DeepSeek), with the index of sparse attention where there is one."""
    hidden, heads = text["hidden_size"], text["num_attention_heads"]
    nope, rope, value = text["qk_nope_head_dim"], text["qk_rope_head_dim"], text["v_head_dim"]
    latent, query = text["kv_lora_rank"], text.get("q_lora_rank")
    parameters = query * (hidden + heads * (nope + rope)) if query else hidden * heads * (nope + rope)
    parameters += hidden * (latent + rope) + latent * heads * (nope + value) + heads * value * hidden
    if text.get("mla_use_output_gate"):
        parameters += hidden * heads * value
    index = text.get("index_n_heads")
    if index:
        size = text["index_head_dim"]
        parameters += (query or hidden) * index * size + hidden * (size + index)
    return Attention(parameters, cached=latent + rope, index_bytes=_INDEX_BYTES if index else 0)


def _compressed(text: Mapping[str, Any], ratio: int) -> Attention:
    """DeepSeek V4: one head of keys and values, of which a window is kept whole and the rest compressed."""
    hidden, heads, size = text["hidden_size"], text["num_attention_heads"], text["head_dim"]
    query, groups, out = text["q_lora_rank"], text["o_groups"], text["o_lora_rank"]
    parameters = query * (hidden + heads * size) + hidden * size + heads * size * out + groups * out * hidden
    if not ratio:
        return Attention(parameters, cached=size, window=text["sliding_window"])
    parameters += 2 * hidden * size * (2 if ratio == 4 else 1)
    index = 0
    if ratio == 4:
        index, index_size = _INDEX_BYTES, text["index_head_dim"]
        parameters += query * text["index_n_heads"] * index_size + 4 * hidden * index_size
    return Attention(parameters, cached=size, ratio=ratio, index_bytes=index)


def _linear(text: Mapping[str, Any]) -> Attention:
    """Gated DeltaNet (Qwen), or Kimi delta attention, whose heads all have keys of their own."""
    hidden, kda = text["hidden_size"], text.get("linear_attn_config")
    if kda:
        width = kda["num_heads"] * kda["head_dim"]
        gates = (1 if kda.get("use_full_rank_gate") else 0) * hidden * width
        gates += (2 if not gates else 1) * kda["head_dim"] * (hidden + width)
        state = width * kda["head_dim"] * _FLOAT32_BYTES
        return Attention(hidden * (4 * width + kda["num_heads"]) + gates, state_bytes=state)
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    parameters = hidden * (2 * keys + 3 * values + 2 * text["linear_num_value_heads"])
    return Attention(parameters, state_bytes=values * text["linear_key_head_dim"] * _FLOAT32_BYTES)


def _mamba(text: Mapping[str, Any]) -> Attention:
    """Mamba 2 (Nemotron, Granite)."""
    hidden = text["hidden_size"]
    if "mamba_num_heads" in text:
        inner, heads = text["mamba_num_heads"] * text["mamba_head_dim"], text["mamba_num_heads"]
        groups, state = text["n_groups"], text["ssm_state_size"]
    else:
        inner, groups, state = text["mamba_expand"] * hidden, text.get("mamba_n_groups", 1), text["mamba_d_state"]
        heads = text.get("mamba_n_heads") or inner // 64
    parameters = hidden * (3 * inner + 2 * groups * state + heads)
    return Attention(parameters, state_bytes=inner * state * _FLOAT32_BYTES)


def _conv(text: Mapping[str, Any]) -> Attention:
    """Gated short convolutions (LFM2)."""
    hidden = text["hidden_size"]
    return Attention(4 * hidden * hidden, state_bytes=2 * hidden * text.get("conv_L_cache", 3))


def _head_dim(text: Mapping[str, Any]) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])
