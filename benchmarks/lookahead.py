"""What is looking ahead worth? TPOT with every predictor, exact and speculative, at the same cache.

The link is emulated, and so fast that the copy of one expert takes `copy_compute` times as long as a layer does when it
waits for nothing: what is predicted one layer ahead can be hidden up to a ratio of 1. Variants take turns, batch by
batch. TPOT is the mean time that decode steps wait for experts, plus the lower quartile of the rest of a step: waiting
is irregular by nature, the rest only where other programs disturb. Exact variants must give the same tokens.

Names of variants that look farther than one layer ahead say so; `auto` does, and tries how far in each layer.

`tpot_gain_best` is 1 - TPOT / TPOT_off at half residency and copy_compute 1 of the best predictor that needs no
knowledge of the future, and `oracle_share` its share of the gain of one that has it: where they are lowest, over models
and batch sizes (`gains` has them all). `depths`: at one request, the share of stalls that each depth hides, its TPOT
over `max(compute, missed bytes / link)` of the same cache without look-ahead, and the bytes that it copies over those
without. `auto_worst_ratio` is the worst TPOT / TPOT_off of prefetch=auto where the link
is so fast or so slow that nothing can be gained.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from harness import ROOT, TINY_MODEL, finish, job_output, parser, run_in_process

DEMO = ROOT / ".demo"
UNCALIBRATED = ("previous", "router")
BASELINES = ("previous", "frequency", "transition", "router")
CALIBRATED = ("router_defaults", "estimator", "hybrid")
BATCHES = (1, 4)
DEPTHS, DEPTH_RATIOS = (1, 2, 4), (1.0, 2.0)
"""How many layers are looked ahead, where it matters."""
EXTREMES = (0.02, 20.0)
AUTO_WARM_UPS = 16


def main() -> int:
    """Measure, draw and report."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--models", default="tiny,smollm2-moe", help="tiny, smollm2-moe; made where they are missing"
    )
    arguments.add_argument("--residency", default="0.25,0.5,0.75")
    arguments.add_argument("--ratios", default="0.25,0.5,1,2,4", help="copy/compute at half residency; elsewhere 1")
    arguments.add_argument("--rounds", type=int, default=6, help="batches per variant; half for smollm2-moe")
    arguments.add_argument("--uncalibrated", action="store_true", help="go without artifacts that are not there")
    arguments.add_argument("--pictures", default=str(ROOT / "docs" / "pictures"), help="folder for the plots")
    options = arguments.parse_args()
    if options.job:
        with job_output(options.job) as (job, result):
            measure(job, result)
        return 0
    if options.quick:
        options.models, options.residency, options.ratios, options.rounds = "tiny", "0.5", "1", 3
    rows = []
    for kind in options.models.split(","):
        model, artifact = prepare(kind, options)
        for residency in map(float, options.residency.split(",")):
            ratios = [float(r) for r in options.ratios.split(",")] if residency == 0.5 else [1.0]
            job = {"kind": kind, "model": model, "artifact": artifact, "residency": residency, "ratios": ratios}
            rounds = options.rounds if kind == "tiny" else max(1, options.rounds // 2)
            found = run_in_process(__file__, {**job, "rounds": rounds, "quick": options.quick})
            rows += found["rows"]
            if not options.json:
                print_rows(found["rows"])
    result = {**summary(rows), "rows": rows}
    if not options.quick:
        from lookahead_plots import draw

        draw(rows, Path(options.pictures))
    finish("lookahead", result, options)
    return 0


def prepare(kind: str, options: Any) -> tuple[str, str | None]:
    """The model and its artifact, made here if need be; --quick and --uncalibrated go without what is not there."""
    tool = str(Path(sys.executable).with_name("vllm-expert-prefetch"))
    model = TINY_MODEL if kind == "tiny" else DEMO / kind
    if kind != "tiny":
        subprocess.run([tool, "demo-model", str(model), "--kind", kind], check=True, stdout=subprocess.DEVNULL)
    artifact = DEMO / f"{kind}-artifact"
    if not artifact.exists():
        if options.quick or options.uncalibrated:
            return str(model), None
        sizes = ["--m", "1", "--n", "4"] if kind == "tiny" else ["--epochs", "12"]
        command = [tool, "calibrate", str(model), "-o", str(artifact), *sizes]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return str(model), str(artifact)


def measure(job: dict[str, Any], result: dict[str, Any]) -> None:
    """In the child: all cells of one engine."""
    from lookahead_engine import INSTANT_GBPS, StudyEngine, Variant

    engine = StudyEngine(job["model"], job["residency"], True, job["artifact"], 96 if job["kind"] == "tiny" else 48)
    off, quick = Variant("off"), job["quick"]
    at_half = job["residency"] == 0.5
    cells = [(1, ratio) for ratio in [*job["ratios"], *(EXTREMES if at_half and not quick else ())]]
    cells += [(batch, 1.0) for batch in BATCHES if batch > 1 and at_half]
    result["rows"] = rows = []
    needs: dict[int, tuple[float, float]] = {}
    for batch, ratio in cells:
        requests = engine.requests(job["rounds"], batch)
        if batch not in needs:
            needs[batch] = needs_of([engine.run(off, INSTANT_GBPS, own) for own in [requests[0], *requests]][1:])
        missed_bytes, compute_ms = needs[batch]
        gbps = engine.record_bytes / (ratio * compute_ms / engine.num_layers * 1e-3) / 1e9
        variants = choose_variants(Variant, ratio, job, engine)
        measured = take_turns(engine, variants, gbps, requests)
        recalls = recall_of(engine, variants, requests[:2]) if (batch, ratio) == (1, 1) else {}
        for variant in variants:
            row = {"model": job["kind"], "residency": job["residency"], "batch": batch, "copy_compute": ratio}
            bound_ms = max(compute_ms, missed_bytes / gbps / 1e6)
            row |= {"link_gbps": gbps, "compute_ms": compute_ms, "bound_ms": bound_ms}
            found = describe(measured[variant.name], measured["off"])
            rows.append({**row, "variant": variant.name, **found, **recalls.get(variant.name, {})})
    if at_half:
        result["rows"].append(first_layer_resident(job, engine, engine.requests(job["rounds"], 1)))


def needs_of(runs: list[Any]) -> tuple[float, float]:
    """Bytes that a step without look-ahead misses, and milliseconds that it takes apart from waiting for them."""
    return statistics.mean(run.counted["transfer_bytes_total/demand"] for run in runs), rest_ms(runs)


def choose_variants(make: Any, ratio: float, job: dict[str, Any], engine: Any) -> list[Any]:
    """What is compared in a cell: everything where it tells most, elsewhere what the plots show."""
    has_artifact = job["artifact"] is not None
    best = "hybrid+transition" if has_artifact else "router"
    auto = make("auto", best, is_forced=False, depth=max(DEPTHS))
    if ratio in EXTREMES:
        return [make("off"), auto]
    names = ["router", best] if has_artifact else ["router"]
    variants = [make("off"), auto, make("oracle", "oracle")]
    if ratio in DEPTH_RATIOS:
        farther = [make(f"{best}, {depth} layers", best, depth=depth) for depth in DEPTHS if depth > 1]
        variants += [*farther, make(f"oracle, {max(DEPTHS)} layers", "oracle", depth=max(DEPTHS))]
    if (ratio, job["residency"]) == (1, 0.5):
        names = list(BASELINES if has_artifact else UNCALIBRATED)
    if (ratio, job["residency"], has_artifact) == (1, 0.5, True):
        names += [*CALIBRATED, "hybrid+previous", "hybrid+frequency", best]
        variants.append(make("speculative, as published", best, speculates="published"))
        if engine.allow_list:
            variants.append(make("speculative, guarded", best, speculates="guard"))
    return [*variants[:1], *(make(name, name) for name in names), *variants[1:]]


def take_turns(engine: Any, variants: list[Any], gbps: float, requests: list[tuple[str, ...]]) -> dict[str, list[Any]]:
    """Variant -> its runs. Each round begins with another variant; one round more, at first, is warm-up, and for `auto`
    as many as its valves need to settle."""
    measured: dict[str, list[Any]] = {variant.name: [] for variant in variants}
    for variant in variants:
        for _ in range(1 if variant.is_forced else AUTO_WARM_UPS):
            engine.run(variant, gbps, requests[0])
    for number, request in enumerate(requests):
        shift = number % len(variants)
        for variant in variants[shift:] + variants[:shift]:
            measured[variant.name].append(engine.run(variant, gbps, request))
    for variant in variants:
        expected = [run.tokens for run in measured["off"]]
        if not variant.speculates and [run.tokens for run in measured[variant.name]] != expected:
            raise AssertionError(f"{variant.name} gave other tokens than serving without look-ahead")
    return measured


def recall_of(engine: Any, variants: list[Any], requests: list[tuple[str, ...]]) -> dict[str, dict[str, float]]:
    """Variant -> recall@k and @(k + over_fetch) over all layers it speaks of, every step compared with the truth."""
    from lookahead_engine import INSTANT_GBPS

    found = {}
    for variant in variants:
        if variant.predictor and not variant.speculates and variant.depth == 1:
            runs = [engine.run(variant, INSTANT_GBPS, request, scores_all=True) for request in requests]
            sums = {
                name: sum(run.counted[f"recall_{name}"] for run in runs)
                for name in ("routed_total", "found_total/top_k", "found_total/fetched")
            }
            if sums["routed_total"]:
                shares = [sums[f"found_total/{name}"] / sums["routed_total"] for name in ("top_k", "fetched")]
                found[variant.name] = {"recall": shares[0], "recall_fetched": shares[1]}
    return found


def tpot_ms(runs: list[Any]) -> float:
    stall = statistics.mean(run.counted["stall_seconds_total"] for run in runs)
    return 1000 * stall + rest_ms(runs)


def rest_ms(runs: list[Any]) -> float:
    """What a step takes apart from stalls while nothing else disturbs."""
    return statistics.quantiles((step for run in runs for step in run.rest_ms), n=4)[0]


def describe(runs: list[Any], runs_off: list[Any]) -> dict[str, Any]:
    """TPOT of a variant and of serving without look-ahead, and means of what was counted per step."""
    tpot, off = (tpot_ms(own) for own in (runs, runs_off))
    count = {series: statistics.mean(run.counted[series] for run in runs) for series in runs[0].counted}
    lookups = {outcome: count[f"lookups_total/{outcome}"] for outcome in ("hit", "late", "miss", "speculated")}
    total = sum(lookups.values())
    return {
        "tpot_ms": tpot,
        "tpot_ratio": tpot / off,
        "gain": 1 - tpot / off,
        "stall_ms": 1000 * count["stall_seconds_total"],
        "rest_ms": tpot - 1000 * count["stall_seconds_total"],
        **{f"{outcome}_share": number / total for outcome, number in lookups.items()},
        **{outcome: count[f"predictions_total/{outcome}"] for outcome in ("used", "unused", "cancelled")},
        "displaced": count["displaced_lookups_total"],
        "demand_mb": count["transfer_bytes_total/demand"] / 1e6,
        "prefetch_mb": count["transfer_bytes_total/prefetch"] / 1e6,
        "requests": len(runs),
    }


def first_layer_resident(job: dict[str, Any], engine: Any, requests: list[tuple[str, ...]]) -> dict[str, Any]:
    """Misses per token when the first layer has a slot for every expert, and the others as many fewer in all."""
    from lookahead_engine import misses_per_token

    num_layers, num_experts = engine.num_layers, engine.num_experts
    even = [engine.num_slots] * num_layers
    left = sum(even) - num_experts
    others = [left // (num_layers - 1) + (i < left % (num_layers - 1)) for i in range(num_layers - 1)]
    traces = [engine.trace(request) for request in requests]
    shares = {
        "misses_even": even,
        "misses_first_layer_resident": [num_experts, *others],
        "misses_first_layer": even[:1],
    }
    means = {
        name: statistics.mean(misses_per_token(trace, slots, num_experts) for trace in traces)
        for name, slots in shares.items()
    }
    return {"model": job["kind"], "residency": job["residency"], "variant": "first layer resident (replayed)", **means}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures that the study is about."""
    timed = [row for row in rows if "tpot_ms" in row]
    gains = []
    for model, batch in dict.fromkeys((row["model"], row["batch"]) for row in timed):
        where = {"model": model, "batch": batch, "residency": 0.5, "copy_compute": 1}
        cell = {r["variant"]: r for r in timed if where.items() <= r.items()}
        practical = [row for name, row in cell.items() if name not in ("off", "auto") and not _is_special(name)]
        if practical:
            best, oracle = max(practical, key=lambda row: row["gain"]), cell["oracle"]["gain"]
            gain = {"best": best["variant"], "gain": best["gain"], "oracle_gain": oracle, "auto": cell["auto"]["gain"]}
            gains.append({"model": model, "batch": batch, **gain, "oracle_share": best["gain"] / oracle})
    autos = [r["tpot_ratio"] for r in timed if r["variant"] == "auto" and r["copy_compute"] in EXTREMES]
    recall = {
        model: {
            r["variant"]: [r["recall"], r["recall_fetched"]] for r in timed if r["model"] == model and "recall" in r
        }
        for model in dict.fromkeys(row["model"] for row in timed)
    }
    return {
        "tpot_gain_best": min((row["gain"] for row in gains), default=None),
        "oracle_share": min((row["oracle_share"] for row in gains), default=None),
        "auto_worst_ratio": max(autos, default=None),
        "gains": gains,
        "depths": depths(timed),
        "recall": recall,
    }


def _is_special(name: str) -> bool:
    """Not exact, or it knows the future."""
    return name.startswith(("oracle", "speculative"))


def depths(timed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each exact variant where several depths were compared, at one request."""
    found = []
    cells: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in timed:
        if row["batch"] == 1 and row["copy_compute"] in DEPTH_RATIOS:
            key = (row["model"], row["residency"], row["copy_compute"])
            cells.setdefault(key, {})[row["variant"]] = row
    for (model, residency, ratio), cell in cells.items():
        off = cell["off"]
        for name, row in cell.items():
            if name != "off" and not name.startswith("speculative"):
                where = {"model": model, "residency": residency, "copy_compute": ratio, "variant": name}
                shares = {
                    "hidden": 1 - row["stall_ms"] / off["stall_ms"],
                    "over_bound": row["tpot_ms"] / row["bound_ms"],
                    "bytes_over_off": (row["demand_mb"] + row["prefetch_mb"]) / off["demand_mb"],
                }
                found.append(where | {key: round(value, 3) for key, value in shares.items()})
    return found


def print_rows(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "tpot_ms" in row:
            cell = f"residency {row['residency']} batch {row['batch']} copy/compute {row['copy_compute']}"
            times = f"TPOT {row['tpot_ms']:7.2f} ms {100 * row['gain']:+6.1f} %  stall {row['stall_ms']:6.2f} ms"
            print(f"{row['model']:12} {cell:44} {row['variant']:26} {times}", flush=True)
        else:
            print(json.dumps(row))


if __name__ == "__main__":
    sys.exit(main())
