"""Does the plugin give the tokens of plain vLLM? Greedy decoding, stock against plugin, stock against stock as control.

Tokens and log-probabilities must be equal to the last bit, in every configuration. A sequence is compared up to its
first difference. A configuration counts only if its cache was at work: lookups, and where steps are wide, overflow
rows. Models of two and three layers are the tiny one's first layers.
"""

import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness import TINY_MODEL, Engine, counters, engine_job, finish, job_output, load_prompts, parser, run_in_process

Sequence = list[tuple[int, float]]
"""Per generated token: id and its log-probability."""


@dataclass
class Comparison:
    """Two runs of the same prompts."""

    compared_tokens: int = 0
    differing_tokens: int = 0
    max_deviation: float = 0.0

    @property
    def bit_equal(self) -> bool:
        """No token and no log-probability differs."""
        return self.differing_tokens == 0 and self.max_deviation == 0.0


def compare(reference: list[Sequence], other: list[Sequence]) -> Comparison:
    """Compare sequences up to their first difference."""
    result = Comparison()
    for ours, theirs in zip(reference, other, strict=True):
        for (token, logprob), (other_token, other_logprob) in zip(ours, theirs, strict=True):
            result.compared_tokens += 1
            if token != other_token:
                result.differing_tokens += 1
                break
            result.max_deviation = max(result.max_deviation, abs(logprob - other_logprob))
    return result


def generate(job: dict[str, Any], result: dict[str, Any]) -> None:
    """In the child: greedy sequences for each batch size, and what the plugin counted meanwhile."""
    from vllm import SamplingParams

    llm = Engine(**job["engine"]).open()
    prompts = load_prompts(job["num_prompts"])
    sampling = SamplingParams(temperature=0, max_tokens=job["num_tokens"], logprobs=2, ignore_eos=True)
    for batch in job["batches"]:
        before = counters()
        groups = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
        outputs = [output for group in groups for output in llm.generate(group, sampling, use_tqdm=False)]
        grown = {name: value - before.get(name, 0) for name, value in counters().items()}
        result[str(batch)] = {
            "sequences": [_sequence(output.outputs[0]) for output in outputs],
            "lookups": sum(value for name, value in grown.items() if name.startswith("lookups_total")),
            "wide_steps": grown.get("moe_steps_total/wide", 0),
            "overflow_bytes": grown.get("transfer_bytes_total/overflow", 0),
            "texts": [output.outputs[0].text for output in outputs[:4]],
        }


def _sequence(completion: Any) -> Sequence:
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    return [(token, candidates[token].logprob) for token, candidates in pairs]


def first_layers(model: str, num_layers: int, folder: Path) -> str:
    """A checkpoint in `folder` that is `model` without its later layers."""
    from safetensors.torch import load_file, save_file

    target = folder / f"{Path(model).name}-{num_layers}-layers"
    target.mkdir()
    for path in Path(model).iterdir():
        if path.suffix == ".json" and path.name != "config.json":
            (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((Path(model) / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
    tensors = load_file(Path(model) / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".layers." not in name or int(name.split(".")[2]) < num_layers}
    save_file(kept, target / "model.safetensors", {"format": "pt"})
    return str(target)


def main() -> int:
    """Run every configuration; 0 when nothing differs and every cache was at work."""
    arguments = parser(__doc__)
    arguments.add_argument("--model", default=str(TINY_MODEL))
    arguments.add_argument(
        "--residency", default="0.25,0.5,0.75,0.9,0.95,1.0", help="shares of the experts with a slot"
    )
    arguments.add_argument("--modes", default="eager,compiled")
    arguments.add_argument("--batches", default="1,16")
    arguments.add_argument("--layers", default="2,3", help="also models of so many layers, at half and 0.9 residency")
    arguments.add_argument("--prompts", type=int, default=64)
    arguments.add_argument("--tokens", type=int, default=64)
    arguments.add_argument("--name", default="exactness", help="file name of the result")
    options = arguments.parse_args()
    if options.job:
        with job_output(options.job) as (job, result):
            generate(job, result)
        return 0
    if options.quick:
        options.residency, options.modes, options.layers = "0.25,0.9", "eager", ""
        options.prompts, options.tokens = 16, 16
    with tempfile.TemporaryDirectory() as folder:
        shares = options.residency.split(",")
        models = {options.model: shares}
        for num_layers in filter(None, options.layers.split(",")):
            models[first_layers(options.model, int(num_layers), Path(folder))] = ["0.5", "0.9"]
        rows = [row for model, shares in models.items() for row in run(options, model, shares)]
    plugin_rows = [row for row in rows if row["residency"] != "control"]
    result = {
        "model": Path(options.model).name,
        "configurations": len(plugin_rows),
        "compared_tokens": sum(row["compared_tokens"] for row in plugin_rows),
        "differing_tokens": sum(row["differing_tokens"] for row in plugin_rows),
        "bit_equal_logprobs": all(row["bit_equal"] for row in plugin_rows),
        "caches_at_work": all(row["at_work"] for row in plugin_rows),
        "max_deviation": max(row["max_deviation"] for row in plugin_rows),
        "rows": rows,
    }
    finish(options.name, result, options)
    return 0 if result["bit_equal_logprobs"] and result["caches_at_work"] else 1


def run(options: Any, model: str, shares: list[str]) -> list[dict[str, Any]]:
    """Every configuration of one model, compared with stock in the same mode."""
    batches = [int(batch) for batch in options.batches.split(",")]
    rows = []
    for mode in options.modes.split(","):
        job = {"batches": batches, "num_prompts": options.prompts, "num_tokens": options.tokens}

        def generated(config: dict[str, Any] | None, mode: str = mode, job: dict[str, Any] = job) -> dict[str, Any]:
            engine = Engine(model, mode == "eager", config, max_num_seqs=max(batches))
            return run_in_process(__file__, engine_job(engine, **job))

        stock = generated(None)
        runs: list[tuple[str, dict[str, Any]]] = [] if options.quick else [("control", generated(None))]
        runs += [(share, generated({"cache_fraction": float(share)})) for share in shares]
        for (label, measured), batch in itertools.product(runs, batches):
            theirs = measured[str(batch)]
            comparison = compare(stock[str(batch)]["sequences"], theirs["sequences"])
            row = {"model": Path(model).name, "mode": mode, "residency": label, "batch": batch, **vars(comparison)}
            row |= {"bit_equal": comparison.bit_equal, **{name: theirs[name] for name in ("lookups", "overflow_bytes")}}
            has_cache = label not in ("control", "1.0")
            wide_without_overflow = theirs["wide_steps"] > 0 and theirs["overflow_bytes"] == 0
            row["at_work"] = not has_cache or (theirs["lookups"] > 0 and not wide_without_overflow)
            rows.append(row)
            if not options.json:
                print(rows[-1])
    return rows


if __name__ == "__main__":
    sys.exit(main())
