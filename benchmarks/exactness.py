"""Does the plugin give the tokens of plain vLLM? Greedy decoding, stock against plugin, stock against stock as control.

A token that differs counts, except where the plugin split a step by experts and stock's own margin between its two best
tokens is below the measured deviation of the log-probabilities: there stock itself has no clear answer. Such places are
reported as `near_ties`. A sequence is compared up to its first difference. Log-probabilities must be bit-equal in every
configuration in which no step was split by experts.
"""

import itertools
import sys
from dataclasses import dataclass
from typing import Any

from harness import TINY_MODEL, Engine, counters, engine_job, finish, job_output, load_prompts, parser, run_in_process

Sequence = list[tuple[int, float, float]]
"""Per generated token: id, its log-probability, the margin to the runner-up."""


@dataclass
class Comparison:
    """Two runs of the same prompts."""

    compared_tokens: int = 0
    differing_tokens: int = 0
    near_ties: int = 0
    max_deviation: float = 0.0

    @property
    def bit_equal(self) -> bool:
        """No token and no log-probability differs."""
        return self.differing_tokens == self.near_ties == 0 and self.max_deviation == 0.0


def compare(reference: list[Sequence], other: list[Sequence], rounding_allowed: bool) -> Comparison:
    """Compare sequences up to their first difference. `rounding_allowed`: near ties of `reference` do not count."""
    result = Comparison()
    first_differences = []
    for ours, theirs in zip(reference, other, strict=True):
        for (token, logprob, margin), (other_token, other_logprob, _) in zip(ours, theirs, strict=True):
            result.compared_tokens += 1
            if token != other_token:
                first_differences.append(margin)
                break
            result.max_deviation = max(result.max_deviation, abs(logprob - other_logprob))
    for margin in first_differences:
        # Two log-probabilities deviate, hence twice the deviation of one.
        if rounding_allowed and margin <= 2 * result.max_deviation:
            result.near_ties += 1
        else:
            result.differing_tokens += 1
    return result


def generate(job: dict[str, Any], result: dict[str, Any]) -> None:
    """In the child: greedy sequences for each batch size, and what the plugin counted meanwhile."""
    from vllm import SamplingParams

    llm = Engine(**job["engine"]).open()
    prompts = load_prompts(job["num_prompts"])
    sampling = SamplingParams(temperature=0, max_tokens=job["num_tokens"], logprobs=2, ignore_eos=True)
    for batch in job["batches"]:
        before = counters().get("waves_total/experts", 0)
        groups = itertools.batched(prompts, batch) if sys.version_info >= (3, 12) else _batched(prompts, batch)
        outputs = [output for group in groups for output in llm.generate(list(group), sampling, use_tqdm=False)]
        result[str(batch)] = {
            "sequences": [_sequence(output.outputs[0]) for output in outputs],
            "expert_waves": counters().get("waves_total/experts", 0) - before,
            "texts": [output.outputs[0].text for output in outputs[:4]],
        }


def _batched(items: list[str], size: int) -> list[list[str]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _sequence(completion: Any) -> Sequence:
    sequence = []
    for token, candidates in zip(completion.token_ids, completion.logprobs, strict=True):
        best, second, *_ = sorted((candidate.logprob for candidate in candidates.values()), reverse=True)
        sequence.append((token, candidates[token].logprob, best - second))
    return sequence


def main() -> int:
    """Run every configuration; 0 when no token differs."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default=str(TINY_MODEL))
    arguments.add_argument("--residency", default="0.25,0.5,0.75,1.0", help="shares of the experts with a slot")
    arguments.add_argument("--modes", default="eager,compiled")
    arguments.add_argument("--batches", default="1,16")
    arguments.add_argument("--prompts", type=int, default=64)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--name", default="exactness", help="file name of the result")
    options = arguments.parse_args()
    if options.job:
        with job_output(options.job) as (job, result):
            generate(job, result)
        return 0
    if options.quick:
        options.residency, options.modes, options.prompts, options.tokens = "0.25,0.5", "eager", 16, 16
    result = run(options)
    finish(options.name, result, options)
    return 0 if result["differing_tokens"] == 0 and result["bit_equal_logprobs"] else 1


def run(options: Any) -> dict[str, Any]:
    """All configurations, compared; the benchmark's JSON."""
    batches = [int(batch) for batch in options.batches.split(",")]
    rows = []
    sample_texts: list[str] = []
    for mode in options.modes.split(","):
        job = {"batches": batches, "num_prompts": options.prompts, "num_tokens": options.tokens}

        def sequences(config: dict[str, Any] | None, mode: str = mode, job: dict[str, Any] = job) -> dict[str, Any]:
            engine = Engine(options.model, mode == "eager", config, max_num_seqs=max(batches))
            return run_in_process(__file__, engine_job(engine, **job))

        stock = sequences(None)
        runs: list[tuple[str, dict[str, Any]]] = [] if options.quick else [("control", sequences(None))]
        runs += [(share, sequences({"cache_fraction": float(share)})) for share in options.residency.split(",")]
        for (label, measured), batch in itertools.product(runs, batches):
            ours, theirs = stock[str(batch)], measured[str(batch)]
            comparison = compare(ours["sequences"], theirs["sequences"], theirs["expert_waves"] > 0)
            rows.append(_row(mode, label, batch, comparison, theirs["expert_waves"]))
            if not options.json:
                print(rows[-1])
        sample_texts = sample_texts or stock[str(batches[0])]["texts"]
    plugin_rows = [row for row in rows if row["residency"] != "control"]
    must_be_equal = [row for row in plugin_rows if not row["expert_waves"]]
    return {
        "model": options.model.rstrip("/").split("/")[-1],
        "compared_tokens": sum(row["compared_tokens"] for row in plugin_rows),
        "differing_tokens": sum(row["differing_tokens"] for row in plugin_rows),
        "near_ties": sum(row["near_ties"] for row in plugin_rows),
        "bit_equal_logprobs": all(row["bit_equal"] for row in must_be_equal),
        "bit_equal_configurations": f"{len(must_be_equal)} of {len(plugin_rows)} had to be",
        "max_deviation": max(row["max_deviation"] for row in plugin_rows),
        "rows": rows,
        "sample_texts": sample_texts,
    }


def _row(mode: str, label: str, batch: int, comparison: Comparison, expert_waves: float) -> dict[str, Any]:
    return {
        "mode": mode,
        "residency": label,
        "batch": batch,
        **vars(comparison),
        "bit_equal": comparison.bit_equal,
        "expert_waves": int(expert_waves),
    }


if __name__ == "__main__":
    sys.exit(main())
