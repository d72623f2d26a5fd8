"""`vllm-expert-prefetch plan`: will a model fit, what hit rate, what TPOT, which settings. Before it is downloaded."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.budget import UTILIZATION, Load, Ranks
from vllm_expert_prefetch.planning.configuration import configuration
from vllm_expert_prefetch.planning.facts import Gpu, find_gpu, find_link, gpu_like
from vllm_expert_prefetch.planning.formats import FORMATS
from vllm_expert_prefetch.planning.model_files import Model, find
from vllm_expert_prefetch.planning.plan import Plan, alternatives, make_plan
from vllm_expert_prefetch.planning.sizing import GB
from vllm_expert_prefetch.planning.timing import Machine
from vllm_expert_prefetch.tracing.card import TraceError

if TYPE_CHECKING:
    from vllm_expert_prefetch.planning.replayed import Replayed

_KV_BYTES = {"auto": 2.0, "bfloat16": 2.0, "float16": 2.0, "fp8": 1.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0}
_DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class Place:
    """The machine of a plan, and what of it was assumed."""

    machine: Machine
    description: str
    assumed: tuple[str, ...] = ()


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "plan",
        help="will a model fit a machine, and how fast will it be",
        description="Reads a configuration (and safetensors headers, where they are here), no weights. MODEL: a "
        "well-known model (--list), a config.json, a model.safetensors.index.json, or a folder. Says how the memory is "
        "used, what hit rate and time per token to expect, and the command that serves it (docs/planning.md).",
    )
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--list", action="store_true", help="the models and GPUs that are known")
    place = parser.add_argument_group("machine")
    place.add_argument("--gpu", metavar="NAME", help="as in --list; its memory, bandwidth and link")
    place.add_argument("--gpu-memory", type=float, metavar="GB", help="of each GPU, in GB (10^9 bytes)")
    place.add_argument("--host-memory", type=float, metavar="GB", help="of the host; default: not checked")
    place.add_argument("--link-gbps", type=float, metavar="GB/S", help="host to GPU, as copies reach it")
    place.add_argument("--measure", action="store_true", help="memory and link of this machine's GPU, and host memory")
    place.add_argument("--gpus", type=int, metavar="N", help="short for --tp N")
    for flag, what in (("tp", "tensor"), ("ep", "expert"), ("pp", "pipeline")):
        place.add_argument(f"--{flag}", type=int, metavar="N", help=f"{what}-parallel ranks (default: 1)")
    load = parser.add_argument_group("load")
    load.add_argument("--context", type=int, metavar="N", help=f"tokens of a sequence (default: {_DEFAULT_CONTEXT})")
    load.add_argument(
        "--concurrency", type=int, metavar="N", help="sequences at a time (default: 1, or a trace's most)"
    )
    load.add_argument("--quantization", metavar="FORMAT", help=f"of the experts: {', '.join(FORMATS)}")
    load.add_argument("--kv-cache-dtype", default="auto", choices=list(_KV_BYTES), help="default: %(default)s")
    load.add_argument("--cache-gb", type=float, metavar="GB", help="expert cache per GPU; default: all that is left")
    trace = parser.add_argument_group("a recording of this model (docs/tracing.md)")
    trace.add_argument(
        "--from-trace",
        type=Path,
        metavar="TRACE",
        help="replay it: hit rates are its own, and policies, depths of look-ahead and numbers of slots are compared",
    )
    parser.add_argument("--write-config", type=Path, metavar="FILE", help="write the command for vllm serve --config")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw TPOT and hit rate against cache size (PNG)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0, or 2 with one message on stderr for what cannot work."""
    from vllm_expert_prefetch.cli.plan_report import Report, as_json, as_list, as_text

    if args.list:
        print(as_list())
        return 0
    try:
        place, plan, replayed = _plan(args)
        advice = None
        if replayed is not None and not plan.budget.fits_whole:
            from vllm_expert_prefetch.planning.replayed import advise

            advice = advise(plan, replayed, may_be_smaller=args.cache_gb is None)
            plan = replace(plan, tpot=advice.largest.tpot)
        if args.plot:
            from vllm_expert_prefetch.cli.plan_picture import draw

            draw(plan, args.plot)
        words = serve_words(plan, args.kv_cache_dtype)
        settings = settings_of(plan, args.cache_gb, advice.settings if advice else {})
        if args.write_config:
            args.write_config.write_text(configuration(words, settings))
        notes = [*place.assumed, *plan.notes, *(replayed.notes if replayed else ())]
        command = serve_command(words, settings)
        report = Report(plan, alternatives(plan), place.description, command, notes, replayed, advice)
    except (ConfigError, TraceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(as_json(report)) if args.json else as_text(report))
    return 0


def serve_words(plan: Plan, kv_cache_dtype: str) -> list[str]:
    """The model, and the flags of vLLM that serve it so."""
    load, ranks = plan.load, plan.ranks
    words = [plan.model.serve, "--gpu-memory-utilization", str(UTILIZATION)]
    words += ["--max-model-len", str(load.context), "--max-num-seqs", str(load.concurrency)]
    words += ["--tensor-parallel-size", str(max(ranks.tp, ranks.ep))] if max(ranks.tp, ranks.ep) > 1 else []
    words += ["--enable-expert-parallel"] if ranks.ep > 1 else []
    words += ["--pipeline-parallel-size", str(ranks.pp)] if ranks.pp > 1 else []
    words += ["--kv-cache-dtype", kv_cache_dtype] if kv_cache_dtype != "auto" else []
    online = {"fp8-channel": "fp8_per_channel", "int8": "int8_per_channel_weight_only"}
    if plan.model.formats and plan.model.form not in plan.model.formats:
        words += ["--quantization", online[plan.model.form]]
    return words


