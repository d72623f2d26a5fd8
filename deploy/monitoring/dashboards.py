"""The dashboards: overview, layers, capacity, A/B."""

from monitoring.comparison import A_B
from monitoring.expressions import (
    HIT_RATE,
    RANKS,
    RATE,
    STALLS,
    TPOT,
    P,
    gauge,
    ghost_hit_ratio,
    hit_ratio,
    rate,
    share,
    stall_ratio,
    tpot,
    vllm_itl,
)
from monitoring.grafana import (
    BAD_TO_OK,
    OK_TO_BAD,
    Dashboard,
    Panel,
    datasource_variable,
    label_variable,
    row,
)

VARIABLES = (
    datasource_variable(),
    label_variable("model", "Model", f"label_values({P}info, model_name)"),
    label_variable("instance", "Instance", f'label_values({P}info{{model_name=~"$model"}}, instance)'),
    label_variable("rank", "Rank", f'label_values({P}info{{model_name=~"$model", instance=~"$instance"}}, rank)'),
)

AT_A_GLANCE = (
    Panel("Hit rate", "stat", "percentunit", HIT_RATE, [(hit_ratio(), "{{instance}}")], 6, (0.5, 0.8), BAD_TO_OK, 1),
    Panel("TPOT p50", "stat", "s", TPOT, [(tpot(0.5), "{{instance}}")], 6, (0.05, 0.1), OK_TO_BAD),
    Panel("Stall share", "stat", "percentunit", STALLS, [(stall_ratio(), "{{instance}}")], 6, (0.1, 0.2), OK_TO_BAD),
    Panel(
        "Experts with a slot",
        "stat",
        "percentunit",
        "Slots per routed expert: how much of the model the accelerator holds. All of it: nothing is saved.",
        [(f"{gauge('slots')} / {gauge('experts')}", "{{instance}}")],
        6,
        (0.95, 1),
        ("green", "green", "orange"),
        1,
    ),
)

CACHE = (
    Panel(
        "Hit rate against the plan",
        "timeseries",
        "percentunit",
        f"{HIT_RATE} The plan is `planned_hit_rate`, or what a router that prefers no expert would reach.",
        [
            (hit_ratio(), "{{instance}}"),
            (gauge("planned_hit_ratio", how="avg"), "plan {{instance}}"),
        ],
        limits=(0.5, 0.8),
        colours=BAD_TO_OK,
        maximum=1,
    ),
    Panel(
        "Hit rate if the cache were larger",
        "timeseries",
        "percentunit",
        "What 1.5 and 2 times the slots would have found, without prefetches, in the same lookups. Near the hit rate: "
        "more memory does not help. Empty unless the server runs with ghost_caches.",
        [
            (ghost_hit_ratio(), "{{scale}} x the slots, {{instance}}"),
            (hit_ratio(), "now, {{instance}}"),
        ],
        limits=(0.5, 0.8),
        colours=BAD_TO_OK,
        maximum=1,
    ),
    Panel(
        "TPOT against vLLM's own",
        "timeseries",
        "s",
        TPOT,
        [
            (tpot(0.5), "p50 {{instance}}"),
            (tpot(0.99), "p99 {{instance}}"),
            (vllm_itl(0.5), "vLLM p50 {{instance}}"),
            (vllm_itl(0.99), "vLLM p99 {{instance}}"),
        ],
        limits=(0.05, 0.1),
        colours=OK_TO_BAD,
    ),
    Panel(
        "Stall share over time",
        "timeseries",
        "percentunit",
        f"{STALLS} Saved: what steps would have waited in addition without looking ahead, estimated.",
        [
            (stall_ratio(), "{{instance}}"),
            (share(rate("saved_seconds_total"), rate("step_seconds_sum")), "saved {{instance}}"),
        ],
        limits=(0.1, 0.2),
        colours=OK_TO_BAD,
    ),
    Panel(
        "Lookups by outcome",
        "timeseries",
        "ops",
        "hit: in a slot; late: on its way; miss: copied while the step waits; speculated: executed as predicted.",
        [(rate("lookups_total", by="outcome"), "{{outcome}}")],
        24,
    ),
)

