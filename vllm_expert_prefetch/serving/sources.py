"""Finding, in a model of vLLM, what look-ahead needs: each MoE layer's gate and the norm in front of it.

Found by structure and not by model: a linear layer from the hidden size to the number of experts, beside the experts,
and the norm of the enclosing decoder layer. Names only decide between several norms.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from vllm_expert_prefetch.cache.base import Caches
from vllm_expert_prefetch.config import AUTO, CONFIG_KEY, SPECULATIVE, ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.lookahead.after import LookAhead
from vllm_expert_prefetch.lookahead.create import create_look_ahead, why_not
from vllm_expert_prefetch.prediction import ArtifactError, Gate, Norm, Routing
from vllm_expert_prefetch.serving import compat

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts

_NORM_NAMES = (
    "pre_feedforward_layernorm_2",  # Gemma: the routed experts have a norm of their own
    "pre_feedforward_layernorm",
    "pre_mlp_layernorm",
    "pre_ff_layernorm",
    "post_attention_layernorm",
    "post_attention_norm",
    "post_norm",
    "ffn_norm",
    "norm_2",
    "norm2",
    "ln_2",
)
"""Names of the norm in front of a feed-forward block, the more telling first: `post_attention_layernorm` follows the
attention's output, not the residual, in models that also have a `pre_feedforward_layernorm`."""


class NotFound(Exception):
    """This model cannot be looked ahead in; the message says what is missing."""


@dataclass(frozen=True)
class Source:
    """One MoE layer: vLLM's modules, and what `prediction` needs of them."""

    gate: Gate
    runner: Any
    """Holds `router` and `routed_experts`."""
    norm: torch.nn.Module


def find_sources(model: torch.nn.Module) -> list[Source]:
    """Every MoE layer of `model`, first to last; raises NotFound when one of them does not tell enough.

    To be called when the weights are loaded. Tensors of the gates are float32 copies on the weights' device.
    """
    modules = {name: module for name, module in model.named_modules() if _plain(module) is module}
    runners = [(name, module) for name, module in modules.items() if _is_runner(module)]
    if len(runners) < 2:
        raise NotFound(f"the model has {len(runners)} MoE layers; looking ahead needs two")
    return [_source(name, runner, modules) for name, runner in runners]


def _plain(module: Any) -> Any:
    """The layer inside vLLM's LoRA wrapper, or `module` itself: adapters do not change what is guessed."""
    return getattr(module, "base_layer", module)


def _is_runner(module: torch.nn.Module) -> bool:
    return hasattr(module, "routed_experts") and hasattr(module, "router")


def _source(name: str, runner: Any, modules: dict[str, torch.nn.Module]) -> Source:
    if getattr(runner, "routed_input_transform", None) is not None:
        raise NotFound(f"{name}: the experts do not read what the router reads (latent experts)")
    moe_config = runner.moe_config
    hidden = moe_config.hidden_dim_unpadded or moe_config.hidden_dim
    gate_module = _gate_module(name, runner, modules, (runner.router.global_num_experts, hidden))
    norm_module = _norm_module(name, modules, hidden)
    norm = _norm(name, norm_module)
    router = _router_with_a_norm(gate_module, runner, modules)
    if router is None:
        weight, bias = _read_linear(name, gate_module, hidden, moe_config.in_dtype)
    else:
        weight, bias = _read_router(name, router, norm, moe_config.in_dtype), None
    gate = Gate(
        name=name,
        weight=weight,
        bias=bias,
        norm=norm,
        routing=_routing(name, runner.router),
        output_scale=float(getattr(runner, "routed_scaling_factor", 1.0)),
    )
    return Source(gate, runner, norm_module)


def _gate_module(name: str, runner: Any, modules: dict[str, torch.nn.Module], shape: tuple[int, int]) -> Any:
    """The runner's own gate, or the only linear layer of the gate's shape in the block around the runner."""
    own = _plain(getattr(runner, "gate", None))
    block_name = name.rpartition(".")[0]
    candidates = [own] if own is not None else list(_beside(block_name, name, modules))
    found = [module for module in candidates if _linear_shape(module) == shape]
    if len(found) != 1:
        what = "no gate" if not found else f"{len(found)} modules that could be the gate"
        raise NotFound(f"{name}: {what} from {shape[1]} hidden values to {shape[0]} experts in {block_name}")
    return found[0]


