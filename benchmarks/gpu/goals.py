"""The numbers to reach, each with what was measured. See docs/gpu-check.md."""

from typing import Any

from engine_steps import side_name
from shapes import RESIDENCIES
from variants import CACHE, EVERY_SLOT, LOOK_AHEAD, PREFETCH, RESIDENT, UVA

Row = dict[str, Any]
Goal = dict[str, Any]
NOT_MEASURED = "not measured"
LARGEST_PLAN_US = 6.0


def goals(results: dict[str, Any]) -> list[Goal]:
    """`met` is None where nothing was measured."""
    sides = {residency: results.get(side_name(residency), {}) for residency in RESIDENCIES}
    rows = {residency: side.get("rows", []) for residency, side in sides.items()}
    return [
        _exact(results.get("exact", {}), [row for found in rows.values() for row in found]),
        _at_most("all resident: TPOT over plain vLLM's", _over(rows[1.0], EVERY_SLOT, RESIDENT), 1.03),
        _gather(results.get("gather", {})),
        _at_most("plan, us: 8 of 128 experts", _plans(results.get("plan", {})), LARGEST_PLAN_US),
        _synchronisation(results.get("tests", {})),
        _at_most("TPOT over its bound, batch 1 to 8, every residency", _over_bounds(rows), 1.15),
        *_look_ahead(sides),
        _at_least("vLLM UVA's TPOT over ours, 50 %, batch 1", _over_best(rows[0.5], UVA, (1,)), 5.0),
        _at_least("vLLM prefetch's TPOT over ours, 50 %, batch 1", _over_best(rows[0.5], PREFETCH, (1,)), 5.0),
        _batch_32(rows),
    ]


def _goal(text: str, measured: Any, met: bool | None) -> Goal:
    return {"goal": text, "measured": NOT_MEASURED if met is None else measured, "met": met}


def _at_most(text: str, values: list[float], limit: float) -> Goal:
    worst = max(values, default=None)
    return _goal(f"{text}: at most {limit:g}", worst, None if worst is None else worst <= limit)


def _at_least(text: str, values: list[float], limit: float) -> Goal:
    worst = min(values, default=None)
    return _goal(f"{text}: at least {limit:g}", worst, None if worst is None else worst >= limit)


def _exact(exact: dict[str, Any], rows: list[Row]) -> Goal:
    """The trained model's tokens and log-probabilities, and the tokens of everything that was timed."""
    if "rows" not in exact:
        return _goal("tokens exact", 0, None)
    differing = sum(row["differing_tokens"] for row in [*exact["rows"], *rows])
    unequal = sum(not row["as_stock"] for row in exact["rows"])
    idle = sum(not row["at_work"] for row in exact["rows"])
    text = (
        f"{differing} tokens differ, {unequal} of {len(exact['rows'])} configurations not as stock, {idle} not at work"
    )
    return _goal("tokens exact", text, differing == unequal == idle == 0)


def _gather(gather: dict[str, Any]) -> Goal:
    best = max((row["of_peak"] for row in gather.get("rows", []) if row["by"] == "gather"), default=None)
    return _goal("gather over memcpy's peak: at least 0.95", best, None if best is None else best >= 0.95)


def _plans(plan: dict[str, Any]) -> list[float]:
    return [value for key, value in plan.items() if key.startswith("plan_us_8_of_128")]


def _synchronisation(tests: dict[str, Any]) -> Goal:
    text = f"{tests.get('passed', 0)} tests passed, {tests.get('failed', 0)} failed, {tests.get('skipped', 0)} skipped"
    ran = tests.get("passed", 0) + tests.get("failed", 0) > 0
    met = not tests.get("failed", 0) and not tests.get("error", 0)
    return _goal("no host synchronisation in decode, graph replays (tests/gpu)", text, met if ran else None)


def _by_batch(rows: list[Row], variant: str) -> dict[int, Row]:
    return {row["batch"]: row for row in rows if row["variant"] == variant}


def _over(rows: list[Row], variant: str, other: str) -> list[float]:
    """TPOT ratios, one per batch size that both have."""
    ours, theirs = _by_batch(rows, variant), _by_batch(rows, other)
    return [round(ours[batch]["tpot_ms"] / theirs[batch]["tpot_ms"], 3) for batch in ours if batch in theirs]


def _over_bounds(rows: dict[float, list[Row]]) -> list[float]:
    return [
        round(row["tpot_ms"] / row["bound_ms"], 3)
        for found in rows.values()
        for row in (_by_batch(found, EVERY_SLOT) | _ours(found)).values()
        if row["batch"] <= 8
    ]


def _looks_ahead(side: dict[str, Any]) -> bool:
    engine = side.get("engines", {}).get(LOOK_AHEAD, {})
    return not engine.get("info", {}).get("prefetch", "off").startswith("off")


def _look_ahead(sides: dict[float, dict[str, Any]]) -> list[Goal]:
    """Against the same cache without it; copies over computation from 0.5 to 2 is where it should pay."""
    gains, losses = [], []
    for side in sides.values():
        cache, ahead = (_by_batch(side.get("rows", []), name) for name in (CACHE, LOOK_AHEAD))
        for batch in (cache.keys() & ahead.keys()) if _looks_ahead(side) else ():
            row = cache[batch]
            ratio = ahead[batch]["tpot_ms"] / row["tpot_ms"]
            losses.append(round(ratio, 3))
            copies_ms = row["missed_mb_per_token"] * batch / side["link_gbps"]
            if 0.5 <= copies_ms / row["resident_ms"] <= 2:
                gains.append(round(1 - ratio, 3))
    return [
        _at_least("look-ahead's gain on the same cache where copies take 0.5 to 2 x computation", gains, 0.14),
        _at_most("look-ahead's TPOT over the same cache's, anywhere", losses, 1.01),
    ]


def _ours(rows: list[Row]) -> dict[int, Row]:
    """The plugin as it is by default: with look-ahead where it was measured, else the cache."""
    return {**_by_batch(rows, CACHE), **_by_batch(rows, LOOK_AHEAD)}


def _over_best(rows: list[Row], variant: str, batches: tuple[int, ...]) -> list[float]:
    ours, theirs = _ours(rows), _by_batch(rows, variant)
    return [round(theirs[b]["tpot_ms"] / ours[b]["tpot_ms"], 2) for b in batches if b in ours and b in theirs]


def _batch_32(rows: dict[float, list[Row]]) -> Goal:
    ratios = []
    for found in rows.values():
        theirs = [row["tpot_ms"] for row in found if row["variant"] in (UVA, PREFETCH) and row["batch"] == 32]
        ours = _ours(found).get(32)
        if theirs and ours:
            ratios.append(round(ours["tpot_ms"] / min(theirs), 3))
    return _at_most("batch 32: our TPOT over that of the better of vLLM's offloaders", ratios, 1.0)
