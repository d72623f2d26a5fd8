"""The short table at the end of gpu_check.py, and the page and pictures beside the JSON."""

from pathlib import Path
from typing import Any

import pictures_of_sides
from goals import goals
from side_report import exact_lines, goal_lines, page, side_lines


def table(results: dict[str, Any]) -> list[str]:
    """One line per step, then one per measurement that decides something."""
    lines = [f"{name:<10} {result['status']:<12} {result['seconds']:7.1f} s" for name, result in results.items()]
    link, gather = results.get("link", {}), results.get("gather", {})
    if "peak_gbps" in link:
        both = link["each_way_when_both_gbps"]
        lines.append(f"link: {link['peak_gbps']} GB/s to the GPU ({both} each way when both are busy)")
    if "rows" in gather:
        lines += _gather_lines(gather)
    plans = {key: value for key, value in results.get("plan", {}).items() if key.endswith("_us") or "_us_" in key}
    if plans:
        lines.append("plan: " + ", ".join(f"{key} {value}" for key, value in plans.items()))
    lines += [*_decode_lines(results.get("decode", {})), *exact_lines(results.get("exact", {})), *side_lines(results)]
    return [*lines, *goal_lines(goals(results), bool(results.get("machine", {}).get("gpus")))]


def write_report(folder: Path, results: dict[str, Any]) -> list[str]:
    """`report.md`, and pictures where there is matplotlib; the names of what was written."""
    (folder / "report.md").write_text("\n".join(page(results, goals(results))) + "\n")
    return ["report.md", *pictures_of_sides.draw(folder, results)]


def _gather_lines(gather: dict[str, Any]) -> list[str]:
    fewest = gather["fewest_blocks"]
    lines = [
        f"gather: 95 % of the peak from {fewest} blocks on, of {gather['num_sms']} SMs"
        if fewest
        else "gather: no grid reaches 95 % of the peak"
    ]
    best: dict[tuple[float, int, bool], dict[str, Any]] = {}
    for row in gather["rows"]:
        key = (row["record_mb"], row["records"], row["by"] == "gather")
        if key not in best or row["gbps"] > best[key]["gbps"]:
            best[key] = row
    for (record_mb, records, _), row in best.items():
        blocks = f", {row['blocks']} blocks" if row["blocks"] else ""
        speed = f"{row['gbps']:>7} GB/s {row['of_peak']:6.1%}"
        lines.append(f"  {records:>3} x {record_mb:>7} MB {speed} ({row['by']}{blocks})")
    return lines


def _decode_lines(decode: dict[str, Any]) -> list[str]:
    if "rows" not in decode:
        return []
    head = decode.get("moe_kernel") or f"bounds only, assuming {decode['assumed']}"
    lines = [f"decode: {head}", f"  {'variant':<22} {'ms/token':>9} {'bound':>8} {'missed MB':>10} {'differing':>10}"]
    for row in decode["rows"]:
        measured = f"{row['ms_per_token']:9.3f}" if "ms_per_token" in row else f"{'-':>9}"
        differing = row.get("differing_values", "-")
        bound, missed = row["bound_ms"], row["missed_mb_per_token"]
        lines.append(f"  {row['variant']:<22} {measured} {bound:8.3f} {missed:10.2f} {differing:>10}")
    return lines
