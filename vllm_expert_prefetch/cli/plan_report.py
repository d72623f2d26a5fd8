"""A plan as text and as JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_expert_prefetch.planning.facts import load_facts
from vllm_expert_prefetch.planning.formats import row_bytes
from vllm_expert_prefetch.planning.hits import Range
from vllm_expert_prefetch.planning.plan import Plan
from vllm_expert_prefetch.planning.sizing import GB

if TYPE_CHECKING:
    from vllm_expert_prefetch.planning.replayed import Advice, Replayed

MS = 1e3


@dataclass(frozen=True)
class Report:
    """What there is to say. `replayed` and `advice`: where a trace was given; no advice where all experts fit."""

    plan: Plan
    others: Mapping[str, Plan]
    place: str
    command: str
    notes: Sequence[str]
    replayed: "Replayed | None" = None
    advice: "Advice | None" = None


def as_text(report: Report) -> str:
    """For people: every figure with its unit."""
    plan = report.plan
    model, budget, load = plan.model, plan.budget, plan.load
    architecture = model.architecture
    per_rank = f" per rank ({plan.ranks.number} GPUs)" if plan.ranks.number > 1 else ""
    lines = [
        f"{model.name}, {model.form}: {architecture.moe_layers} MoE layers x {architecture.num_experts} experts, "
        f"top-{architecture.top_k}; {architecture.total_parameters / 1e9:.1f} B parameters",
        f"{report.place}; {load.concurrency} x {load.context} tokens",
        "",
        f"memory of a GPU{per_rank}, {budget.requested_bytes / GB:.2f} GB for vLLM:",
        f"  weights without experts {budget.weights_bytes / GB:8.2f} GB",
        f"  activations and room    {budget.activation_bytes / GB:8.2f} GB",
        f"  KV cache                {budget.kv_bytes / GB:8.2f} GB",
        f"  expert cache            {budget.cache_bytes / GB:8.2f} GB: {budget.slots[0]} slots per layer "
        f"({budget.share:.0%} of the experts), {budget.overflow_rows} overflow rows"
        f"{' in two areas' if budget.areas > 1 and budget.overflow_rows else ''}",
        f"experts: {budget.record_bytes:,} bytes each{per_rank}, {budget.experts_bytes / GB:.2f} GB in all; "
        f"host memory {plan.host_bytes / GB:.2f} GB",
        "",
        f"hit rate     {_percent(plan.hits)}{_source(report)}",
        f"TPOT         {_milliseconds(plan.tpot)}; without look-ahead {_milliseconds(plan.tpot_without)}",
        f"  at least   {max(plan.compute_bound, plan.link_bound) * MS:.1f} ms: the accelerator "
        f"{plan.compute_bound * MS:.1f} ms, the link {plan.link_bound * MS:.1f} ms "
        f"({plan.bytes_per_token / 1e6:.1f} MB per token)",
        f"TTFT         {plan.ttft * MS:.0f} ms for {plan.lookups.prompt_tokens} tokens, at least "
        f"{plan.ttft_bound * MS:.0f} ms",
        "",
        "hit rate   MB per token   link ms   TPOT at least, ms",
        *(
            f"{row.hit_rate:8.0%} {row.bytes_per_token / 1e6:14.1f} {row.link_seconds * MS:9.1f} "
            f"{row.bound_seconds * MS:19.1f}"
            for row in plan.table
        ),
    ]
    if report.advice:
        lines += ["", *_advice_lines(report.advice)]
    if report.others:
        lines += ["", "other formats of this model:", *(_line(form, other) for form, other in report.others.items())]
    if report.notes:
        lines += ["", *(f"note: {note}" for note in report.notes)]
    return "\n".join([*lines, "", report.command])


def _source(report: Report) -> str:
    if report.replayed is None:
        return ""
    return f": policy {report.plan.lookups.policy}, {report.replayed.num_steps} decode steps of {report.replayed.path}"


def _advice_lines(advice: "Advice") -> list[str]:
    table = [
        f"{one.slots:5} {one.policy:>7} {one.depth:6} {one.hits:8.1%}   {_milliseconds(one.tpot)}"
        for one in sorted(advice.options, key=lambda one: (one.slots, one.policy, one.depth))
    ]
    because = [f"  {reason}" for reason in advice.reasons]
    return ["slots  policy  ahead     hits   TPOT", *table, "", "recommended:", *because]


def _line(form: str, plan: Plan) -> str:
    return (
        f"  {form:10} {plan.budget.record_bytes:>12,} bytes, {plan.budget.experts_bytes / GB:7.1f} GB of experts, "
        f"{plan.budget.share:4.0%} in slots, TPOT {_milliseconds(plan.tpot)}  {plan.model.serve}"
    )


def _milliseconds(seconds: Range) -> str:
    return f"{seconds.expected * MS:.1f} ms ({seconds.low * MS:.1f} to {seconds.high * MS:.1f})"


def _percent(rate: Range) -> str:
    return f"{100 * rate.expected:.0f} % ({100 * rate.low:.0f} to {100 * rate.high:.0f})"


def as_json(report: Report) -> dict[str, Any]:
    """For programs: bytes, seconds as milliseconds, rates as 0 to 1."""
    plan = report.plan
    model, budget = plan.model, plan.budget
    architecture = model.architecture
    return {
        "model": model.name,
        "format": model.form,
        "source": model.source,
        "machine": report.place,
        "moe_layers": architecture.moe_layers,
        "experts_per_layer": architecture.num_experts,
        "top_k": architecture.top_k,
        "parameters": architecture.total_parameters,
        "active_parameters": architecture.active_parameters,
        "gpus": plan.ranks.number,
        "context": plan.load.context,
        "concurrency": plan.load.concurrency,
        **_sizes(plan),
        "weights_bytes": budget.weights_bytes,
        "activation_bytes": budget.activation_bytes,
        "kv_cache_bytes": budget.kv_bytes,
        "requested_bytes": budget.requested_bytes,
        "host_bytes": plan.host_bytes,
        "experts_needed_per_layer": round(plan.lookups.needed, 2),
        "bytes_per_token": round(plan.bytes_per_token),
        "tpot_without_look_ahead_ms": _rounded(plan.tpot_without, MS),
        "tpot_bound_ms": {"compute": round(plan.compute_bound * MS, 3), "link": round(plan.link_bound * MS, 3)},
        "ttft_ms": {"expected": round(plan.ttft * MS, 1), "bound": round(plan.ttft_bound * MS, 1)},
        "ttft_tokens": plan.lookups.prompt_tokens,
        "at_hit_rates": [
            {
                "hit_rate": row.hit_rate,
                "bytes_per_token": round(row.bytes_per_token),
                "link_ms": round(row.link_seconds * MS, 3),
                "tpot_bound_ms": round(row.bound_seconds * MS, 3),
            }
            for row in plan.table
        ],
        "formats": {
            form: {"repository": repository, **_record(plan, form)} for form, repository in model.formats.items()
        },
        "other_formats": {form: _sizes(other) for form, other in report.others.items()},
        "trace": _trace_of(report),
        "notes": list(report.notes),
        "command": report.command,
    }


def _trace_of(report: Report) -> dict[str, Any] | None:
    if report.replayed is None:
        return None
    found: dict[str, Any] = {
        "path": str(report.replayed.path),
        "decode_steps": report.replayed.num_steps,
        "sequences": round(report.plan.lookups.sequences, 2),
    }
    if advice := report.advice:
        found["options"] = [
            {
                "slots_per_layer": one.slots,
                "policy": one.policy,
                "lookahead_layers": one.depth,
                "hit_rate": round(one.hits, 4),
                "tpot_ms": _rounded(one.tpot, MS),
            }
            for one in advice.options
        ]
        found |= {"recommended": dict(advice.settings), "reasons": list(advice.reasons)}
    return found


def _sizes(plan: Plan) -> dict[str, Any]:
    budget = plan.budget
    return {
        "record_bytes": budget.record_bytes,
        "experts_bytes": budget.experts_bytes,
        "slots_per_layer": budget.slots[0],
        "overflow_rows": budget.overflow_rows,
        "areas": budget.areas,
        "cache_bytes": budget.cache_bytes,
        "share_of_experts": round(budget.share, 4),
        "hit_rate": _rounded(plan.hits, 1),
        "tpot_ms": _rounded(plan.tpot, MS),
    }


def _record(plan: Plan, form: str) -> dict[str, int]:
    """Undivided."""
    architecture = plan.model.architecture
    size = sum(row_bytes(form, architecture))
    return {"record_bytes": size, "experts_bytes": size * architecture.moe_layers * architecture.num_experts}


def _rounded(values: Range, unit: float) -> dict[str, float]:
    return {name: round(getattr(values, name) * unit, 4) for name in ("low", "expected", "high")}


def as_list() -> str:
    """Every model and GPU that plan knows."""
    from vllm_expert_prefetch.planning.architecture import read_architecture

    lines = [f"{'model':36} {'B':>6} {'layers':>6} {'experts':>7} {'top-k':>5}  formats"]
    for model in load_facts().models:
        shape = read_architecture(model.config)
        lines.append(
            f"{model.name:36} {shape.total_parameters / 1e9:6.0f} {shape.moe_layers:6} {shape.num_experts:7} "
            f"{shape.top_k:5}  {', '.join(model.formats)}"
        )
    lines += ["", f"{'GPU':24} {'GB':>6} {'GB/s':>6}  link"]
    for gpu in load_facts().gpus:
        lines.append(f"{gpu.name:24} {gpu.memory_bytes / GB:6.1f} {gpu.bandwidth_gbps:6.0f}  {gpu.link}")
    return "\n".join(lines)
