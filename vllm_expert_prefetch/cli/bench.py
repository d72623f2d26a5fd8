"""`vllm-expert-prefetch bench`: plain vLLM, its offloaders and the plugin, compared on this machine."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.planning.budget import UTILIZATION, Budget, Load, Ranks, make_budget
from vllm_expert_prefetch.planning.configuration import configuration
from vllm_expert_prefetch.planning.model_files import Model, find
from vllm_expert_prefetch.planning.timing import Machine

if TYPE_CHECKING:
    from vllm_expert_prefetch.bench.contestants import Contestant
    from vllm_expert_prefetch.bench.rounds import Job, Rows

_HOST_BYTES = 1e15
"""On the CPU platform slots are as large as all else: nothing is refused here, and vLLM has its own word."""
_GPU_FLAGS = ("--gpu-memory-utilization", str(UTILIZATION))
_CPU_FLAGS = ("--enforce-eager", "--kv-cache-memory-bytes", "1G")


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "bench",
        help="compare plain vLLM, its offloaders and the plugin on this machine",
        description="Starts a server for each of: stock (if it fits), vLLM's UVA and prefetch offloaders (on a GPU), "
        "the plugin with look-ahead off and on, all with the same accelerator memory for experts; loads them with "
        "`vllm bench serve` in rounds that begin with another one each, and says which is best, with its settings. An "
        "interrupted run goes on where it was.",
    )
    parser.add_argument("model", metavar="MODEL", help="as for plan and vllm serve")
    parser.add_argument(
        "--cache-gb", type=float, metavar="GB", help="for experts; default: what a GPU has left, else half"
    )
    parser.add_argument(
        "--link-gbps", type=float, metavar="GB/S", help="CPU platform: emulate a link of this bandwidth"
    )
    parser.add_argument("--context", type=int, default=2048, metavar="N", help="--max-model-len (default: %(default)s)")
    parser.add_argument(
        "--concurrency", default="1,4", metavar="N,...", help="sequences at a time (default: %(default)s)"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="--tensor-parallel-size (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--requests", type=int, default=12, metavar="N", help="of each load (default: %(default)s)")
    parser.add_argument("--prompt-words", type=int, default=50, metavar="N", help="median (default: %(default)s)")
    parser.add_argument("--answer-words", type=int, default=20, metavar="N", help="median (default: %(default)s)")
    parser.add_argument("--only", metavar="NAME,...", help="of stock, vllm-uva, vllm-prefetch, plugin-off, plugin-on")
    parser.add_argument("--serve-args", default="", metavar="FLAGS", help="more flags for every server")
    parser.add_argument("--out", type=Path, default=Path("expert-prefetch-bench.json"), metavar="FILE", help="its rows")
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw TPOT and tokens per second (PNG)")
    parser.add_argument(
        "--write-config", type=Path, metavar="FILE", help="write the best one's for vllm serve --config"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Compare, and end with one JSON line; 2 with one message for what cannot work, 1 where nobody started."""
    from vllm_expert_prefetch.bench import BenchError
    from vllm_expert_prefetch.bench.rounds import Rows, run_rounds

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    try:
        model, job, found = _prepare(args, say)
        told = [model.name, *job.common, *map(str, (job.num_requests, job.lengths)), *(str(one) for one in found)]
        rows = Rows.open(args.out, " ".join(told), args.fresh)
        run_rounds(job, found, rows, (lambda text: None) if args.json else say)
        return _report(args, model, job, found, rows)
    except (BenchError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        say(f"interrupted: the same command goes on, with what {args.out} holds")
        return 130


def _prepare(args: argparse.Namespace, say: Any) -> "tuple[Model, Job, list[Contestant]]":
    from vllm_expert_prefetch.bench.client import Lengths
    from vllm_expert_prefetch.bench.contestants import NAMES, STOCK, contestants
    from vllm_expert_prefetch.bench.rounds import Job

    wanted = args.only.split(",") if args.only else list(NAMES)
    concurrencies = _check(args, wanted, NAMES)
    model, on_gpu = find(args.model), _on_gpu()
    if on_gpu and args.link_gbps:
        raise ConfigError("--link-gbps emulates a link on the CPU platform: drop it, this GPU has one")
    budget, whole = _budgets(args, model, on_gpu, max(concurrencies))
    if whole is not None and STOCK in wanted:
        wanted.remove(STOCK)
        say(f"stock is left out: {whole}")
    if budget.fits_whole:
        raise ConfigError(
            f"every expert of {model.name} fits: plain vLLM serves it. Give a smaller --cache-gb to compare"
        )
    link = {"emulated_link_gbps": args.link_gbps, "emulated_link_latency_us": 10.0} if args.link_gbps else {}
    served = args.model if Path(args.model).is_dir() else model.serve
    common = [served, "--max-model-len", str(args.context), "--max-num-seqs", str(max(4, *concurrencies))]
    common += ["--tensor-parallel-size", str(args.tp)] if args.tp > 1 else []
    common += ["--no-enable-prefix-caching", *(_GPU_FLAGS if on_gpu else _CPU_FLAGS), *shlex.split(args.serve_args)]
    lengths = Lengths(args.prompt_words, args.answer_words, 2 * args.prompt_words, 2 * args.answer_words)
    job = Job(tuple(common), served, concurrencies, args.rounds, args.requests, lengths)
    found = contestants(budget, on_gpu, link, wanted)
    if not found:
        raise ConfigError(f"--only {args.only}: there is none of them on this platform")
    return model, job, found


def _check(args: argparse.Namespace, wanted: list[str], known: tuple[str, ...]) -> tuple[int, ...]:
    """The concurrencies. Raises ConfigError for a flag that cannot be meant."""
    for name in ("rounds", "requests", "context", "prompt_words", "answer_words", "tp"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    for name in ("cache_gb", "link_gbps"):
        if getattr(args, name) is not None and not 0 < getattr(args, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name):g}")
    if unknown := set(wanted) - set(known):
        raise ConfigError(f"--only: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
    try:
        numbers = tuple(sorted({int(number) for number in args.concurrency.split(",")}))
    except ValueError:
        numbers = ()
    if not numbers or numbers[0] < 1:
        raise ConfigError(
            f"--concurrency must be numbers of at least 1 with commas between them, got {args.concurrency}"
        )
    if 6 * (args.prompt_words + args.answer_words) > args.context:
        raise ConfigError(
            f"prompts and answers of up to {2 * (args.prompt_words + args.answer_words)} words need --context "
            f"{6 * (args.prompt_words + args.answer_words)}, got {args.context}"
        )
    return numbers


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _budgets(args: argparse.Namespace, model: Model, on_gpu: bool, concurrency: int) -> tuple[Budget, str | None]:
    """What experts may take, and why stock does not fit (None: it may)."""
    load, ranks = Load(args.context, concurrency), Ranks(args.tp)
    config = ExpertPrefetchConfig(cache_gb=args.cache_gb) if args.cache_gb else None
    if not on_gpu:
        half = config or ExpertPrefetchConfig(cache_fraction=0.5)
        return make_budget(model, Machine(_HOST_BYTES, 1e12, None, 1e9), load, ranks, half, page=4096), None
    import torch

    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    major, minor = torch.cuda.get_device_capability()
    machine = Machine(memory, 1e12, None, 1e9, 10 * major + minor)
    all_of_it = make_budget(model, machine, load, ranks)
    given = make_budget(model, machine, load, ranks, config) if config else all_of_it
    reason = (
        f"its experts take {all_of_it.experts_bytes / 1e9:.1f} GB, and there are {all_of_it.cache_bytes / 1e9:.1f} GB"
    )
    return given, None if all_of_it.fits_whole else reason


def _report(args: argparse.Namespace, model: Model, job: "Job", found: "list[Contestant]", rows: "Rows") -> int:
    from vllm_expert_prefetch.bench.picture import draw
    from vllm_expert_prefetch.bench.verdict import judge

    verdict = judge(rows.rows, found)
    if not args.json:
        print(f"{'':14} {'at a time':>9} {'TPOT ms':>9} {'TTFT ms':>9} {'tokens/s':>9} {'of stock':>9} {'hit rate':>9}")
        for row in verdict.medians:
            print(
                f"{row['name']:14} {row['concurrency']:9} {row['tpot_ms']:9.1f} {row['ttft_ms']:9.1f} "
                f"{row['output_tokens_per_s']:9.1f} {_share(row.get('share_of_stock')):>9} "
                f"{_share(row.get('hit_rate')):>9}"
            )
        print(verdict.line)
    if args.plot and verdict.medians:
        draw(verdict.medians, f"{model.name}: {' '.join(job.common[1:])}", args.plot)
    best = next((one for one in found if one.name == verdict.best), None)
    if args.write_config and best:
        args.write_config.write_text(configuration([*job.common, *best.flags], best.config))
    result = {
        "model": model.name,
        "best": verdict.best,
        "verdict": verdict.line,
        "medians": verdict.medians,
        "failed": rows.failed,
        "servers": {one.name: [*job.common, *one.arguments] for one in found},
    }
    print(json.dumps(result))
    return 0 if verdict.best else 1


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
