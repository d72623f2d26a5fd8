"""The tables of the documentation, made from the code. `python tests/doc_tables.py` writes them into the documents.

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`.
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from proofs import Proof, read_proofs

from vllm_expert_prefetch.config import ExpertPrefetchConfig
from vllm_expert_prefetch.metrics.definitions import METRICS, Metric
from vllm_expert_prefetch.planning.architecture import read_architecture
from vllm_expert_prefetch.planning.budget import Budget, Load, Ranks, make_budget
from vllm_expert_prefetch.planning.facts import load_facts
from vllm_expert_prefetch.planning.model_files import find
from vllm_expert_prefetch.planning.sizing import GB
from vllm_expert_prefetch.planning.timing import Machine

DOCS = Path(__file__).resolve().parents[1] / "docs"
REGISTERED = Path(__file__).with_name("serving") / "registered.json"
PLATFORMS = (
    ("cpu", "proven", "none there"),
    ("shim", "proven on the shim", "allowed; copies and kernels proved at your start"),
)
"""Where features are proved, and what the table says where they are and where they are not."""
_TYPES = {int: "integer", float: "number", str: "string", bool: "true / false"}


def config_table() -> str:
    """One row per configuration key."""
    rows = []
    types = get_type_hints(ExpertPrefetchConfig)
    for entry in fields(ExpertPrefetchConfig):
        kinds = [kind for kind in get_args(types[entry.name]) or (types[entry.name],) if kind is not NoneType]
        rows.append(
            (
                f"`{entry.name}`",
                " or ".join(_TYPES[kind] for kind in kinds),
                _default(entry.default),
                entry.metadata["doc"],
            )
        )
    return _table(("key", "type", "default", "meaning"), rows)


def metrics_table() -> str:
    """One row per metric."""
    rows = [
        (f"`{metric.full_name}`", metric.kind.value, metric.unit, _label(metric), metric.help) for metric in METRICS
    ]
    return _table(("metric", "type", "unit", "own label", "meaning"), rows)


def features_table() -> str:
    """One row per feature that a test proves, then one per combination that is refused."""
    from vllm_expert_prefetch.serving.refusals import LAYER_REFUSALS, REFUSALS

    found: dict[str, dict[str, list[Proof]]] = {}
    for one in sorted(read_proofs(), key=lambda one: (one.feature.lower(), one)):
        found.setdefault(one.feature, {}).setdefault(one.platform, []).append(one)
    rows = []
    refused = {refusal.what: refusal for refusal in REFUSALS}
    for feature, shown in found.items():
        cells = []
        for platform, how, otherwise in PLATFORMS:
            ones = shown.get(platform) or shown.get("any")
            cells.append(ones[0].says or how if ones else otherwise)
        if partly := refused.pop(feature, None):  # on one platform, and proven on the other
            cells[partly.platform == "gpu"] = f"refused (`{partly.flag}`): {partly.remedy}"
        files = sorted({one.test.partition("::")[0] for ones in shown.values() for one in ones})
        links = ", ".join(f"[{file.removeprefix('tests/').replace('test_', '')}](../{file})" for file in files)
        rows.append((feature, *cells, links))
    left: tuple[Any, ...] = (*refused.values(), *LAYER_REFUSALS)
    for refusal in left:
        only = getattr(refusal, "platform", "")
        cells = ["refused" if only in ("", platform) else "served" for platform in ("cpu", "gpu")]
        rows.append((f"{refusal.what} (`{refusal.flag}`)", *cells, refusal.remedy))
    return _table(("feature", "CPU platform", "GPU", "shown in, or the remedy"), rows)


def backends_table() -> str:
    """One row per format: vLLM's default kernel and what the plugin chooses, as `make formats` found them."""
    from formats.offered import CAPABILITIES, RESULT, VERSIONS

    found = json.loads(RESULT.read_text())["versions"][VERSIONS[-1]]
    rows = []
    for name in found[str(CAPABILITIES[0])]:
        answers = [found[str(capability)][name] for capability in CAPABILITIES]
        cells = [
            answer["chosen"] if answer["default"] == answer["kernel"] else f"{answer['default']} -> {answer['chosen']}"
            for answer in answers
        ]
        rows.append((name, *cells))
    return _table(("format", *(f"SM {capability}" for capability in CAPABILITIES)), rows)


def formats_table() -> str:
    """One row per format: how far it was shown with each backend, and which are refused."""
    from formats.checkpoints import CASES
    from formats.layouts import FORMATS, FOUND, REFUSED, TRIED
    from formats.offered import RESULT

    found = json.loads(RESULT.read_text())["layouts"]

    def where(name: str, backend: str, kind: str) -> str:
        """Versions, and the GPUs where it is not all of them."""
        versions: dict[str, list[str]] = {}
        for version, gpus in found.items():
            own = [gpu for gpu, formats in gpus.items() if formats[name].get(backend, "").startswith(kind)]
            if own:
                on = "" if len(own) == len(gpus) else f" on SM {', '.join(own)}"
                versions.setdefault(on, []).append(version.removesuffix(".0"))
        return "; ".join(", ".join(short) + on for on, short in versions.items())

    def shown(name: str, backend: str) -> str:
        checkpoint, kernel = TRIED.get(name, ("", ""))
        rows = where(name, backend, FOUND) or where(name, "any", FOUND)
        levels = {
            f"bytes {rows}": bool(rows),
            "kernel": bool(kernel) and backend == "triton",
            "engine": (checkpoint, backend) in CASES,
        }
        return "; ".join(level for level, is_shown in levels.items() if is_shown)

    rows: list[tuple[str, ...]] = [("unquantised", "", "kernel; engine; one H100", "all others")]
    for name in FORMATS:
        asked = {backend for gpus in found.values() for formats in gpus.values() for backend in formats[name]}
        refused = [backend for backend in sorted(asked - {"any"}) if where(name, backend, REFUSED)]
        if "any" in asked:
            refused.insert(0, f"any of {where(name, 'any', REFUSED)}")
        rows.append((name, *(shown(name, backend) for backend in ("marlin", "triton")), ", ".join(refused)))
    return _table(("format", "`marlin`", "`triton`", "refused by name"), rows)


