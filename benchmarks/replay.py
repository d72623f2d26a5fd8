"""What does a prompt do to the cache that decodes? Recorded routing of real models, replayed through the planner.

`--traces FOLDER` holds files `NAME.route.csv`: lines `turn,phase,step,layer,slot,expert,...` behind `#` comments and a
header, phase 0 for the prompt and 1 for decoding. `--quick` goes without, on routing that is made up. Hit rates of
decode steps, per cent, equal slots in every layer.

Right after the prompt:

* `one_step`: the prompt is one step, as vLLM serves it; `by_token`: the same prompt, token by token, as if decoded;
* `untouched`: slots that hold experts 0 to C - 1, and a prompt that changes nothing (the rule before overflow rows).

The `next_tokens` tokens (100, or the second half of a shorter recording) behind another prompt in the middle:

* `undisturbed`: without it;
* `after_foreign`: 2,000 tokens in one step, which choose among all experts, so that the step needs each of them;
* `after_long`: the same number in four steps, which choose among 60 % of each layer's experts, drawn at random. The
  others go without use for so long that they may lose their slots.

`foreign_cost` and `long_cost` are the points lost.
"""

import random
import sys
from pathlib import Path

import numpy as np
from harness import finish, parser
from simulate_speed import made_trace

from vllm_expert_prefetch.planning.planner import Planner
from vllm_expert_prefetch.residency import POLICIES
from vllm_expert_prefetch.tracing.imports import read_csv

Token = dict[int, list[int]]
"""Layer -> routed experts."""

FOREIGN_TOKENS, WINDOW = 2000, 100
LONG_STEPS, LONG_SHARE = 4, 0.6


def load(path: Path) -> tuple[list[Token], list[Token]]:
    """The prompt's and the decoded tokens of a recording."""
    trace = read_csv(path, by_token=True)
    layers = [(int(name), trace.routed(number).tolist()) for number, name in enumerate(trace.card.layers)]
    phases: tuple[list[Token], list[Token]] = ([], [])
    for step, decodes in enumerate(trace.decodes.tolist()):
        routed = {layer: [expert for expert in ids[step] if expert >= 0] for layer, ids in layers}
        phases[decodes].append({layer: ids for layer, ids in routed.items() if ids})
    return phases


def made_up(num_prompt: int = 40, num_decoded: int = 120) -> tuple[list[Token], list[Token]]:
    """As `load`, of routing that is made up."""
    layers = [ids.tolist() for ids in made_trace(num_prompt + num_decoded, 1).ids]
    tokens = [dict(enumerate(routed)) for routed in zip(*layers, strict=True)]
    return tokens[:num_prompt], tokens[num_prompt:]


