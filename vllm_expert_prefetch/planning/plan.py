"""What a model will do on a machine, before it is downloaded: will it fit, what hits, how long a token takes."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.architecture import Architecture
from vllm_expert_prefetch.planning.budget import ALONE, BATCHED_TOKENS, Budget, Load, Ranks, make_budget
from vllm_expert_prefetch.planning.formats import other_bytes_per_parameter, row_bytes
from vllm_expert_prefetch.planning.hits import Lookups, Range, hit_rates, needed_experts
from vllm_expert_prefetch.planning.model_files import Model
from vllm_expert_prefetch.planning.sizing import GB
from vllm_expert_prefetch.planning.timing import HIDDEN, Machine, Work

HIT_RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Of the table of bytes per token."""
PROMPT_TOKENS = 1024
"""Of the time to the first token, or half of the context."""
LookupsOf = Callable[[Budget], Lookups]
"""What steps look up where so much is resident."""


@dataclass(frozen=True)
class AtHitRate:
    """One line of the table: bytes over each rank's link for one token, and the bounds of its time in seconds."""

    hit_rate: float
    bytes_per_token: float
    link_seconds: float
    bound_seconds: float


@dataclass(frozen=True)
class Plan:
    """All of it. Seconds are of one token of each sequence (TPOT), or to the first one (TTFT)."""

    model: Model
    machine: Machine
    ranks: Ranks
    load: Load
    budget: Budget
    lookups: Lookups
    replayed: LookupsOf | None
    """What said so; None: what was measured on other models."""
    decode: Work
    """A step of one token of every sequence."""
    tpot: Range
    tpot_without: Range
    """Without look-ahead."""
    compute_bound: float
    link_bound: float
    """At the expected hit rate."""
    ttft: float
    ttft_bound: float
    table: tuple[AtHitRate, ...]
    host_bytes: int
    """Of experts in the memory of one host that holds all ranks; 0 where all have slots."""
    notes: tuple[str, ...]

    @property
    def hits(self) -> Range:
        """Share of lookups in decode steps."""
        return self.lookups.hits

    @property
    def bytes_per_token(self) -> float:
        """Over one rank's link, at the expected hit rate."""
        return self.decode.needed_bytes * (1 - self.hits.expected) / self.lookups.sequences


def make_plan(
    model: Model,
    machine: Machine,
    load: Load,
    ranks: Ranks = ALONE,
    config: ExpertPrefetchConfig | None = None,
    replayed: LookupsOf | None = None,
) -> Plan:
    """`config`: a size that is given for the cache; None: all that is left. `replayed`: lookups of this very model;
    None: those to expect, from what was measured on others.

    Raises ConfigError for what does not fit, or cannot be divided as `ranks` say.
    """
    architecture = model.architecture
    if load.context > architecture.max_context:
        raise ConfigError(f"--context {load.context} is more than the model's {architecture.max_context}")
    budget = make_budget(model, machine, load, ranks, config)
    host = 0 if budget.fits_whole else budget.experts_bytes * ranks.pp * max(ranks.tp, ranks.ep)
    _check_host(model, host, machine.host_bytes)
    lookups = _expected(architecture, budget, ranks, load)
    if replayed and not budget.fits_whole:
        own = replayed(budget)
        prompts = {name: getattr(lookups, name) for name in ("prompt_tokens", "prompt_needed", "prompt_hits")}
        lookups = own if own.prompt_tokens else replace(own, **prompts)
    decode = _step_work(model, budget, ranks, load, lookups.needed)
    hits = lookups.hits
    looks_ahead = budget.areas > 1 or lookups.sequences * architecture.top_k <= architecture.num_experts
    prefill = _prompt_work(model, budget, ranks, lookups)
    compute = decode.compute_bound(machine)
    return Plan(
        model=model,
        machine=machine,
        ranks=ranks,
        load=load,
        budget=budget,
        lookups=lookups,
        replayed=replayed,
        decode=decode,
        tpot=decode.seconds_range(machine, hits, looks_ahead),
        tpot_without=decode.seconds_range(machine, hits, False),
        compute_bound=compute,
        link_bound=decode.link(machine, hits.expected),
        ttft=prefill.seconds(machine, lookups.prompt_hits, HIDDEN.expected if budget.areas > 1 else 0.0),
        ttft_bound=prefill.bound(machine, lookups.prompt_hits),
        table=tuple(
            AtHitRate(
                rate,
                decode.needed_bytes * (1 - rate) / lookups.sequences,
                decode.link(machine, rate),
                decode.bound(machine, rate),
            )
            for rate in HIT_RATES
        ),
        host_bytes=host,
        notes=_notes(model, budget, looks_ahead),
    )


