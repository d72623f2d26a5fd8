"""The A/B dashboard."""

from monitoring.expressions import HIT_RATE, RATE, STALLS, TPOT, P, hit_ratio, rate, stall_ratio, tpot, vllm_itl
from monitoring.grafana import BAD_TO_OK, OK_TO_BAD, Dashboard, Panel, datasource_variable, label_variable

SIDES = (("a", "A"), ("b", "B"))


def _side_by_side(
    title: str, unit: str, description: str, targets: list[tuple[str, str]], **more: object
) -> list[Panel]:
    """The same panel for both instances. SIDE stands for the selector of one of them."""
    return [
        Panel(
            f"{title}: {label}",
            "timeseries",
            unit,
            description,
            [(expression.replace("SIDE", f'instance=~"${side}"'), legend) for expression, legend in targets],
            **more,  # type: ignore[arg-type]
        )
        for side, label in SIDES
    ]


A_B = Dashboard(
    "expert-prefetch-ab",
    "Expert prefetch: A/B",
    "Two instances side by side: another cache size, another policy, with and without prefetching.",
    (
        datasource_variable(),
        *(
            label_variable(side, f"Instance {label}", f"label_values({P}info, instance)", multiple=False)
            for side, label in SIDES
        ),
    ),
    (
        *_side_by_side(
            "TPOT",
            "s",
            TPOT,
            [(tpot(0.5, "SIDE"), "p50"), (tpot(0.99, "SIDE"), "p99"), (vllm_itl(0.5, "SIDE"), "vLLM p50")],
            limits=(0.05, 0.1),
            colours=OK_TO_BAD,
        ),
        *_side_by_side(
            "Hit rate", "percentunit", HIT_RATE, [(hit_ratio("SIDE"), "hit rate")], limits=(0.5, 0.8), colours=BAD_TO_OK
        ),
        *_side_by_side(
            "Stall share",
            "percentunit",
            STALLS,
            [(stall_ratio("SIDE"), "stall share")],
            limits=(0.1, 0.2),
            colours=OK_TO_BAD,
        ),
        *_side_by_side(
            "Bytes over the link",
            "Bps",
            "Expert records copied from host memory.",
            [(rate("transfer_bytes_total", "SIDE", "kind"), "{{kind}}")],
        ),
        *_side_by_side(
            "Tokens",
            "ops",
            "Generated tokens per second, by vLLM's own count.",
            [(f"sum by (instance) (rate(vllm:generation_tokens_total{{SIDE}}[{RATE}]))", "tokens/s")],
        ),
    ),
)
