"""The recall table, as text."""

from vllm_expert_prefetch.calibration.calibrate import MEASURED, mean_quality
from vllm_expert_prefetch.prediction import Card
from vllm_expert_prefetch.prediction.truth import Quality


def recall_table(card: Card, top_k: int) -> str:
    """Recall@k / recall@(k + over_fetch) in per cent, per target layer and predictor, on text that was held out."""
    names = [name for name in MEASURED if name in card.recall]
    qualities = {name: [None if row is None else Quality(*row) for row in card.recall[name]] for name in names}
    width = max(15, *(len(name) + 2 for name in names))
    count = top_k + card.over_fetch
    lines = [
        f"recall@{top_k} / @{count} in per cent, on {card.data['tokens']['test']} tokens that were held out",
        "layer   " + "".join(f"{name:>{width}}" for name in names),
    ]
    for target in range(len(card.layers)):
        chosen = f"   {card.hybrid[0][target - 1]}" if target else ""
        cells = "".join(f"{_cell(qualities[name][target]):>{width}}" for name in names)
        lines.append(f"{target:5}   {cells}{chosen}")
    means = "".join(f"{_cell(mean_quality(qualities[name], 1)):>{width}}" for name in names)
    lines.append(f" mean   {means}   layers 1 to {len(card.layers) - 1}")
    for distance in range(2, card.depth + 1):
        own = {name: f"{100 * recalls[distance - 1]:.1f}" for name, recalls in card.recall_ahead.items()}
        cells = "".join(f"{own.get(name, '-'):>{width}}" for name in names)
        lines.append(f" mean   {cells}   {distance} layers ahead, recall@{top_k}")
    return "\n".join(lines)


def _cell(quality: Quality | None) -> str:
    return "-" if quality is None else f"{100 * quality.recall:.1f} / {100 * quality.recall_all:.1f}"
