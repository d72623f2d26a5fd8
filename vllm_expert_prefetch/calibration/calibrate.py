"""The steps of a calibration: cut the text, record, count, train, measure, write."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from vllm_expert_prefetch.calibration import CalibrationError
from vllm_expert_prefetch.calibration.evaluation import evaluate
from vllm_expert_prefetch.calibration.recordings import Engine, Progress, Recordings, Split
from vllm_expert_prefetch.calibration.tables import count_tables
from vllm_expert_prefetch.calibration.text import Text, cut
from vllm_expert_prefetch.calibration.training import Samples, Trained, TrainingOptions, train_estimator
from vllm_expert_prefetch.prediction import (
    Artifact,
    Card,
    Gate,
    Ingredients,
    create_predictor,
    fingerprint,
    save_artifact,
)
from vllm_expert_prefetch.prediction.defaults import DefaultSums, DefaultVectors
from vllm_expert_prefetch.prediction.truth import Quality

MEASURED = ("router", "router_defaults", "estimator", "hybrid", "previous", "frequency", "transition")
"""Predictors in the recall table, in its order."""
DEFAULT_DEPTH = 3


@dataclass(frozen=True)
class Options:
    """Settings of a calibration. `window` and `max_tokens` in tokens; `over_fetch` experts beyond top-k."""

    window: int = 512
    max_tokens: int = 50_000
    over_fetch: int = 2
    depth: int | None = None
    """Layers ahead; None for DEFAULT_DEPTH, or as many as the model allows."""
    defaults: bool = True
    estimator: bool = True
    training: TrainingOptions = field(default_factory=TrainingOptions)
    keep_recordings: bool = False


@dataclass(frozen=True)
class Calibration:
    """One model, one text, one output directory."""

    engine: Engine
    text: Text
    output: Path
    model: str
    versions: dict[str, str]
    options: Options
    tell: Progress

    def run(self) -> Artifact:
        """Make the artifact, write it to `output`, return it. Intermediate results stay until the end."""
        options, gates = self.options, self.engine.gates
        _check_gates(gates, self._depth)
        windows = cut(self.text, self.engine.tokenize, options.window, options.max_tokens)
        recordings = Recordings(self._working_directory, self._key(gates))
        sums = DefaultSums(len(gates), gates[0].num_experts, gates[0].weight.shape[1]) if options.defaults else None
        recordings.fill(self.engine, windows.all, len(windows.training), sums, self.tell)
        ends = [len(windows.training), len(windows.training) + len(windows.validation), len(windows.all)]
        training, validation, test = (
            Split(recordings, range(*pair)) for pair in zip([0, *ends[:-1]], ends, strict=True)
        )
        tokens = {name: sum(map(len, getattr(windows, name))) for name in ("training", "validation", "test")}
        unfinished = self._counted(gates, training, None if sums is None else sums.means(), tokens)
        if options.estimator:
            unfinished = self._with_estimator(unfinished, gates, training, validation)
        artifact = self._measured(unfinished, gates, validation, test)
        save_artifact(artifact, self.output)
        if not options.keep_recordings:
            recordings.remove()
        return artifact

    @property
    def _working_directory(self) -> Path:
        return self.output.with_name(self.output.name + ".work")

    @property
    def _depth(self) -> int:
        most = len(self.engine.gates) - 1
        return min(DEFAULT_DEPTH, max(1, most)) if self.options.depth is None else self.options.depth

    def _key(self, gates: Sequence[Gate]) -> dict[str, object]:
        options = self.options
        return {
            "model": fingerprint(gates),
            "data": self.text.sha256,
            "window": options.window,
            "max_tokens": options.max_tokens,
            "defaults": options.defaults,
        }

    def _counted(
        self, gates: Sequence[Gate], training: Split, defaults: DefaultVectors | None, tokens: dict[str, int]
    ) -> Artifact:
        """Tables and default vectors; no estimator and no recall yet."""
        frequency, transition = count_tables(training, gates)
        data = {
            "sha256": self.text.sha256,
            "documents": len(self.text.documents),
            "tokens": tokens,
            "window": self.options.window,
            "max_tokens": self.options.max_tokens,
        }
        card = Card(
            model=self.model,
            fingerprint=fingerprint(gates),
            layers=[gate.name for gate in gates],
            depth=self._depth,
            versions=self.versions,
            data=data,
            over_fetch=self.options.over_fetch,
            recall={},
        )
        return Artifact(card, defaults, frequency, transition)

    def _with_estimator(
        self, artifact: Artifact, gates: Sequence[Gate], training: Split, validation: Split
    ) -> Artifact:
        """Train it on the quasi-hidden state of the router variant that is better on the validation text."""
        use_defaults = artifact.defaults is not None and self._mean_recall(
            "router_defaults", artifact, gates, validation
        ) > self._mean_recall("router", artifact, gates, validation)
        defaults = artifact.defaults if use_defaults else None
        trained: Trained = train_estimator(
            Samples(gates, defaults, self._depth),
            gates,
            training,
            validation,
            self.options.training,
            self._working_directory / "training.pt",
            self.tell,
        )
        described = {"default_vectors": use_defaults, **trained.record}
        return replace(artifact.with_card(estimator=described), estimator=trained.estimator)

    def _measured(self, artifact: Artifact, gates: Sequence[Gate], validation: Split, test: Split) -> Artifact:
        """Choose the hybrid's predictors on the validation text, then measure all on the test text.

        Speculative execution is allowed nowhere yet: `guard` chooses among the candidates.
        """
        candidates = [name for name in ("router", "router_defaults", "estimator") if _has(artifact, name)]
        hybrid: list[list[str]] = []
        missing: dict[int, float] = {}
        for distance in range(1, self._depth + 1):
            by_name = {name: self._qualities(name, artifact, gates, validation, distance) for name in candidates}
            chosen = []
            for target in range(distance, len(gates)):
                recalls = {name: own[target] for name, own in by_name.items()}
                chosen.append(max(candidates, key=lambda name: recalls[name].recall))  # type: ignore[union-attr]
                if distance == 1:
                    missing[target] = recalls[chosen[-1]].missing_mass  # type: ignore[union-attr]
            hybrid.append(chosen)
        last = len(gates) - 1
        order = sorted((target for target in missing if target < last), key=lambda target: missing[target])
        artifact = artifact.with_card(hybrid=hybrid, guard={"candidates": order})
        table: dict[str, list[Quality | None]] = {}
        ahead: dict[str, list[float]] = {}
        for number, name in enumerate(MEASURED):
            self.tell("measuring", number, len(MEASURED))
            if name == "hybrid" or _has(artifact, name):
                table[name] = self._qualities(name, artifact, gates, test)
            if name in ("hybrid", *candidates):
                farther = [self._mean_recall(name, artifact, gates, test, d) for d in range(2, self._depth + 1)]
                ahead[name] = [mean_quality(table[name], 1).recall, *farther]
        self.tell("measuring", len(MEASURED), len(MEASURED))
        recall = {name: [None if one is None else [*one] for one in own] for name, own in table.items()}
        return artifact.with_card(recall=recall, recall_ahead=ahead)

    def _qualities(
        self, name: str, artifact: Artifact, gates: Sequence[Gate], windows: Split, distance: int = 1
    ) -> list[Quality | None]:
        ingredients = Ingredients(gates, artifact, distance)
        count = gates[0].routing.top_k + self.options.over_fetch
        with torch.inference_mode():
            return evaluate(create_predictor(name, ingredients), windows, count)

    def _mean_recall(
        self, name: str, artifact: Artifact, gates: Sequence[Gate], windows: Split, distance: int = 1
    ) -> float:
        return mean_quality(self._qualities(name, artifact, gates, windows, distance)).recall


def mean_quality(qualities: Sequence[Quality | None], first: int = 0) -> Quality:
    """Mean over the target layers from `first` on that have a value."""
    known = [one for one in qualities[first:] if one is not None]
    return Quality(*(sum(values) / len(known) for values in zip(*known, strict=True)))


def _has(artifact: Artifact, name: str) -> bool:
    missing = {"router_defaults": artifact.defaults, "estimator": artifact.estimator}
    return missing.get(name, name) is not None


def _check_gates(gates: Sequence[Gate], depth: int) -> None:
    shapes = {(gate.num_experts, gate.routing.top_k) for gate in gates}
    if len(shapes) > 1:
        raise CalibrationError(f"the MoE layers differ in (experts, top-k): {sorted(shapes)}; that is not supported")
    if not 1 <= depth < len(gates):
        raise CalibrationError(f"lookahead_layers must be 1 to {len(gates) - 1} for {len(gates)} MoE layers")
