"""Training the estimator: KL divergence to the router's logits, one network for all layers."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from vllm_expert_prefetch.calibration.recordings import Progress, Split
from vllm_expert_prefetch.prediction import Estimator, EstimatorShape, Gate, Signals
from vllm_expert_prefetch.prediction.defaults import DefaultVectors
from vllm_expert_prefetch.prediction.router import QuasiHidden

_POOL = 16
"""Windows whose tokens are mixed before they are cut into batches."""


@dataclass(frozen=True)
class TrainingOptions:
    """Sizes as in `EstimatorShape`; batches are counted in (token, layer) pairs."""

    m: int = 2
    n: int = 2
    epochs: int = 30
    patience: int = 4
    """Epochs without a better validation loss after which training ends."""
    batch_size: int = 2048
    learning_rate: float = 2e-3
    weight_decay: float = 0.01
    warm_up: int = 100
    """Steps."""
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    estimator: Estimator
    record: dict[str, Any]
    """Options, number of parameters, losses per epoch."""


class Samples:
    """Pairs of a quasi-hidden state and the true logits of the target layer, from recorded windows."""

    def __init__(self, gates: Sequence[Gate], defaults: DefaultVectors | None, depth: int) -> None:
        """Targets are 1 to `depth` layers ahead."""
        self._gates = gates
        self._quasi_hidden = [QuasiHidden(gates, defaults, distance) for distance in range(1, depth + 1)]
        self._pairs = [(layer, distance) for distance in range(1, depth + 1) for layer in range(len(gates) - distance)]
        self.num_sources = len(self._pairs)
        """In the order of `estimator.source_number`."""

    def of(self, signals: list[Signals]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (N, H) float32, sources (N,) int64, logits (N, E) float32 of one window; N = tokens * sources."""
        rows = signals[0].topk_ids.shape[0]
        q = torch.cat([self._quasi_hidden[distance - 1].at(layer, signals[layer]) for layer, distance in self._pairs])
        true = [gate.logits(own.hidden) for gate, own in zip(self._gates, signals, strict=True)]
        logits = torch.cat([true[layer + distance] for layer, distance in self._pairs])
        return q, torch.arange(self.num_sources).repeat_interleave(rows), logits


def train_estimator(
    samples: Samples,
    gates: Sequence[Gate],
    training: Split,
    validation: Split,
    options: TrainingOptions,
    checkpoint: Path,
    tell: Progress,
) -> Trained:
    """Train until the validation loss stops falling; the best epoch's network. Goes on from `checkpoint` if there."""
    torch.manual_seed(options.seed)
    shape = EstimatorShape(
        gates[0].weight.shape[1], gates[0].num_experts, samples.num_sources, m=options.m, n=options.n
    )
    run = _Run(Estimator(shape), options, _num_batches(samples, training, options))
    run.restore(checkpoint)
    while run.epoch < options.epochs and not run.is_over:
        tell("training", run.epoch, options.epochs)
        run.train_epoch(_batches(samples, training, options, run.epoch))
        run.validate(samples.of(window) for window in validation)
        run.save(checkpoint)
    tell("training", options.epochs, options.epochs)
    run.estimator.load_state_dict(run.best)
    num_parameters = sum(parameter.numel() for parameter in run.estimator.parameters())
    record = {**asdict(options), "parameters": num_parameters, "validation_kl": run.losses}
    return Trained(run.estimator.eval(), record)


def _num_batches(samples: Samples, training: Split, options: TrainingOptions) -> int:
    pairs = samples.num_sources * sum(window[0].topk_ids.shape[0] for window in training)
    return max(pairs // options.batch_size, 1)


def _batches(samples: Samples, training: Split, options: TrainingOptions, epoch: int) -> Iterator[Any]:
    order = random.Random(options.seed + epoch).sample(range(len(training)), len(training))
    generator = torch.Generator().manual_seed(options.seed + epoch)
    for start in range(0, len(order), _POOL):
        pool = [samples.of(training[index]) for index in order[start : start + _POOL]]
        q, sources, logits = (torch.cat(parts) for parts in zip(*pool, strict=True))
        for number, rows in enumerate(torch.randperm(len(q), generator=generator).split(options.batch_size)):
            if number and len(rows) < options.batch_size // 2:
                continue  # a step on a handful of samples undoes much of the epoch
            yield q[rows], sources[rows], logits[rows]


def _loss(estimator: Estimator, q: torch.Tensor, sources: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    guess, true = estimator(q, sources).log_softmax(-1), logits.log_softmax(-1)
    return F.kl_div(guess, true, reduction="batchmean", log_target=True)


def _has_fast_bfloat16() -> bool:
    """Four times the speed where the CPU has the instructions, slower where it has not."""
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


class _Run:
    """One training run and everything that a checkpoint holds."""

    def __init__(self, estimator: Estimator, options: TrainingOptions, batches_per_epoch: int) -> None:
        self.estimator, self._options = estimator, options
        self._optimizer = torch.optim.AdamW(
            estimator.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay
        )
        total = options.epochs * batches_per_epoch
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer,
            lambda step: min((step + 1) / options.warm_up, 0.5 + 0.5 * math.cos(math.pi * min(step / total, 1.0))),
        )
        self.epoch = 0
        self.losses: list[float] = []
        self.best = {name: value.clone() for name, value in estimator.state_dict().items()}

    @property
    def is_over(self) -> bool:
        best = min(range(len(self.losses)), key=self.losses.__getitem__, default=0)
        return len(self.losses) - best > self._options.patience

    def train_epoch(self, batches: Iterator[Any]) -> None:
        self.estimator.train()
        for q, sources, logits in batches:
            self._optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=_has_fast_bfloat16()):
                loss = _loss(self.estimator, q, sources, logits)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.estimator.parameters(), 1.0)
            self._optimizer.step()
            self._schedule.step()
        self.epoch += 1

    def validate(self, windows: Iterator[Any]) -> None:
        self.estimator.eval()
        total = pairs = 0.0
        with torch.inference_mode():
            for q, sources, logits in windows:
                total += float(_loss(self.estimator, q, sources, logits)) * len(q)
                pairs += len(q)
        self.losses.append(round(total / pairs, 6))
        if self.losses[-1] == min(self.losses):
            self.best = {name: value.clone() for name, value in self.estimator.state_dict().items()}

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".partial")
        torch.save(
            {
                "options": asdict(self._options),
                "epoch": self.epoch,
                "losses": self.losses,
                "best": self.best,
                "estimator": self.estimator.state_dict(),
                "optimizer": self._optimizer.state_dict(),
                "schedule": self._schedule.state_dict(),
            },
            partial,
        )
        partial.replace(path)

    def restore(self, path: Path) -> None:
        """From a checkpoint of the same options; one of others is left alone and overwritten."""
        if not path.is_file():
            return
        saved = torch.load(path, weights_only=True)
        if saved["options"] != asdict(self._options):
            return
        self.epoch, self.losses, self.best = saved["epoch"], saved["losses"], saved["best"]
        self.estimator.load_state_dict(saved["estimator"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self._schedule.load_state_dict(saved["schedule"])
