"""How fast are traces replayed? Made-up routing with the shape of Qwen3-30B-A3B: 128 experts, top-8, on one core.

* `layer_steps_per_second`: one layer's step after the other through the native planner, as `vllm-expert-prefetch
  simulate` replays them without look-ahead; the slowest policy, half of the experts resident, one sequence, whose hit
  rate is `hit_rate`.
* `by_policy`, and with eight sequences (`batched`).
* `belady_per_second`: the bound; `look_ahead_per_second`: all layers against a clock, two layers ahead.
"""

import sys
import time
from collections.abc import Callable

import numpy as np
from harness import finish, parser

from vllm_expert_prefetch.planning.clock import Clock
from vllm_expert_prefetch.planning.guesses import RECALL
from vllm_expert_prefetch.planning.replay import Setting
from vllm_expert_prefetch.planning.simulate import belady, look_ahead, simulate_all, simulate_layer
from vllm_expert_prefetch.residency import POLICIES
from vllm_expert_prefetch.tracing.card import TraceCard
from vllm_expert_prefetch.tracing.trace import Trace

EXPERTS, TOP_K, LAYERS = 128, 8, 8


def main() -> int:
    """Make a trace, replay it, and report."""
    options = parser(__doc__).parse_args()
    num_steps = 2_000 if options.quick else 40_000
    one, many = made_trace(num_steps, 1), made_trace(num_steps // 8, 8)
    half = (EXPERTS // 2,) * LAYERS
    by_policy = {name: served(one, Setting(half, name)) for name in POLICIES}
    few = one.last(min(num_steps, 1_000))
    clock = Clock((1.0,) * LAYERS, np.ones(len(few)))
    result = {
        "layer_steps_per_second": min(by_policy.values()),
        "hit_rate": round(simulate_all(one, Setting(half, "lru")).hit_rate, 3),
        "by_policy": by_policy,
        "batched": {name: served(many, Setting(half, name)) for name in POLICIES},
        "belady_per_second": rate(len(few), lambda: belady(few, 0, EXPERTS // 2)),
        "look_ahead_per_second": rate(
            LAYERS * len(few), lambda: look_ahead(few, Setting(half, "ewma", 2), clock, RECALL)
        ),
    }
    finish("simulate_speed", result, options)
    return 0


def made_trace(num_steps: int, num_sequences: int) -> Trace:
    """Each layer prefers some experts, and half of a token's experts are those of the token before."""
    rng = np.random.default_rng(0)
    num_tokens = num_steps * num_sequences
    ids = []
    for _ in range(LAYERS):
        liking = rng.normal(size=EXPERTS)
        drawn = liking + rng.gumbel(size=(num_tokens, EXPERTS))
        drawn[1:] += 0.5 * drawn[:-1]
        ids.append(np.argpartition(-drawn, TOP_K, axis=1)[:, :TOP_K].astype(np.uint8))
    names = tuple(map(str, range(LAYERS)))
    card = TraceCard("made up", names, (EXPERTS,) * LAYERS, (TOP_K,) * LAYERS, (9_437_184,) * LAYERS)
    each, none = np.full(num_steps, num_sequences, dtype=np.int32), np.zeros(num_steps, dtype=np.int32)
    untimed = np.zeros(num_steps, dtype=np.float32)
    return Trace(card, each, none, each, untimed, untimed, tuple(ids))


def served(trace: Trace, setting: Setting) -> int:
    """Steps of a layer in a second, the best of three."""
    clock = Clock((1.0,) * LAYERS, np.ones(len(trace)))

    def replay() -> None:
        for layer in range(LAYERS):
            simulate_layer(trace, layer, setting, clock)

    return max(rate(LAYERS * len(trace), replay) for _ in range(3))


def rate(count: int, work: Callable[[], object]) -> int:
    """`count` over the seconds that `work` takes."""
    begin = time.perf_counter()
    work()
    return round(count / (time.perf_counter() - begin))


if __name__ == "__main__":
    sys.exit(main())
