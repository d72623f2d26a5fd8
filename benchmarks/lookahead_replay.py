"""How far should look-ahead look, and who should leave? Routing of real models, replayed against a clock.

Two sources. Recordings of the demo models, made here: text of several domains, each token's routing, and what the
router predictor guesses at distances 1 to 4 from its hidden states. And `--traces FOLDER`, files `NAME.route.csv` as
`benchmarks/replay.py` reads them: routing without hidden states, whose guesses are drawn with the recall that the demo
models' router has at each distance, wrong ones by how often an expert is used.

*Depths*: TPOT over `max(compute, missed bytes / link)` of the same cache without look-ahead, for three shares of
experts with a slot, and records that take 0.5, 1 and 2 times as long as a layer; and the share of stalls that is gone.
*Policies*: hit rates of one sequence, and of four at once (places of the same recording), with Belady's beside them.

`over_bound` is the worst ratio of depth 4 for each (share, record), over the traces; `worse_than_off` how often looking
ahead cost time, in all cells; `policy_gain` the least, the mean and the greatest difference to lru, in points.
"""

import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from harness import ROOT, TINY_MODEL, finish, job_output, parser, run_in_process
from replay import load

from vllm_expert_prefetch.config import MOST_LOOKAHEAD_LAYERS, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.replay import Guess, Replay, Step, belady_hits, bound
from vllm_expert_prefetch.residency import POLICIES

SHARES, RECORD_TIMES = (0.25, 0.5, 0.75), (0.5, 1.0, 2.0)
DISTANCES = range(1, MOST_LOOKAHEAD_LAYERS + 1)
WINDOW, WARM_UP = 160, 40
BATCH = 4


class Recording(NamedTuple):
    """`steps` of one token each, the first `num_warm` of which only warm the cache."""

    name: str
    steps: Sequence[Step]
    num_warm: int
    num_experts: int
    guess: Guess | None
    """None: to be drawn."""


