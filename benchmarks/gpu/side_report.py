"""What vLLM and the plugin gave, as lines of text and as a page in Markdown."""

from typing import Any

from goals import Goal

COLUMNS = {
    "residency": "",
    "variant": "",
    "batch": "",
    "tpot_ms": "TPOT, ms",
    "of_resident": "/ all resident",
    "of_bound": "/ bound",
    "hit_rate": "hits",
    "recall": "",
    "missed_mb_per_token": "missed MB/token",
    "prefetched_mb_per_step": "prefetched MB/step",
    "differing_tokens": "differing tokens",
    "wall_s": "wall, s",
}
MET = {True: "met", False: "missed", None: "not measured"}


def sides(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Every residency's result that holds measurements, the largest first."""
    found = [result for name, result in results.items() if name.startswith("side-") and "rows" in result]
    return sorted(found, key=lambda side: -side["residency"])


def rows_of(side: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one residency with their ratios; variants without a measurement have a `status`."""
    rows = []
    for row in side["rows"]:
        bound = row["bound_ms"]
        ratios = {"of_resident": round(row["tpot_ms"] / row["resident_ms"], 3)}
        ratios["of_bound"] = None if bound is None else round(row["tpot_ms"] / bound, 3)
        rows.append({"residency": f"{side['residency']:.1%}", **row, **ratios})
    for name, engine in side["engines"].items():
        if engine["status"] != "ok":
            text = engine["status"] + (f": {engine['reason'].splitlines()[-1][:200]}" if "reason" in engine else "")
            rows.append({"residency": f"{side['residency']:.1%}", "variant": name, "status": text})
    return rows


def side_lines(results: dict[str, Any]) -> list[str]:
    """A line per residency, then one per variant and batch size."""
    lines = []
    for side in sides(results):
        lines += [f"side by side, {side['residency']:.1%} of the experts with a slot; {_routing(side)}"]
        lines += [f"  {len(names)} engines at once: {', '.join(names)}" for names in side["at_once"]]
        lines += _allocated(side)
        for row in rows_of(side):
            if "status" in row:
                lines.append(f"  {row['variant']:<20} {row['status']}")
                continue
            words = [f"{label or key} {row[key]}" for key, label in list(COLUMNS.items())[3:] if row[key] is not None]
            lines.append(f"  {row['variant']:<20} batch {row['batch']:<3} {', '.join(words)}")
    return lines


def _allocated(side: dict[str, Any]) -> list[str]:
    """What torch holds on the GPU for each engine: whether the comparison is fair."""
    held = {name: engine.get("allocated_gb") for name, engine in side["engines"].items()}
    words = [f"{name} {gb}" for name, gb in held.items() if gb]
    return [f"  GB on the GPU: {', '.join(words)}"] if words else []


def _routing(side: dict[str, Any]) -> str:
    """Where the routing comes from, in every result."""
    routing = side["routing"]
    return (
        f"random weights, {side['shape']['num_layers']} layers, text made so that consecutive tokens share "
        f"{routing['shared_with_previous_token']:.0%} of their experts and the router predictor finds "
        f"{routing['recall_of_the_router_predictor']:.0%}; link {side['link_gbps']} GB/s, {side['link']}"
    )


def exact_lines(exact: dict[str, Any]) -> list[str]:
    """One line per model, mode and batch size."""
    return [
        f"exact: {row['model']}, {row['mode']}, batch {row['batch']}: {row['compared_tokens']} tokens, "
        f"{row['differing_tokens']} differ, largest deviation {row['max_deviation']:g}; {row['lookups']:.0f} lookups, "
        f"{row['overflow_mb']:.1f} MB into overflow rows, {row['shared_mb']:.1f} MB shared"
        for row in exact.get("rows", [])
    ]


def goal_lines(found: list[Goal], on_gpu: bool) -> list[str]:
    """One line per number to reach."""
    head = "numbers to reach" + ("" if on_gpu else " on a GPU, of which a rehearsal says nothing")
    return [f"{head}:", *(f"  {MET[goal['met']]:<12} {goal['goal']} ({goal['measured']})" for goal in found)]


def page(results: dict[str, Any], found: list[Goal]) -> list[str]:
    """Tables in Markdown: the numbers to reach, and every measurement."""
    lines = [_provenance(results), "", "| number to reach | measured | |", "| --- | --- | --- |"]
    lines += [f"| {goal['goal']} | {goal['measured']} | {MET[goal['met']]} |" for goal in found]
    for side in sides(results):
        lines += ["", f"{_routing(side)[0].upper()}{_routing(side)[1:]}.", ""]
        lines += [
            "| " + " | ".join(label or key for key, label in COLUMNS.items()) + " |",
            "| --- " * len(COLUMNS) + "|",
        ]
        for row in rows_of(side):
            cells = [row.get("status", "") if key == "tpot_ms" and "status" in row else row.get(key) for key in COLUMNS]
            lines.append("| " + " | ".join("" if cell is None else str(cell) for cell in cells) + " |")
    return lines


def _provenance(results: dict[str, Any]) -> str:
    machine = results.get("machine", {})
    gpu: dict[str, str] = next(iter(machine.get("gpus", [])), {})
    packages = {name: version for name, version in machine.get("packages", {}).items() if version}
    served = [engine["vllm"] for side in sides(results) for engine in side["engines"].values() if "vllm" in engine]
    versions = packages | ({"vllm": served[0]} if served else {})
    parts = [
        f"commit {machine.get('commit')}, {machine.get('date')}",
        f"{gpu['name']}, driver {gpu['driver_version']}" if gpu else f"{machine.get('processor')}, no GPU",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"link {results.get('link', {}).get('peak_gbps', 'not measured')} GB/s",
        "`make gpu-check`",
    ]
    return "; ".join(parts) + "."