def settings_of(plan: Plan, cache_gb: float | None, advised: Mapping[str, Any]) -> dict[str, Any] | None:
    """The plugin's, with those that a trace has `advised`; None: every expert has a slot, plain vLLM serves it."""
    if plan.budget.fits_whole:
        return None
    if "slots_per_layer" in advised:
        return dict(advised)
    size = {"cache_gb": cache_gb} if cache_gb else {"kv_cache_tokens": plan.load.context * plan.load.concurrency}
    return {**advised, **size}


def serve_command(words: Sequence[str], settings: Mapping[str, Any] | None) -> str:
    """`words` as in `serve_words`, `settings` as in `settings_of`."""
    model, *flags = words
    if settings is not None:
        flags = ["--plugin", CONFIG_KEY, *flags]
        flags += [f"--additional-config.{CONFIG_KEY}.{key} {_plain(value)}" for key, value in settings.items()]
    return " ".join(["vllm serve", model, *flags])


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plan(args: argparse.Namespace) -> "tuple[Place, Plan, Replayed | None]":
    if not args.model:
        raise ConfigError("name a MODEL, or --list")
    ranks = _ranks(args)
    for name in ("gpu_memory", "host_memory", "link_gbps", "context", "concurrency", "cache_gb"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    model = find(args.model, args.quantization)
    place, replayed = _place(args), _replayed(args.from_trace, model)
    context = args.context or min(_DEFAULT_CONTEXT, model.architecture.max_context)
    concurrency = args.concurrency or (replayed.most_sequences if replayed else 1)
    load = Load(context, concurrency, _KV_BYTES[args.kv_cache_dtype])
    config = ExpertPrefetchConfig(cache_gb=args.cache_gb) if args.cache_gb else None
    return place, make_plan(model, place.machine, load, ranks, config, replayed), replayed


def _replayed(path: Path | None, model: Model) -> "Replayed | None":
    if path is None:
        return None
    from vllm_expert_prefetch.planning.replayed import Replayed
    from vllm_expert_prefetch.tracing.trace import read_trace

    return Replayed(read_trace(path), path, model)


def _ranks(args: argparse.Namespace) -> Ranks:
    for name in ("gpus", "tp", "ep", "pp"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, got {getattr(args, name)}")
    ep, pp = args.ep or 1, args.pp or 1
    tp = args.tp or (ep if ep > 1 else (args.gpus or pp) // pp)
    if ep > 1 and tp != ep:
        raise ConfigError(
            f"--ep {ep} with --tp {tp}: vLLM's expert-parallel ranks are its tensor-parallel ranks. Drop --tp"
        )
    if args.gpus is not None and args.gpus != tp * pp:
        raise ConfigError(f"--gpus {args.gpus} is not --tp {tp} x --pp {pp}: drop --gpus")
    return Ranks(tp, ep, pp)


def _place(args: argparse.Namespace) -> Place:
    if args.measure:
        return _measured(args)
    if args.gpu is None and args.gpu_memory is None:
        raise ConfigError("say for which machine: --gpu NAME (plan --list), --gpu-memory GB, or --measure")
    gpu = find_gpu(args.gpu) if args.gpu else gpu_like(args.gpu_memory * GB)
    link = find_link(gpu.link)
    gbps = args.link_gbps or link.gbps
    assumed = []
    if not args.gpu:
        assumed.append(f"assumed: the memory bandwidth and FLOPS of the {gpu.name}; name yours with --gpu")
    if not args.link_gbps and not args.gpu:
        assumed.append(f"assumed: a link of {gbps:g} GB/s ({link.name}); give yours with --link-gbps")
    memory = args.gpu_memory * GB if args.gpu_memory else float(gpu.memory_bytes)
    return _place_of(args, gpu, gbps, memory, args.host_memory * GB if args.host_memory else None, tuple(assumed))


def _place_of(
    args: argparse.Namespace, gpu: Gpu, gbps: float, memory: float, host: float | None, assumed: tuple[str, ...]
) -> Place:
    flops = gpu.bf16_tflops and gpu.bf16_tflops * 1e12
    machine = Machine(memory, gpu.bandwidth_gbps * 1e9, flops, gbps * 1e9, gpu.capability, host)
    name = gpu.name if args.gpu or args.measure else "a GPU"
    description = f"{name} with {memory / GB:.1f} GB, link {gbps:g} GB/s"
    return Place(machine, description, assumed)


def _measured(args: argparse.Namespace) -> Place:
    from vllm_expert_prefetch.cli.doctor_gpu import measure_gpu
    from vllm_expert_prefetch.memory.host_limit import host_limit

    if args.gpu or args.gpu_memory or args.link_gbps or args.host_memory:
        raise ConfigError("--measure takes GPU, memory and link from this machine: drop the flags that name others")
    gpu, gbps = measure_gpu()
    return _place_of(args, gpu, gbps, gpu.memory_bytes, host_limit().num_bytes, ())
