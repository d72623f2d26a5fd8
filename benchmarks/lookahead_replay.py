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

import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import ROOT, TINY_MODEL, finish, job_output, parser, run_in_process

from vllm_expert_prefetch.config import MOST_LOOKAHEAD_LAYERS, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.bounds import bound
from vllm_expert_prefetch.planning.clock import Clock
from vllm_expert_prefetch.planning.guesses import drawn
from vllm_expert_prefetch.planning.replay import Guess, Replay, Setting
from vllm_expert_prefetch.planning.simulate import Sums, belady, simulate_all
from vllm_expert_prefetch.residency import POLICIES
from vllm_expert_prefetch.tracing.card import TraceCard
from vllm_expert_prefetch.tracing.imports import read_csv
from vllm_expert_prefetch.tracing.trace import Trace, trace_of_steps

SHARES, RECORD_TIMES = (0.25, 0.5, 0.75), (0.5, 1.0, 2.0)
DISTANCES = range(1, MOST_LOOKAHEAD_LAYERS + 1)
WINDOW, WARM_UP = 160, 40
BATCH = 4


class Recording(NamedTuple):
    """Steps of one token each, the first `num_warm` of which only warm the cache."""

    name: str
    trace: Trace
    num_warm: int
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
        made = trace_of(kind, found["num_experts"], [[[ids] for ids in step] for step in found["steps"]])
        recordings.append(Recording(kind, made, WARM_UP, told(found["guesses"])))
    recall = [statistics.mean(own[distance - 1] for own in recalls.values()) for distance in DISTANCES]
    traces = (
        [recording_of(path, recall) for path in sorted(options.traces.glob("*.route.csv"))] if options.traces else []
    )
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
    """What was recorded."""
    return lambda step, layer, distance: guesses[step][f"{layer},{distance}"]


def trace_of(name: str, num_experts: int, steps: Sequence[Sequence[Sequence[Sequence[int]]]]) -> Trace:
    """Of each step and layer, the experts of each token."""
    layers, top_k = len(steps[0]), max(len(ids) for step in steps for tokens in step for ids in tokens)
    card = TraceCard(name, tuple(map(str, range(layers))), (num_experts,) * layers, (top_k,) * layers, (1,) * layers)
    return trace_of_steps(card, steps)


def recording_of(path: Path, recall: Sequence[float]) -> Recording:
    """A recording of a prompt, which warms the cache token by token, and decoded tokens."""
    trace = read_csv(path, num_experts=128, by_token=True)
    num_warm = int((~trace.decodes).sum())
    return Recording(path.name.removesuffix(".route.csv"), trace, num_warm, drawn(trace, recall))


def depths(recording: Recording, options: Any) -> list[dict[str, Any]]:
    """One row per share of slots, length of a record, and depth; 0 for off."""
    rows = []
    trace, policy = recording.trace, ExpertPrefetchConfig().policy
    num_layers, num_experts = trace.card.num_layers, trace.card.num_experts[0]
    steps = range(recording.num_warm, len(trace))
    for share in SHARES:
        for record_time in RECORD_TIMES:
            clock = Clock((record_time,) * num_layers, np.ones(len(trace)))
            off = None
            for depth in (0, *DISTANCES):
                setting = Setting((round(share * num_experts),) * num_layers, policy, depth)
                replay = Replay(trace, setting, clock, recording.guess if depth else None)
                replay.warm(recording.num_warm)
                warm = replay.words
                replay.run(steps)
                words = replay.words.since(warm)
                off = off or (words.misses, replay.stall, replay.demanded)
                least = bound(num_layers, off[0] / len(steps), record_time)
                row = {"recording": recording.name, "share": share, "record_time": record_time, "depth": depth}
                row |= {
                    "over_bound": round(replay.time / len(steps) / least, 3),
                    "stalls_hidden": round(1 - replay.stall / off[1], 3),
                    "more_bytes": round((replay.demanded + replay.prefetched) / off[2] - 1, 3),
                    "displaced": words.displaced,
                }
                rows.append(row)
                if not options.json:
                    print(row, flush=True)
    return rows


def policy_rows(recording: Recording, options: Any) -> list[dict[str, Any]]:
    """Hit rates in per cent, one row per share of slots and number of sequences."""
    rows = []
    one, num_experts = recording.trace, recording.trace.card.num_experts[0]
    shares = (0.125, *SHARES) if num_experts > 16 else SHARES
    for batch in (1, BATCH):
        length = len(one) // batch
        order = np.arange(length * batch).reshape(batch, length).T.ravel()  # a token of each place, then the next ones
        together = replace(
            one,
            tokens=np.full(length, batch, dtype=np.int32),
            prefilling=(np.arange(length) < recording.num_warm // batch).astype(np.int32),
            ids=tuple(np.ascontiguousarray(ids[order]) for ids in one.ids),
        )
        for share in shares:
            slots = (round(share * num_experts),) * one.card.num_layers
            found = {name: simulate_all(together, Setting(slots, name)) for name in POLICIES}
            found["belady"] = sum((belady(together, number, own) for number, own in enumerate(slots)), Sums())
            row: dict[str, Any] = {"recording": recording.name, "share": share, "sequences": batch}
            row |= {name: round(100 * sums.decode_hit_rate, 2) for name, sums in found.items()}
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
