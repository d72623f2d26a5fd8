"""What a model will do on a machine, before it is downloaded: will it fit, what hits, how long a token takes."""

from dataclasses import dataclass, replace

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.architecture import Architecture
from vllm_expert_prefetch.planning.budget import ALONE, BATCHED_TOKENS, Budget, Load, Ranks, make_budget
from vllm_expert_prefetch.planning.formats import other_bytes_per_parameter, row_bytes
from vllm_expert_prefetch.planning.hits import Range, hit_rates, needed_experts
from vllm_expert_prefetch.planning.model_files import Model
from vllm_expert_prefetch.planning.sizing import GB
from vllm_expert_prefetch.planning.timing import HIDDEN, Machine, Work

HIT_RATES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
"""Of the table of bytes per token."""
PROMPT_TOKENS = 1024
"""Of the time to the first token, or half of the context."""


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
    hits: Range
    needed: float
    """Distinct experts of a layer in a decode step, on one rank."""
    tpot: Range
    tpot_without: Range
    """Without look-ahead."""
    compute_bound: float
    link_bound: float
    """At the expected hit rate."""
    prompt_tokens: int
    ttft: float
    ttft_bound: float
    table: tuple[AtHitRate, ...]
    host_bytes: int
    """Of experts in the memory of one host that holds all ranks; 0 where all have slots."""
    notes: tuple[str, ...]

    @property
    def bytes_per_token(self) -> float:
        """Over one rank's link, at the expected hit rate."""
        return self.decode.needed_bytes * (1 - self.hits.expected) / self.load.concurrency

    @property
    def decode(self) -> Work:
        """A step of one token of every sequence."""
        return step_work(self.model, self.budget, self.ranks, self.load)


def make_plan(
    model: Model,
    machine: Machine,
    load: Load,
    ranks: Ranks = ALONE,
    config: ExpertPrefetchConfig | None = None,
) -> Plan:
    """`config`: a size that is given for the cache; None: all that is left.

    Raises ConfigError for what does not fit, or cannot be divided as `ranks` say.
    """
    architecture = model.architecture
    if load.context > architecture.max_context:
        raise ConfigError(f"--context {load.context} is more than the model's {architecture.max_context}")
    budget = make_budget(model, machine, load, ranks, config)
    host = 0 if budget.fits_whole else budget.experts_bytes * ranks.pp * max(ranks.tp, ranks.ep)
    _check_host(model, host, machine.host_bytes)
    decode = step_work(model, budget, ranks, load)
    hits = hit_rates(budget.share, load.concurrency, architecture.num_experts, architecture.top_k)
    looks_ahead = budget.areas > 1 or load.concurrency * architecture.top_k <= architecture.num_experts
    prompt = min(PROMPT_TOKENS, load.context // 2)
    prefill = _prompt_work(model, budget, ranks, prompt)
    compute = decode.compute_bound(machine)
    return Plan(
        model=model,
        machine=machine,
        ranks=ranks,
        load=load,
        budget=budget,
        hits=hits,
        needed=_needed(architecture, ranks, load.concurrency),
        tpot=decode.seconds_range(machine, hits, looks_ahead),
        tpot_without=decode.seconds_range(machine, hits, False),
        compute_bound=compute,
        link_bound=decode.link(machine, hits.expected),
        prompt_tokens=prompt,
        ttft=prefill.seconds(machine, budget.share, HIDDEN.expected if budget.areas > 1 else 0.0),
        ttft_bound=prefill.bound(machine, budget.share),
        table=tuple(
            AtHitRate(
                rate,
                decode.needed_bytes * (1 - rate) / load.concurrency,
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
            found[form] = make_plan(model, plan.machine, plan.load, plan.ranks)
        except ConfigError:
            continue
    return found


def step_work(model: Model, budget: Budget, ranks: Ranks, load: Load) -> Work:
    """Of one decode step on one rank, through all pipeline stages."""
    architecture = model.architecture
    layers = len(budget.layers) * ranks.pp
    needed = _needed(architecture, ranks, load.concurrency) * budget.record_bytes * layers
    kv = budget.kv_bytes * ranks.pp / 2  # on average a sequence is half as long as it may become
    rest = _dense_bytes(architecture, model.form) / ranks.tp
    flops = 2.0 * architecture.active_parameters * load.concurrency / ranks.tp
    return Work(rest + needed + kv, flops, needed, layers)


def _prompt_work(model: Model, budget: Budget, ranks: Ranks, num_tokens: int) -> Work:
    """Of a prompt, all its steps together: wide ones."""
    architecture = model.architecture
    steps = -(-num_tokens // BATCHED_TOKENS)
    layers = len(budget.layers) * ranks.pp
    needed = steps * _needed(architecture, ranks, min(num_tokens, BATCHED_TOKENS)) * budget.record_bytes * layers
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