class Replay:
    """One model's layers, decoding the same tokens again and again in different ways."""

    def __init__(
        self, prompt: list[Token], decoded: list[Token], num_experts: int, num_slots: int, policy: str
    ) -> None:
        self.prompt, self.decoded, self.num_experts, self.num_slots = prompt, decoded, num_experts, num_slots
        self.layers = sorted(decoded[0])
        self.caches = {layer: Planner(num_experts, num_slots, 1, policy) for layer in self.layers}

    def serve(self, layer: int, ids: list[int]) -> None:
        """One step of `layer`."""
        self.caches[layer].plan(np.array(ids, dtype=np.int32))

    def prefill(self, one_step: bool) -> None:
        """Serve the prompt as one step, or token by token."""
        for layer in self.layers:
            routed = [token[layer] for token in self.prompt if layer in token]
            for ids in [[expert for token in routed for expert in token]] if one_step else routed:
                self.serve(layer, ids)

    def fill(self) -> None:
        """Experts 0 to C - 1 in the slots, and cold."""
        for cache in self.caches.values():
            cache.plan_prefetch(np.arange(self.num_slots, dtype=np.int32), self.num_slots, False)

    def interrupt(self, num_tokens: int, num_steps: int, share: float) -> None:
        """Serve another prompt in `num_steps` steps, whose tokens choose among a `share` of each layer's experts."""
        rng = random.Random(0)
        top_k = len(self.decoded[0][self.layers[0]])
        for layer in self.layers:
            chosen = rng.sample(range(self.num_experts), int(share * self.num_experts))
            for _ in range(num_steps):
                self.serve(layer, [e for _ in range(num_tokens // num_steps) for e in rng.sample(chosen, top_k)])

    def decode(self, start: int, end: int) -> float:
        """Serve these decoded tokens one by one; the share of hits, per cent."""
        before = [cache.words for cache in self.caches.values()]
        for token in self.decoded[start:end]:
            for layer in self.layers:
                self.serve(layer, token.get(layer, []))
        done = [cache.words.since(then) for cache, then in zip(self.caches.values(), before, strict=True)]
        return 100 * sum(words.hits for words in done) / sum(words.lookups for words in done)


def measure(prompt: list[Token], decoded: list[Token], num_experts: int, share: float, policy: str) -> dict[str, float]:
    """All figures of one model, policy and share of experts with a slot, by the names above."""
    num_slots = int(share * num_experts + 1e-9)

    def replay() -> Replay:
        return Replay(prompt, decoded, num_experts, num_slots, policy)

    found = {}
    for name, one_step in (("one_step", True), ("by_token", False)):
        model = replay()
        model.prefill(one_step)
        found[name] = model.decode(0, len(decoded))
    model = replay()
    model.fill()
    found["untouched"] = model.decode(0, len(decoded))
    middle = max(0, len(decoded) - WINDOW) or len(decoded) // 2
    others = {"undisturbed": None, "after_foreign": (1, 1.0), "after_long": (LONG_STEPS, LONG_SHARE)}
    for name, other in others.items():
        model = replay()
        model.prefill(one_step=True)
        model.decode(0, middle)
        if other is not None:
            model.interrupt(FOREIGN_TOKENS, *other)
        found[name] = model.decode(middle, middle + WINDOW)
    found["foreign_cost"] = found["undisturbed"] - found["after_foreign"]
    found["long_cost"] = found["undisturbed"] - found["after_long"]
    return {name: round(value, 2) for name, value in found.items()} | {"next_tokens": len(decoded[middle:][:WINDOW])}


def main() -> int:
    """Replay every recording in the folder."""
    arguments = parser(__doc__)
    arguments.add_argument("--traces", type=Path, help="folder of recordings, *.route.csv")
    arguments.add_argument("--experts", type=int, default=128, help="routed experts of each layer")
    arguments.add_argument("--shares", default="0.125,0.25,0.35,0.5", help="shares of the experts with a slot")
    options = arguments.parse_args()
    paths = sorted(options.traces.glob("*.route.csv")) if options.traces else []
    recordings = {path.name.removesuffix(".route.csv"): load(path) for path in paths}
    if options.quick and not options.traces:
        recordings = {"made up": made_up()}
    if not recordings:
        where = f"no *.route.csv in {options.traces}" if options.traces else "--traces FOLDER is needed"
        print(where, file=sys.stderr)
        return 1
    policies = ["lru"] if options.quick else list(POLICIES)
    rows = []
    for name, (prompt, decoded) in recordings.items():
        for share in map(float, options.shares.split(",")):
            for policy in policies:
                figures = measure(prompt, decoded, options.experts, share, policy)
                rows.append({"model": name, "share": share, "policy": policy, **figures})
                if not options.json:
                    print(rows[-1], flush=True)
    worst = {
        "most_below_by_token": round(max(row["by_token"] - row["one_step"] for row in rows), 2),
        "most_foreign_cost": max(row["foreign_cost"] for row in rows),
        "most_long_cost": max(row["long_cost"] for row in rows),
    }
    finish("replay", {**worst, "rows": rows}, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
