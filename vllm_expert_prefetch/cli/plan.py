"""`vllm-expert-prefetch plan`: will a model fit, what hit rate, what TPOT, which settings. Before it is downloaded."""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.budget import Load, Ranks
from vllm_expert_prefetch.planning.facts import Gpu, find_gpu, find_link, gpu_like
from vllm_expert_prefetch.planning.formats import FORMATS
from vllm_expert_prefetch.planning.model_files import find
from vllm_expert_prefetch.planning.plan import Plan, alternatives, make_plan
from vllm_expert_prefetch.planning.sizing import GB
from vllm_expert_prefetch.planning.timing import Machine

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
    place.add_argument("--measure", action="store_true", help="take all of these from this machine's GPU and host")
    place.add_argument("--gpus", type=int, metavar="N", help="short for --tp N")
    for flag, what in (("tp", "tensor"), ("ep", "expert"), ("pp", "pipeline")):
        place.add_argument(f"--{flag}", type=int, metavar="N", help=f"{what}-parallel ranks (default: 1)")
    load = parser.add_argument_group("load")
    load.add_argument("--context", type=int, metavar="N", help=f"tokens of a sequence (default: {_DEFAULT_CONTEXT})")
    load.add_argument("--concurrency", type=int, default=1, metavar="N", help="sequences at a time (default: 1)")
    load.add_argument("--quantization", metavar="FORMAT", help=f"of the experts: {', '.join(FORMATS)}")
    load.add_argument("--kv-cache-dtype", default="auto", choices=list(_KV_BYTES), help="default: %(default)s")
    load.add_argument("--cache-gb", type=float, metavar="GB", help="expert cache per GPU; default: all that is left")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw TPOT and hit rate against cache size (PNG)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the plan; 0, or 2 with one message on stderr for what cannot work."""
    from vllm_expert_prefetch.cli.plan_report import as_json, as_list, as_text

    if args.list:
        print(as_list())
        return 0
    try:
        place, plan = _plan(args)
        others = alternatives(plan)
        if args.plot:
            from vllm_expert_prefetch.cli.plan_picture import draw

            draw(plan, args.plot)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = serve_command(plan, args.kv_cache_dtype, args.cache_gb)
    notes = [*place.assumed, *plan.notes]
    if args.json:
        print(json.dumps(as_json(plan, others, place.description, command, notes)))
    else:
        print(as_text(plan, others, place.description, command, notes))
    return 0


def serve_command(plan: Plan, kv_cache_dtype: str, cache_gb: float | None) -> str:
    """What serves it so: plain vLLM where every expert has a slot."""
    load, ranks = plan.load, plan.ranks
    words = ["vllm serve", plan.model.serve]
    if not plan.budget.fits_whole:
        words.append("--plugin expert_prefetch")
    words += ["--gpu-memory-utilization 0.9", f"--max-model-len {load.context}", f"--max-num-seqs {load.concurrency}"]
    words += [f"--tensor-parallel-size {max(ranks.tp, ranks.ep)}"] if max(ranks.tp, ranks.ep) > 1 else []
    words += ["--enable-expert-parallel"] if ranks.ep > 1 else []
    words += [f"--pipeline-parallel-size {ranks.pp}"] if ranks.pp > 1 else []
    words += [f"--kv-cache-dtype {kv_cache_dtype}"] if kv_cache_dtype != "auto" else []
    online = {"fp8-channel": "fp8_per_channel", "int8": "int8_per_channel_weight_only"}
    if plan.model.formats and plan.model.form not in plan.model.formats:
        words.append(f"--quantization {online[plan.model.form]}")
    if not plan.budget.fits_whole:
        key = "--additional-config.expert_prefetch"
        size = f"cache_gb {cache_gb:g}" if cache_gb else f"kv_cache_tokens {load.context * load.concurrency}"
        words.append(f"{key}.{size}")
    return " ".join(words)


def _plan(args: argparse.Namespace) -> tuple[Place, Plan]:
    if not args.model:
        raise ConfigError("name a MODEL, or --list")
    ranks = _ranks(args)
    for name in ("gpu_memory", "host_memory", "link_gbps", "context", "concurrency", "cache_gb"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")
    model = find(args.model, args.quantization)
    place = _place(args)
    context = args.context or min(_DEFAULT_CONTEXT, model.architecture.max_context)
    load = Load(context, args.concurrency, _KV_BYTES[args.kv_cache_dtype])
    config = ExpertPrefetchConfig(cache_gb=args.cache_gb) if args.cache_gb else None
    return place, make_plan(model, place.machine, load, ranks, config)


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
