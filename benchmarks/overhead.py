"""What does the plugin cost when nothing has to be copied? Decode time per token, stock against plugin, batch 1.

One engine per variant, each in a process of its own, measured in turn (round after round) so that a drift of the
machine's speed reaches all of them. TPOT is the median time of a decode step; ratios are ratios of medians.
`tpot_ratio` is that of full residency, the worst of the modes measured.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

from harness import TINY_MODEL, Engine, engine_environment, finish, load_prompts, parser


def measure(engine: Engine, num_tokens: int) -> None:
    """In the child: for every line on stdin generate once; print the median decode step in milliseconds."""
    from vllm import SamplingParams

    llm = engine.open()
    prompts = load_prompts(8)
    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    print("ready", flush=True)
    for number, _ in enumerate(sys.stdin):
        llm.llm_engine.add_request(str(number), prompts[number % len(prompts)], sampling)
        steps = []
        while llm.llm_engine.has_unfinished_requests():
            started = time.perf_counter()
            llm.llm_engine.step()
            steps.append(time.perf_counter() - started)
        print(1000 * statistics.median(steps[1:]), flush=True)


class Child:
    """A measuring process."""

    def __init__(self, engine: Engine, num_tokens: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--job", json.dumps({"engine": asdict(engine), "num_tokens": num_tokens})],
            env=engine_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def line(self) -> str:
        """The next line that is one of ours; engines print, too."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.strip() == "ready" or line.strip().replace(".", "", 1).isdigit():
                return line.strip()
        raise RuntimeError("a measuring process ended early; run it by hand with --job to see why")

    def milliseconds(self) -> float:
        """One round."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return float(self.line())

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def variants(slots: list[str]) -> dict[str, dict[str, Any] | None]:
    """Name -> the plugin's configuration; None is stock vLLM."""
    return {"stock": None, **{share: {"cache_fraction": float(share)} for share in slots}}


def run_mode(model: str, mode: str, shares: list[str], rounds: int, num_tokens: int) -> dict[str, float]:
    """Median TPOT in milliseconds of each variant."""
    children = {
        name: Child(Engine(model, mode == "eager", config, max_num_seqs=1), num_tokens)
        for name, config in variants(shares).items()
    }
    for child in children.values():
        child.line()
    times: dict[str, list[float]] = {name: [] for name in children}
    for number in range(rounds + 2):
        for name, child in children.items():
            milliseconds = child.milliseconds()
            if number >= 2:  # warm-up
                times[name].append(milliseconds)
    for child in children.values():
        child.close()
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> int:
    """Measure and report."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default=str(TINY_MODEL))
    arguments.add_argument("--modes", default="eager,compiled")
    arguments.add_argument("--residency", default="1.0,0.9375,0.5")
    arguments.add_argument("--rounds", type=int, default=30)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--name", default="overhead", help="file name of the result")
    options = arguments.parse_args()
    if options.job:
        job = json.loads(options.job)
        measure(Engine(**job["engine"]), job["num_tokens"])
        return 0
    if options.quick:
        options.modes, options.residency, options.rounds, options.tokens = "eager", "1.0", 15, 32
    rows = []
    for mode in options.modes.split(","):
        medians = run_mode(options.model, mode, options.residency.split(","), options.rounds, options.tokens)
        for share in options.residency.split(","):
            row = {"mode": mode, "residency": share, "tpot_ms": medians[share], "stock_tpot_ms": medians["stock"]}
            rows.append({**row, "tpot_ratio": medians[share] / medians["stock"]})
            if not options.json:
                print(rows[-1])
    full = [row["tpot_ratio"] for row in rows if float(row["residency"]) == 1]
    result = {"model": options.model.rstrip("/").split("/")[-1], "tpot_ratio": max(full, default=None), "rows": rows}
    finish(options.name, result, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
