"""Decoding with given tokens: what a model says of each next token of a text, in the steps that serving decodes with.

vLLM's prompt log-probabilities come from prefill, where nothing is executed speculatively. Here only the first tokens
of a text are a prompt; each further one is generated, and the text's own token is put in place of the sampled one.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vllm_expert_prefetch.config import CONFIG_KEY
from vllm_expert_prefetch.lookahead.after import LookAhead
from vllm_expert_prefetch.serving import compat
from vllm_expert_prefetch.studies.recording import open_in_process

PROMPT_TOKENS = 8
"""Tokens of each text that are the prompt."""
SHORTEST = PROMPT_TOKENS + 3
"""Tokens of a text that can be measured: two steps after the one that ends the prompt."""


class CannotMeasure(Exception):
    """This model cannot be decoded speculatively; the message says why."""


@dataclass(frozen=True)
class ForcedDecoding:
    """A vLLM engine in this process that looks ahead. One sequence at a time."""

    llm: Any
    runner: Any
    look_ahead: LookAhead
    num_layers: int

    def tokenize(self, text: str) -> list[int]:
        return list(self.llm.get_tokenizer().encode(text))

    def log_probs(self, tokens: Sequence[int], layers: frozenset[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model says of `tokens` (at least SHORTEST), its MoE `layers` executing their guesses.

        Returns float32 (N, V), one row per decode step, and the tokens that came next, int64 (N,). The token after the
        prompt is left out: it comes from prefill.
        """
        from vllm import SamplingParams

        forced = list(tokens[PROMPT_TOKENS:])
        seen: list[torch.Tensor] = []
        model = self.runner.get_model()
        compute_logits = model.compute_logits

        def compute_and_force(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = compute_logits(*args, **kwargs)
            if logits.shape[0] != 1 or len(seen) == len(forced):
                raise CannotMeasure(f"expected {len(forced)} steps of one token, got more")
            only = torch.zeros_like(logits)
            only[0, forced[len(seen)]] = 1
            seen.append(logits.float().log_softmax(-1)[0])
            return only

        self.look_ahead.speculated_layers = layers
        model.compute_logits = compute_and_force
        try:
            prompt: Any = {"prompt_token_ids": list(tokens[:PROMPT_TOKENS])}
            sampling = SamplingParams(temperature=0, max_tokens=len(forced), ignore_eos=True, detokenize=False)
            self.llm.generate(prompt, sampling, use_tqdm=False)
        finally:
            del model.compute_logits
            self.look_ahead.speculated_layers = frozenset()
        return torch.stack(seen[1:]).cpu(), torch.tensor(forced[1:])


@contextlib.contextmanager
def open_forced_decoding(model: str, window: int, artifact: Path | None, **options: Any) -> Iterator[ForcedDecoding]:
    """An engine for `model`, with the look-ahead that serving would use; `options` are vLLM's.

    Raises CannotMeasure when it does not look ahead, ConfigError when it cannot be served at all.
    """
    additional = dict(options.pop("additional_config", {}))
    wanted = {"prefetch": "on"} | ({} if artifact is None else {"artifact": str(artifact)})
    options["additional_config"] = additional | {CONFIG_KEY: additional.get(CONFIG_KEY, {}) | wanted}
    with open_in_process(model, window, **options) as (llm, runner):
        layers = compat.moe_layers_of(runner.get_model())
        look_ahead = layers[0].look_ahead
        if look_ahead is None:
            raise CannotMeasure(f"it does not look ahead: {layers[0].worker.prefetch}")
        yield ForcedDecoding(llm, runner, look_ahead, len(layers))