def alternatives(plan: Plan) -> dict[str, Plan]:
    """The same in the other formats that were published, where it fits."""
    found = {}
    for form, repository in plan.model.formats.items():
        if form == plan.model.form:
            continue
        model = replace(plan.model, form=form, serve=repository, total_bytes=None, folder=None)
        try:
            found[form] = make_plan(model, plan.machine, plan.load, plan.ranks, replayed=plan.replayed)
        except ConfigError:
            continue
    return found


def _expected(architecture: Architecture, budget: Budget, ranks: Ranks, load: Load) -> Lookups:
    prompt = min(PROMPT_TOKENS, load.context // 2)
    return Lookups(
        hits=hit_rates(budget.share, load.concurrency, architecture.num_experts, architecture.top_k),
        needed=_needed(architecture, ranks, load.concurrency),
        sequences=load.concurrency,
        prompt_tokens=prompt,
        prompt_needed=_needed(architecture, ranks, min(prompt, BATCHED_TOKENS)),
        prompt_hits=budget.share,
        policy=ExpertPrefetchConfig.policy,
    )


def _step_work(model: Model, budget: Budget, ranks: Ranks, load: Load, num_needed: float) -> Work:
    """Of one decode step on one rank, through all pipeline stages."""
    architecture = model.architecture
    layers = len(budget.layers) * ranks.pp
    needed = num_needed * budget.record_bytes * layers
    kv = budget.kv_bytes * ranks.pp / 2  # on average a sequence is half as long as it may become
    rest = _dense_bytes(architecture, model.form) / ranks.tp
    flops = 2.0 * architecture.active_parameters * load.concurrency / ranks.tp
    return Work(rest + needed + kv, flops, needed, layers)


def _prompt_work(model: Model, budget: Budget, ranks: Ranks, lookups: Lookups) -> Work:
    """Of a prompt, all its steps together: wide ones."""
    architecture, num_tokens = model.architecture, lookups.prompt_tokens
    steps = -(-num_tokens // BATCHED_TOKENS)
    layers = len(budget.layers) * ranks.pp
    needed = steps * lookups.prompt_needed * budget.record_bytes * layers
    flops = 2.0 * architecture.active_parameters * num_tokens / ranks.tp
    rest = steps * _dense_bytes(architecture, model.form) / ranks.tp
    return Work(rest + needed, flops, needed, layers * steps)


def _dense_bytes(architecture: Architecture, form: str) -> float:
    """That every step reads: all weights but experts and the embedding's table."""
    return (
        architecture.dense_parameters * other_bytes_per_parameter(form)
        + 2.0 * architecture.vocab_size * architecture.hidden_size
    )


def _needed(architecture: Architecture, ranks: Ranks, num_tokens: int) -> float:
    """Distinct experts on one rank; expert-parallel ranks share them evenly."""
    return needed_experts(num_tokens, architecture.num_experts, architecture.top_k) / ranks.ep


def _check_host(model: Model, host: int, limit: float | None) -> None:
    if limit is None or host <= limit:
        return
    sizes = {
        form: sum(row_bytes(form, model.architecture)) * model.architecture.moe_layers * model.architecture.num_experts
        for form in model.formats
    }
    fitting = [form for form, size in sizes.items() if size <= limit]
    remedy = f"--quantization {fitting[0]}" if fitting else f"--host-memory {-(-host // GB)}"
    raise ConfigError(
        f"the experts of {model.name} take {host / GB:.1f} GB of host memory, and there are {limit / GB:.1f} GB. "
        f"Try {remedy}"
    )


def _notes(model: Model, budget: Budget, looks_ahead: bool) -> tuple[str, ...]:
    notes = []
    if budget.fits_whole:
        notes.append("every expert has a slot: plain vLLM serves this as fast, and needs no host memory for experts")
    elif not looks_ahead:
        notes.append(
            "steps of more routed ids than experts do not look ahead with one area of overflow rows: nothing overlaps "
            "at this concurrency unless areas is 2"
        )
    if model.form == "mxfp4":
        notes.append("record and cache are as padded for the Marlin kernel; the files are smaller")
    return tuple(notes)
