"""What speculative execution costs, against exact execution of the same model on the same text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch

from vllm_expert_prefetch.calibration.recordings import Progress


class Decoder(Protocol):
    """What decodes a text: `studies.forced_decoding.ForcedDecoding`, or a stand-in for tests."""

    def log_probs(self, tokens: Sequence[int], layers: frozenset[int]) -> tuple[torch.Tensor, torch.Tensor]: ...


@dataclass(frozen=True)
class Accuracy:
    """One mode. `agreement`: share of tokens whose most likely token is that of exact execution. `kl`: mean per token
    of KL(exact || mode), in nats. `increase`: perplexity over that of exact execution, less 1; `increase_error`: the
    standard error of its logarithm.
    """

    mode: str
    layers: list[int]
    """That execute their guesses."""
    tokens: int
    perplexity: float
    increase: float
    increase_error: float
    agreement: float
    kl: float


def measure(
    decoder: Decoder, windows: Sequence[Sequence[int]], modes: Mapping[str, frozenset[int]], tell: Progress
) -> list[Accuracy]:
    """Exact execution first, then each of `modes` (name -> layers that execute their guesses)."""
    all_modes = {"exact": frozenset[int](), **modes}
    rows: dict[str, list[torch.Tensor]] = {mode: [] for mode in all_modes}
    done, total = 0, sum(map(len, windows)) * len(all_modes)
    for window in windows:
        exact: torch.Tensor | None = None
        for mode, layers in all_modes.items():
            tell("decoding", done, total)
            found, targets = decoder.log_probs(window, layers)
            exact = found if exact is None else exact
            rows[mode].append(_compare(exact, found, targets))
            done += len(window)
    tell("decoding", total, total)
    return [_accuracy(mode, sorted(layers), torch.cat(rows[mode])) for mode, layers in all_modes.items()]


def _compare(exact: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per token, float64 (N, 4): surprise in exact mode and here, KL, whether the best token is the same."""
    surprises = [-one.gather(1, targets.unsqueeze(1)).squeeze(1) for one in (exact, found)]
    divergence = torch.nn.functional.kl_div(found, exact, log_target=True, reduction="none").sum(-1)
    return torch.stack([*surprises, divergence, exact.argmax(-1) == found.argmax(-1)], dim=1).double()


def _accuracy(mode: str, layers: list[int], rows: torch.Tensor) -> Accuracy:
    surprise, own, kl, agreement = rows.mean(0).tolist()
    error = float((rows[:, 1] - rows[:, 0]).std()) / math.sqrt(len(rows))
    return Accuracy(mode, layers, len(rows), math.exp(own), math.exp(own - surprise) - 1, error, agreement, kl)


def accuracy_table(results: Sequence[Accuracy], num_layers: int) -> str:
    """As text."""
    lines = [
        f"{results[0].tokens} tokens decoded in each mode, one sequence at a time, {num_layers} MoE layers",
        f"{'mode':<24}{'layers':>8}{'perplexity':>12}{'increase':>18}{'same token':>12}{'KL per token':>14}",
    ]
    for one in results:
        increase = "" if one.mode == "exact" else f"{100 * one.increase:+.2f} +- {100 * one.increase_error:.2f} %"
        lines.append(
            f"{one.mode:<24}{len(one.layers):>8}{one.perplexity:>12.4f}{increase:>18}"
            f"{100 * one.agreement:>10.2f} %{one.kl:>14.5f}"
        )
    return "\n".join(lines)


def accuracy_json(results: Sequence[Accuracy], num_layers: int) -> dict[str, Any]:
    """For `--json`."""
    return {"moe_layers": num_layers, "modes": {one.mode: asdict(one) for one in results}}
