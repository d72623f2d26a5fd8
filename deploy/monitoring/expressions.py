"""PromQL and descriptions that several panels share. `$model`, `$instance` and `$rank` are Grafana's variables."""

P = "vllm_expert_prefetch_"
RANKS = 'model_name=~"$model", instance=~"$instance", rank=~"$rank"'
SERVER = 'model_name=~"$model", instance=~"$instance"'
RATE = "$__rate_interval"

HIT_RATE = (
    "Share of lookups that found their expert in a slot. A lookup: one distinct expert that a layer's step needs."
)
TPOT = (
    "Time per output token as the worker's step clock sees it, beside vLLM's own inter-token latency. vLLM's histogram "
    "has wider buckets, so that its quantiles are coarser; the means agree."
)
STALLS = (
    "Part of the steps' time that was spent waiting for experts. Above 20 % an alert names the cause. 0 on a GPU: "
    "nothing is timed there."
)


def rate(series: str, selector: str = RANKS, by: str = "instance", own: str = "") -> str:
    """Summed rate of a counter; `own` selects by labels of its own."""
    labels = f"{own}, {selector}" if own else selector
    return f"sum by ({by}) (rate({P}{series}{{{labels}}}[{RATE}]))"


def share(part: str, whole: str) -> str:
    """A ratio that is absent, not undefined, while nothing happens."""
    return f"{part} / ({whole} > 0)"


def hit_ratio(selector: str = RANKS, by: str = "instance", metric: str = "lookups_total") -> str:
    """Hits among the lookups of what the router chose."""
    return share(rate(metric, selector, by, 'outcome="hit"'), rate(metric, selector, by, 'outcome!="speculated"'))


def ghost_hit_ratio() -> str:
    """The same of caches of other sizes, which hold nothing."""
    by = "instance, scale"
    return share(rate("ghost_hits_total", by=by), rate("ghost_lookups_total", by=by))


def stall_ratio(selector: str = RANKS) -> str:
    """Waiting for experts in the time of all steps."""
    return share(rate("stall_seconds_total", selector), rate("step_seconds_sum", selector))


def tpot(quantile: float, selector: str = RANKS) -> str:
    """A quantile of the time per output token."""
    return f"histogram_quantile({quantile}, {rate('tpot_seconds_bucket', selector, 'instance, le')})"


def vllm_itl(quantile: float, selector: str = SERVER) -> str:
    """The same quantile by vLLM's own count."""
    buckets = f"vllm:inter_token_latency_seconds_bucket{{{selector}}}"
    return f"histogram_quantile({quantile}, sum by (instance, le) (rate({buckets}[{RATE}])))"


def gauge(name: str, selector: str = RANKS, by: str = "instance", how: str = "sum") -> str:
    """A gauge, summed over ranks."""
    return f"{how} by ({by}) ({P}{name}{{{selector}}})"