def _linear_shape(module: Any) -> tuple[int, int] | None:
    """(outputs, inputs); from the sizes of vLLM's linear layers, whose weight may be packed, or from the weight."""
    outputs, inputs = getattr(module, "output_size", None), getattr(module, "input_size", None)
    if isinstance(outputs, int) and isinstance(inputs, int):
        return outputs, inputs
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2:
        return weight.shape[0], weight.shape[1]
    return None


def _read_linear(name: str, module: Any, inputs: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight (outputs, inputs) and bias of a linear layer, float32, read off its answers to unit vectors where needed.

    The CPU platform packs weights and deletes the originals; quantised ones have no plain form at all.
    """
    bias = getattr(module, "bias", None)
    bias = bias.detach().float() if isinstance(bias, torch.Tensor) else None
    weight = getattr(module, "weight", None)
    if not (isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.shape[1:] == (inputs,)):
        # Unit vectors so long that the answer, rounded to `dtype`, is the weight alone: the bias is below its last bit.
        length = 2.0**8 if dtype == torch.float16 else 2.0**40
        answers = _answers(module, length * torch.eye(inputs), dtype)
        if bias is not None:
            answers = torch.where(answers == bias, 0.0, answers)
        weight = answers.T / length
    weight = weight.detach().float().clone(memory_format=torch.contiguous_format)
    if not bool(torch.isfinite(weight).all()):
        raise NotFound(f"{name}: the gate's weights are not finite")
    return weight, bias


def _answers(module: Any, questions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What `module` makes of the rows of `questions`, float32."""
    device = next((t.device for t in (*module.parameters(), *module.buffers()) if t.numel()), torch.device("cpu"))
    with torch.inference_mode():
        answers = module(questions.to(device, dtype))
    return (answers[0] if isinstance(answers, tuple) else answers).float()


def _router_with_a_norm(gate_module: Any, runner: Any, modules: dict[str, torch.nn.Module]) -> Any:
    """The module that holds the gate and a norm of its own, and not the experts: its gate reads what they do not."""
    for module in modules.values():
        children = list(module.children())
        is_beside = not any(inner is runner for inner in module.modules())
        is_around = is_beside and any(_plain(child) is gate_module for child in children)
        if is_around and any(_eps(child) is not None for child in children):
            return module
    return None


def _read_router(name: str, router: Any, norm: Norm, dtype: torch.dtype) -> torch.Tensor:
    """The weight (E, H) float32 that gives, from `norm`'s output, the logits of a `router` that norms the residual.

    Gemma-4: logits of `W (scale * r / rms(r))`, while the experts read `gain * r / rms(r)`.
    """
    hidden = norm.gain.shape[0]
    weight = _answers(router, hidden**0.5 * torch.eye(hidden), dtype).T / hidden**0.5
    residual = torch.linspace(-0.5, 2.5, hidden).to(weight)  # far from centered: a layer norm answers differently
    expected = weight @ F.rms_norm(residual, residual.shape)
    difference = _answers(router, residual.unsqueeze(0), dtype)[0] - expected
    if norm.centered or norm.shift is not None or not bool(difference.norm() < 0.05 * expected.norm()):
        raise NotFound(f"{name}: what {type(router).__name__} makes of its input is not known")
    return (weight * norm.inverse_gain()).contiguous()


def _beside(block_name: str, runner_name: str, modules: dict[str, torch.nn.Module]) -> Iterator[Any]:
    for name, module in modules.items():
        inside_runner = name == runner_name or name.startswith(f"{runner_name}.")
        if name.startswith(f"{block_name}.") and not inside_runner:
            yield module


def _norm_module(name: str, modules: dict[str, torch.nn.Module], hidden: int) -> torch.nn.Module:
    """From the experts outwards, the first module that has norms of the hidden size as children."""
    outer = name
    while outer:
        outer = outer.rpartition(".")[0]
        norms = {child: module for child, module in modules[outer].named_children() if _is_norm(module, hidden)}
        if not norms:
            continue
        for wanted in _NORM_NAMES:
            if wanted in norms:
                return norms[wanted]
        if len(norms) == 1:
            return next(iter(norms.values()))
        raise NotFound(f"{name}: which of {', '.join(norms)} in {outer} feeds the experts is not known")
    raise NotFound(f"{name}: no norm of size {hidden} around it")


def _is_norm(module: torch.nn.Module, hidden: int) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and tuple(weight.shape) == (hidden,) and _eps(module) is not None


def _eps(module: torch.nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        value = getattr(module, name, None)
        if isinstance(value, float):
            return value
    return None


def _norm(name: str, module: Any) -> Norm:
    kinds = {base.__name__ for base in type(module).__mro__}
    gain, eps = module.weight.detach().float(), _eps(module)
    assert eps is not None
    if "LayerNorm" in kinds:
        bias = getattr(module, "bias", None)
        return Norm(gain, eps, None if bias is None else bias.detach().float(), centered=True)
    if "GemmaRMSNorm" in kinds:
        return Norm(gain + 1.0, eps)
    if any("RMSNorm" in kind for kind in kinds):
        return Norm(gain, eps)
    raise NotFound(f"{name}: the norm in front of it is a {type(module).__name__}, which is not known")


def _routing(name: str, router: Any) -> Routing:
    if getattr(router, "_hash_indices_table", None) is not None:
        raise NotFound(f"{name}: its experts are chosen by token id, not by a gate")
    scoring = getattr(router, "scoring_func", "softmax")
    if getattr(router, "custom_routing_function", None) is not None:
        # A function of the model's own: its logits still rank the experts in every model that has one so far.
        scoring = "softmax"
    bias = None if compat.ignores_correction_bias(router) else getattr(router, "e_score_correction_bias", None)
    has_groups = bool(getattr(router, "use_grouped_topk", hasattr(router, "num_expert_group")))
    try:
        return Routing(
            top_k=router.top_k,
            scoring=scoring,
            renormalize=bool(getattr(router, "renormalize", True)),
            correction_bias=None if bias is None else bias.detach().float(),
            num_groups=(router.num_expert_group or 1) if has_groups else 1,
            top_groups=(router.topk_group or 1) if has_groups else 1,
            scaling=float(getattr(router, "routed_scaling_factor", 1.0)),
        )
    except ValueError as error:
        raise NotFound(f"{name}: {error}") from error


def create_look_ahead_of(
    model: torch.nn.Module,
    layers: "Sequence[CachedRoutedExperts]",
    config: ExpertPrefetchConfig,
    caches: Caches | None,
    link_bytes_per_second: float,
    preloads: bool = False,
    breaks_graphs: bool = False,
) -> tuple[LookAhead | None, str]:
    """The look-ahead of a loaded model, and its name for the start-up line; or None, and why there is none.

    A model that does not allow it is served without: exactly, and the log says why. Raises ConfigError where something
    was asked for by name and cannot be.
    """
    reason = why_not(config, len(layers), caches, breaks_graphs)
    if reason or caches is None:
        if config.execution == SPECULATIVE:
            compat.logger().warning("expert_prefetch: execution is speculative, but serving is exact: %s", reason)
        return None, str(reason)
    try:
        gates = [source.gate for source in _sources_of(model, layers)]
        look_ahead = create_look_ahead(config, gates, caches, link_bytes_per_second, layers[0].accelerator, preloads)
    except (NotFound, ArtifactError) as error:
        if config.prefetch == "on" or config.artifact is not None or config.predictor != AUTO or config.areas == 2:
            raise ConfigError(
                f"{CONFIG_KEY}: {error}. Set prefetch to auto and drop artifact, predictor and areas to serve without "
                "looking ahead"
            ) from error
        compat.logger().warning("expert_prefetch: no look-ahead, serving goes on without it: %s", error)
        return None, f"off: {error}"
    if config.execution == SPECULATIVE and not look_ahead.speculated_layers:
        compat.logger().warning(
            "expert_prefetch: execution is speculative, but the artifact allows it in no layer: serving is exact"
        )
    return look_ahead, f"{config.prefetch}: {look_ahead.predictors[0].name}"


def _sources_of(model: torch.nn.Module, layers: "Sequence[CachedRoutedExperts]") -> list[Source]:
    """The sources in the order of `layers`."""
    by_experts: dict[Any, Source] = {source.runner.routed_experts: source for source in find_sources(model)}
    if len(by_experts) != len(layers):
        raise NotFound(f"{len(by_experts)} of {len(layers)} MoE layers were found in the model")
    return [by_experts[layer] for layer in layers]