def main() -> int:
    """Record, replay and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--traces", type=Path, help="folder of recordings, *.route.csv, 128 experts each")
    arguments.add_argument("--models", default="tiny,smollm2-moe", help="tiny, smollm2-moe; the latter made beforehand")
    arguments.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens, recorded of each model")
    options = arguments.parse_args()
    if options.job:
        with job_output(options.job) as (job, result):
            result.update(record(job["model"], job["windows"]))
        return 0
    if options.quick:
        options.models, options.windows = "tiny", 2
    recordings, recalls = [], {}
    for kind in options.models.split(","):
        model = str(TINY_MODEL if kind == "tiny" else ROOT / ".demo" / kind)
        found = run_in_process(__file__, {"model": model, "windows": options.windows})
        recalls[kind] = found["recall"]
        recordings.append(Recording(kind, found["steps"], WARM_UP, found["num_experts"], told(found["guesses"])))
    recall = [statistics.mean(own[distance - 1] for own in recalls.values()) for distance in DISTANCES]
    traces = [trace(path, recall) for path in sorted(options.traces.glob("*.route.csv"))] if options.traces else []
    rows = [row for recording in [*recordings, *traces] for row in depths(recording, options)]
    policies = [row for recording in [*recordings, *traces] for row in policy_rows(recording, options)]
    names = {recording.name for recording in traces}
    finish("lookahead_replay", {**summary(rows, policies, names), "recall": recalls, "rows": rows + policies}, options)
    return 0


def record(model: str, num_windows: int) -> dict[str, Any]:
    """In the child: routing of text, what the router guesses from each layer, and how much of it is right."""
    from vllm_expert_prefetch.demo.text import load_documents
    from vllm_expert_prefetch.prediction.router import RouterPredictor
    from vllm_expert_prefetch.studies.recording import open_recording_engine

    documents = [document.text for document in load_documents()]
    with open_recording_engine(model, WINDOW) as engine:
        windows = [engine.tokenize(text)[:WINDOW] for text in documents]
        windows = [window for window in windows if len(window) == WINDOW][:num_windows]
        gates = engine.gates
        predictors = [RouterPredictor(gates, distance) for distance in DISTANCES]
        steps: list[list[list[int]]] = []
        guesses: list[dict[str, list[int]]] = []
        found = torch.zeros(len(DISTANCES), 2)
        for window in windows:
            signals = engine.record(window)
            ids = torch.stack([one.topk_ids.long() for one in signals])
            steps += ids.transpose(0, 1).tolist()
            guesses += [{} for _ in window]
            for predictor in predictors:
                for layer in range(len(gates) - predictor.distance):
                    target = layer + predictor.distance
                    guess = predictor.predict(layer, signals[layer], ids.shape[2])
                    assert guess is not None
                    hits = (guess.ids.unsqueeze(2) == ids[target].unsqueeze(1)).any(2)
                    found[predictor.distance - 1] += torch.tensor([float(hits.sum()), float(hits.numel())])
                    for token, own in enumerate(guess.ids.tolist()):
                        guesses[token - len(window)][f"{target},{predictor.distance}"] = own
        recall = (found[:, 0] / found[:, 1]).tolist()
        return {"steps": steps, "guesses": guesses, "recall": recall, "num_experts": gates[0].num_experts}


def told(guesses: list[dict[str, list[int]]]) -> Guess:
    """What was recorded, from the first step behind the warm-up on."""
    return lambda step, layer, distance: guesses[step + WARM_UP][f"{layer},{distance}"]


def trace(path: Path, recall: Sequence[float]) -> Recording:
    """A recording of a prompt, which warms the cache token by token, and decoded tokens."""
    prompt, decoded = load(path)
    layers = sorted(decoded[0])
    steps = [[token.get(layer, []) for layer in layers] for token in [*prompt, *decoded]]
    guess = drawn(steps[len(prompt) :], recall)
    return Recording(path.name.removesuffix(".route.csv"), steps, len(prompt), 128, guess)


def drawn(steps: Sequence[Step], recall: Sequence[float], seed: int = 0) -> Guess:
    """Guesses of which a share `recall` of each distance is right; what a far one finds, a nearer one finds as well."""
    used = [Counter(expert for step in steps for expert in step[layer]) for layer in range(len(steps[0]))]

    def guess(step: int, layer: int, distance: int) -> list[int]:
        rng = random.Random(f"{seed} {step} {layer}")
        true = steps[step][layer]
        right = [expert for expert in true if rng.random() < recall[distance - 1]]
        experts, weights = zip(*used[layer].items(), strict=True)
        drawn = dict.fromkeys(rng.choices(experts, weights, k=8 * len(true) + 8))
        return [*right, *[expert for expert in drawn if expert not in true][: len(true) - len(right)]]

    return guess


def depths(recording: Recording, options: Any) -> list[dict[str, Any]]:
    """One row per share of slots, length of a record, and depth; 0 for off."""
    rows = []
    warm, steps = recording.steps[: recording.num_warm], recording.steps[recording.num_warm :]
    num_layers, policy = len(steps[0]), POLICIES[ExpertPrefetchConfig().policy]
    for share in SHARES:
        for record_time in RECORD_TIMES:
            off = None
            for depth in (0, *DISTANCES):
                guess = recording.guess if depth else None
                numbers = (num_layers, recording.num_experts, round(share * recording.num_experts))
                replay = Replay(*numbers, policy, record_time, guess, depth)
                replay.warm(warm)
                sums = replay.run(steps)
                off = off or sums
                least = bound(num_layers, off.misses / len(steps), record_time)
                row = {"recording": recording.name, "share": share, "record_time": record_time, "depth": depth}
                row |= {
                    "over_bound": round(sums.time / len(steps) / least, 3),
                    "stalls_hidden": round(1 - sums.stall / off.stall, 3),
                    "more_bytes": round((sums.demanded + sums.prefetched) / off.demanded - 1, 3),
                    "displaced": sums.displaced,
                }
                rows.append(row)
                if not options.json:
                    print(row, flush=True)
    return rows


def policy_rows(recording: Recording, options: Any) -> list[dict[str, Any]]:
    """Hit rates in per cent, one row per share of slots and number of sequences."""
    rows = []
    shares = (0.125, *SHARES) if recording.num_experts > 16 else SHARES
    for batch in (1, BATCH):
        length = len(recording.steps) // batch
        places = [recording.steps[number * length : (number + 1) * length] for number in range(batch)]
        steps = [[list(chain(*own)) for own in zip(*tokens, strict=True)] for tokens in zip(*places, strict=True)]
        num_warm = recording.num_warm // batch
        for share in shares:
            num_slots = round(share * recording.num_experts)
            row: dict[str, Any] = {"recording": recording.name, "share": share, "sequences": batch}
            for name, policy in POLICIES.items():
                replay = Replay(len(steps[0]), recording.num_experts, num_slots, policy, 1.0)
                replay.warm(steps[:num_warm])
                sums = replay.run(steps[num_warm:])
                row[name] = round(100 * sums.hits / (sums.hits + sums.misses), 2)
            best = [belady_hits([step[layer] for step in steps], num_slots, num_warm) for layer in range(len(steps[0]))]
            row["belady"] = round(100 * sum(hits for hits, _ in best) / sum(lookups for _, lookups in best), 2)
            rows.append(row)
            if not options.json:
                print(row, flush=True)
    return rows


def summary(rows: list[dict[str, Any]], policies: list[dict[str, Any]], traces: set[str]) -> dict[str, Any]:
    """The figures that the study is about."""
    deepest = [row for row in rows if row["depth"] == MOST_LOOKAHEAD_LAYERS]
    off = {(row["recording"], row["share"], row["record_time"]): row for row in rows if row["depth"] == 0}
    worse = [
        row for row in rows if row["over_bound"] > off[row["recording"], row["share"], row["record_time"]]["over_bound"]
    ]
    over_bound = {
        f"{share:g}, {record_time:g}": max(
            (
                row["over_bound"]
                for row in deepest
                if row["recording"] in traces and row["share"] == share and row["record_time"] == record_time
            ),
            default=None,
        )
        for share in SHARES
        for record_time in RECORD_TIMES
    }
    gains = {name: [round(row[name] - row["lru"], 2) for row in policies] for name in POLICIES if name != "lru"}
    return {
        "over_bound": over_bound,
        "worse_than_off": len(worse),
        "policy_gain": {name: [min(own), round(statistics.mean(own), 2), max(own)] for name, own in gains.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