def families_table() -> str:
    """One row per family with a test, then one per other thing that is known of a model class of vLLM."""
    classes: dict[str, list[str]] = {}
    for name, known in json.loads(REGISTERED.read_text())["models"].items():
        classes.setdefault(known, []).append(f"`{name}`")
    families = [known.removeprefix("covered by ") for known in sorted(classes) if known.startswith("covered by ")]
    rows = [
        (f"a test: {family}", *(", ".join(classes.pop(f"{how} {family}", [])) for how in ("covered by", "as")))
        for family in families
    ]
    rows += [(known, ", ".join(classes[known]), "") for known in sorted(classes)]
    return _table(("what is known", "vLLM's model class", "the same experts in"), rows)


def models_table() -> str:
    """One row per model that planning knows."""
    rows = []
    for model in load_facts().models:
        shape = read_architecture(model.config)
        sizes = f"{shape.total_parameters / 1e9:.0f}", f"{shape.moe_layers} x {shape.num_experts}", str(shape.top_k)
        rows.append((model.name, *sizes, ", ".join(model.formats)))
    return _table(("model", "10^9 parameters", "MoE layers x experts", "top-k", "formats"), rows)


def recordings_table() -> str:
    """One row per recording of routing that hit rates are planned from."""
    recordings = load_facts().recordings
    rows = [
        (own.name, f"{own.num_experts}, {own.top_k}", *(f"{100 * rate:.1f}" for rate in own.hit_rates))
        for own in recordings
    ]
    return _table(("recorded on", "experts, top-k", *(f"{share:.1%}" for share in recordings[0].shares)), rows)


RANKS = {
    "one GPU": Ranks(),
    "tensor parallel": Ranks(tp=2),
    "expert parallel": Ranks(tp=2, ep=2),
    "pipeline parallel": Ranks(pp=2),
    "tensor parallel N, pipeline parallel M": Ranks(tp=2, pp=2),
}
"""The ways of docs/scaling.md to divide a model, in two."""


def budget_of(ranks: Ranks) -> Budget:
    """What a rank holds of Qwen3-30B-A3B with half of its experts resident."""
    half = ExpertPrefetchConfig(cache_fraction=0.5, areas=1)
    return make_budget(find("Qwen3-30B-A3B"), Machine(80e9, 1e12, None, 25e9), Load(8192, 1), ranks, half)


def ranks_table() -> str:
    """One row per way to divide a model: the bytes of one rank."""
    rows = []
    for way, ranks in RANKS.items():
        budget = budget_of(ranks)
        slots, overflow = (number * budget.record_bytes for number in (sum(budget.slots), budget.overflow_rows))
        sizes = f"{slots / GB:.1f} GB", f"{overflow / GB:.2f} GB", f"{budget.experts_bytes / GB:.1f} GB"
        named = way.replace(" N", " 2").replace(" M", " 2") if " N" in way else f"{way} 2"
        rows.append((way if ranks == Ranks() else f"{named}, each rank", *sizes))
    return _table(("", "slots", "overflow rows", "host"), rows)


TABLES: dict[str, tuple[Path, Callable[[], str]]] = {
    "config": (DOCS / "configuration.md", config_table),
    "metrics": (DOCS / "metrics.md", metrics_table),
    "families": (DOCS / "compatibility.md", families_table),
    "features": (DOCS / "compatibility.md", features_table),
    "formats": (DOCS / "compatibility.md", formats_table),
    "backends": (DOCS / "compatibility.md", backends_table),
    "models": (DOCS / "planning.md", models_table),
    "ranks": (DOCS / "scaling.md", ranks_table),
    "recordings": (DOCS / "planning.md", recordings_table),
}


def documented(name: str) -> str:
    """The table called `name` as it stands in its document."""
    document, _ = TABLES[name]
    found = _pattern(name).search(document.read_text())
    assert found, f"{document} has no table between <!-- table:{name} --> and <!-- /table -->"
    return found["table"]


def write_tables() -> None:
    """Bring every document up to date."""
    for name, (document, table) in TABLES.items():
        marker = f"<!-- table:{name} -->\n"
        document.write_text(document.read_text().replace(marker + documented(name), marker + table()))


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(rf"<!-- table:{name} -->\n(?P<table>.*?)<!-- /table -->", re.DOTALL)


def _default(value: Any) -> str:
    if value is None:
        return "unset"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _label(metric: Metric) -> str:
    return f"`{metric.label}`: {', '.join(metric.values)}" if metric.label else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    write_tables()