LINK = (
    Panel(
        "Bytes over the link",
        "timeseries",
        "Bps",
        "Expert records copied from host memory: for a step into slots or into overflow rows, or ahead.",
        [(rate("transfer_bytes_total", by="kind"), "{{kind}}")],
    ),
    Panel(
        "Speed while copying",
        "timeseries",
        "Bps",
        "Bytes per second of the copies that steps waited for (not timed on a GPU), and the speed measured when the "
        "server started.",
        [
            (
                share(rate("transfer_bytes_total", own='kind!="prefetch"'), rate("transfer_seconds_total")),
                "{{instance}}",
            ),
            (gauge("link_bytes_per_second", how="avg"), "at start {{instance}}"),
        ],
    ),
    Panel(
        "Link use",
        "timeseries",
        "percentunit",
        "Share of the time in which something that a step waited for was being copied, mean of the ranks. 0 on a GPU.",
        [(f"avg by (instance) (rate({P}transfer_seconds_total{{{RANKS}}}[{RATE}]))", "{{instance}}")],
        limits=(0.7, 0.9),
        colours=OK_TO_BAD,
        maximum=1,
    ),
    Panel(
        "Evictions",
        "timeseries",
        "ops",
        "Experts that gave their slot to another.",
        [(rate("evictions_total"), "{{instance}}")],
    ),
)

PREFETCH = (
    Panel(
        "Prefetch precision",
        "timeseries",
        "percentunit",
        "Share of all prefetches, cancelled ones included, whose expert a step then used.",
        [(share(rate("predictions_total", own='outcome="used"'), rate("predictions_total")), "{{instance}}")],
        limits=(0.3, 0.6),
        colours=BAD_TO_OK,
        maximum=1,
    ),
    Panel(
        "Predictions by outcome",
        "timeseries",
        "ops",
        "used: needed while resident or on its way; unused: evicted without use; cancelled: dropped before its copy.",
        [(rate("predictions_total", by="outcome"), "{{outcome}}")],
    ),
    Panel(
        "Prefetch recall",
        "timeseries",
        "percentunit",
        "Share of the router's experts that the predictor had named: among its first top-k, and among all it fetched.",
        [
            (share(rate("recall_found_total", own='among="top_k"'), rate("recall_routed_total")), "top-k"),
            (share(rate("recall_found_total", own='among="fetched"'), rate("recall_routed_total")), "fetched"),
        ],
        limits=(0.5, 0.8),
        colours=BAD_TO_OK,
        maximum=1,
    ),
    Panel(
        "Missing gate mass",
        "timeseries",
        "percentunit",
        "Part of the router's weights that its predicted experts would have missed, mean of the tokens compared.",
        [(share(rate("missing_gate_mass_total"), rate("scored_tokens_total")), "{{instance}}")],
        limits=(0.1, 0.3),
        colours=OK_TO_BAD,
        maximum=1,
    ),
    Panel(
        "Layers that look ahead",
        "timeseries",
        "short",
        "Layers whose experts are fetched by guesses from so many layers before. For the others it does not pay.",
        [(gauge("lookahead_open_layers", by="instance, distance"), "{{instance}}, {{distance}} ahead")],
    ),
)

STEPS = (
    Panel(
        "Steps by phase",
        "timeseries",
        "ops",
        "Engine steps per second: of prompts, of next tokens, or of both.",
        [(rate("steps_total", by="phase"), "{{phase}}")],
    ),
    Panel(
        "Step time by phase",
        "timeseries",
        "s",
        "Mean time of a step, from the end of the one before.",
        [(share(rate("step_seconds_sum", by="phase"), rate("step_seconds_count", by="phase")), "{{phase}}")],
    ),
    Panel(
        "Steps of MoE layers",
        "timeseries",
        "ops",
        "Wide: the step needed more distinct experts than there are slots, and used overflow rows.",
        [(rate("moe_steps_total", by="width"), "{{width}}")],
    ),
    Panel(
        "Servers",
        "table",
        "short",
        "Settings and versions of each rank.",
        [(f"{P}info{{{RANKS}}}", "")],
    ),
)

OVERVIEW = Dashboard(
    "expert-prefetch-overview",
    "Expert prefetch: overview",
    "Does the expert cache work, and what does it cost? Hit rate and time per token on one screen.",
    VARIABLES,
    (*AT_A_GLANCE, *CACHE, row("Link"), *LINK, row("Prefetch"), *PREFETCH, row("Steps"), *STEPS),
)


def _share_by_layer(title: str, description: str, part: str, whole: str) -> Panel:
    expression = share(part, whole)
    return Panel(title, "timeseries", "percentunit", description, [(expression, "layer {{layer}}")], maximum=1)


