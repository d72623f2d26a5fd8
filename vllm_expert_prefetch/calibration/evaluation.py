"""Recall of predictors on recorded windows."""

from collections.abc import Iterable

from vllm_expert_prefetch.prediction import Predictor, Signals
from vllm_expert_prefetch.prediction.truth import Quality, Score, quality, score


def evaluate(predictor: Predictor, windows: Iterable[list[Signals]], count: int) -> list[Quality | None]:
    """Quality of `count` guesses for each target layer; None where the predictor has no guess.

    Guesses for the next token are held against the next token of the same window.
    """
    scores: list[list[Score]] = [[] for _ in range(predictor.num_layers)]
    for signals in windows:
        steps = _tokens(signals) if predictor.observes else [signals]
        for step, later in zip(steps, [*steps[1:], None], strict=True):
            _score_step(predictor, step, later, count, scores)
    return [quality(own) for own in scores]


def _score_step(
    predictor: Predictor, step: list[Signals], later: list[Signals] | None, count: int, scores: list[list[Score]]
) -> None:
    for source, signals in enumerate(step):
        predictor.observe(source, signals)
        target = predictor.target_of(source)
        if target is None:
            continue
        if target > source:
            given, true = signals, step[target]
        elif predictor.observes:
            if later is None:
                continue
            given, true = signals, later[target]
        else:
            given, true = _rows(signals, slice(None, -1)), _rows(step[target], slice(1, None))
        prediction = predictor.predict(source, given, count)
        if prediction is not None and true.topk_ids.shape[0]:
            scores[target].append(score(prediction, true))


def _tokens(signals: list[Signals]) -> list[list[Signals]]:
    num_tokens = signals[0].topk_ids.shape[0]
    return [[_rows(own, slice(token, token + 1)) for own in signals] for token in range(num_tokens)]


def _rows(signals: Signals, rows: slice) -> Signals:
    return Signals(*(value[rows] for value in signals))