LAYERS = Dashboard(
    "expert-prefetch-layers",
    "Expert prefetch: layers",
    "Which layers miss, and which are predicted badly. Empty unless the server runs with metrics_per_layer.",
    VARIABLES,
    (
        Panel(
            "Hit rate of each layer over time",
            "heatmap",
            "percentunit",
            "One row per MoE layer. A row that stays red wants more slots than the others.",
            [(hit_ratio(by="layer", metric="layer_lookups_total"), "{{layer}}")],
            24,
            (0.5, 0.8),
            BAD_TO_OK,
            1,
        ),
        Panel(
            "Hit rate of each layer now",
            "bargauge",
            "percentunit",
            "The last value of the map above.",
            [(hit_ratio(by="layer", metric="layer_lookups_total"), "layer {{layer}}")],
            limits=(0.5, 0.8),
            colours=BAD_TO_OK,
            maximum=1,
        ),
        Panel(
            "Stall of each layer",
            "timeseries",
            "percentunit",
            "Seconds per second that steps waited for experts of a layer, ranks summed.",
            [(rate("layer_stall_seconds_total", by="layer"), "layer {{layer}}")],
        ),
        Panel(
            "Misses of each layer",
            "timeseries",
            "ops",
            "Lookups that had to be copied while the step waited.",
            [(rate("layer_lookups_total", by="layer", own='outcome="miss"'), "layer {{layer}}")],
            24,
        ),
        _share_by_layer(
            "Prefetch recall of each layer",
            "Share of the router's experts that the predictor had among its first top-k. Where it is low, calibrate.",
            rate("layer_recall_found_total", by="layer", own='among="top_k"'),
            rate("layer_recall_routed_total", by="layer"),
        ),
        _share_by_layer(
            "Prefetch precision of each layer",
            "Share of all prefetches, cancelled ones included, whose expert was needed before it was evicted.",
            rate("layer_predictions_total", by="layer", own='outcome="used"'),
            rate("layer_predictions_total", by="layer"),
        ),
    ),
)

CAPACITY = Dashboard(
    "expert-prefetch-capacity",
    "Expert prefetch: capacity",
    "What the expert cache takes, and what it saves.",
    VARIABLES,
    (
        Panel("Slots", "stat", "short", "Expert slots, ranks summed.", [(gauge("slots"), "{{instance}}")], 6),
        Panel(
            "Routed experts", "stat", "short", "All MoE layers, ranks summed.", [(gauge("experts"), "{{instance}}")], 6
        ),
        Panel(
            "MoE layers",
            "stat",
            "short",
            "Served from a slot cache.",
            [(gauge("moe_layers", how="max"), "{{instance}}")],
            6,
        ),
        Panel(
            "Bytes of one expert",
            "stat",
            "bytes",
            "What one miss copies, mean of the layers.",
            [(gauge("expert_record_bytes", how="avg"), "{{instance}}")],
            6,
        ),
        Panel(
            "Slots in use",
            "timeseries",
            "short",
            "Slots whose expert has landed. Fewer than all of them for long: copies are stuck.",
            [(gauge("resident_slots"), "resident {{instance}}"), (gauge("slots"), "slots {{instance}}")],
        ),
        Panel(
            "Accelerator memory",
            "timeseries",
            "bytes",
            "Slots and overflow rows, ranks summed.",
            [
                (gauge("cache_bytes"), "slots {{instance}}"),
                (gauge("overflow_bytes"), "overflow rows {{instance}}"),
            ],
        ),
        Panel(
            "Host memory",
            "timeseries",
            "bytes",
            "All routed experts, ranks summed, for each server that shares them; the API server's memory for scale.",
            [
                (gauge("host_store_bytes"), "experts {{instance}}"),
                ('sum by (instance) (process_resident_memory_bytes{instance=~"$instance"})', "API server {{instance}}"),
            ],
        ),
        Panel(
            "Accelerator memory saved",
            "timeseries",
            "bytes",
            "Experts without a slot, less the overflow rows: what is free for the KV cache.",
            [
                (
                    f"{gauge('host_store_bytes')} - {gauge('cache_bytes')} - {gauge('overflow_bytes')}",
                    "{{instance}}",
                )
            ],
        ),
    ),
)

DASHBOARDS = (OVERVIEW, LAYERS, CAPACITY, A_B)
