"""`vllm-expert-prefetch simulate`: what recorded routing comes to with other slots, policies and look-ahead."""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_expert_prefetch.config import MOST_LOOKAHEAD_LAYERS, ConfigError
from vllm_expert_prefetch.residency import POLICIES
from vllm_expert_prefetch.tracing.card import TraceError

if TYPE_CHECKING:
    from vllm_expert_prefetch.planning.replay import Setting
    from vllm_expert_prefetch.tracing.trace import Trace

SHARES = (0.125, 0.25, 0.5, 0.75)


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "simulate",
        help="replay recorded routing with other slots, policies and look-ahead",
        description="Replays a trace through the planner that serves, step by step as it was served, for every policy, "
        "number of slots and depth of look-ahead that is asked for. Belady's hit rate, and with look-ahead the TPOT of "
        "guesses that are always right, stand beside each row as bounds. docs/tracing.md says what is modelled.",
    )
    add = parser.add_argument
    add("trace", type=Path, metavar="TRACE", help="what vllm-expert-prefetch trace has written: a folder or a file")
    add("--policies", type=_list_of(str), default=(*POLICIES,), metavar="A,B", help=f"default: {','.join(POLICIES)}")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--slots", type=_list_of(_count(1)), default=(), metavar="N,M", help="slots of each layer")
    sizes.add_argument(
        "--shares",
        type=_list_of(_share),
        default=(),
        metavar="S,T",
        help="shares of the experts with a slot, as 0.25 or 25%% (default: as recorded, 12.5, 25, 50 and 75 %%)",
    )
    add("--depths", type=_list_of(_count(0)), default=(0,), metavar="D,E", help="layers of look-ahead, 0 to 4 (0)")
    add("--more-gb", type=_positive, metavar="GB", help="say what so many GB of slots more would give")
    add(
        "--link-gbps", type=_positive, metavar="GBPS", help="the link, GB/s (default: as measured when it was recorded)"
    )
    add("--layer-us", type=_positive, metavar="US", help="what a layer computes (default: as each step was timed)")
    add("--areas", type=_count(1), default=1, metavar="N", help="areas of overflow rows, 1 or 2 (1)")
    add("--recall", type=_all_of(_share), metavar="R,S", help="of guesses by distance (0.88,0.68,0.58,0.52)")
    add("--steps", type=_count(1), metavar="N", help="replay the last N steps only")
    add("--no-bounds", action="store_true", help="leave the bounds out: they take most of the time")
    add("--processes", type=_count(1), default=1, metavar="N", help="at once (1)")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--write-profile", type=Path, metavar="FILE", help="write how often experts are used, for the key `profile`")
    add("--plot", type=Path, metavar="FILE.png", help="draw hit rates and TPOT against the size of the cache")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the rows; 0, or 2 with a message on stderr."""
    try:
        from vllm_expert_prefetch.cli.simulate_table import plot, print_report

        report = _simulate(args)
        print(json.dumps(report)) if args.json else print_report(report)
        if args.plot:
            plot(report, args.plot)
        if args.write_profile:
            from vllm_expert_prefetch.tracing.profile import profile_of, write_profile
            from vllm_expert_prefetch.tracing.trace import read_trace

            write_profile(args.write_profile, profile_of(read_trace(args.trace)))
    except (ConfigError, TraceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _simulate(args: argparse.Namespace) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import Progress

    from vllm_expert_prefetch.planning.clock import clock_of
    from vllm_expert_prefetch.planning.guesses import RECALL
    from vllm_expert_prefetch.planning.simulate import as_recorded
    from vllm_expert_prefetch.planning.sweep import Sweep
    from vllm_expert_prefetch.tracing.trace import read_trace

    _check(args)
    whole = read_trace(args.trace)
    trace = whole.last(args.steps) if args.steps else whole
    recall = (args.recall or RECALL)[:MOST_LOOKAHEAD_LAYERS]
    clock = clock_of(trace, args.link_gbps and args.link_gbps * 1e9, args.layer_us and args.layer_us * 1e-6)
    if max(args.depths) > len(recall):
        raise ConfigError(f"--recall has {len(recall)} numbers, --depths goes to {max(args.depths)}: give one for each")
    if clock is None and max(args.depths):
        raise ConfigError("look-ahead needs times, and this trace has none: give --link-gbps and --layer-us")
    settings, more = _settings(args, trace)
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("replays", total=None)
        rows = Sweep(trace, clock, recall).run(
            settings,
            not args.no_bounds,
            args.processes,
            lambda done, total: progress.update(task, completed=done, total=total),
        )
    card = trace.card
    return {
        "model": card.model,
        "layers": card.num_layers,
        "experts": max(card.num_experts),
        "top_k": max(card.top_k),
        "recorded": {"policy": card.policy, "prefetch": card.prefetch, "at": card.recorded_at, "by": card.made_by},
        "steps": len(trace),
        "decode_steps": int(trace.decodes.sum()),
        "tokens": int(trace.tokens.sum()),
        "replayed_as_recorded": as_recorded(whole),
        "has_times": clock is not None,
        "more_gb": args.more_gb and {"gb": args.more_gb, "row": rows[more[0]], "more": rows[more[1]]},
        "rows": rows,
    }


def _check(args: argparse.Namespace) -> None:
    if unknown := [name for name in args.policies if name not in POLICIES]:
        raise ConfigError(f"--policies: no policy {', '.join(unknown)}; there are {', '.join(POLICIES)}")
    if max(args.depths) > MOST_LOOKAHEAD_LAYERS:
        raise ConfigError(f"--depths: {MOST_LOOKAHEAD_LAYERS} layers at most, got {max(args.depths)}")
    if args.areas > 2:
        raise ConfigError(f"--areas: 1 or 2, got {args.areas}")


def _settings(args: argparse.Namespace, trace: "Trace") -> "tuple[list[Setting], list[int]]":
    """What to replay; where the row of --more-gb is in it, and the one that it is held against."""
    from vllm_expert_prefetch.planning.replay import Setting
    from vllm_expert_prefetch.planning.simulate import slots_of_share, slots_with_more

    card = trace.card
    for num_slots in args.slots:
        if not max(card.top_k) <= num_slots <= max(card.num_experts):
            raise ConfigError(
                f"--slots: {num_slots}, and a layer takes {max(card.top_k)} (top-k) to {max(card.num_experts)} (all)"
            )
    capacities = [tuple(min(num, slots) for num in card.num_experts) for slots in args.slots]
    if not args.slots:
        recorded = [card.num_slots] if card.num_slots and not args.shares else []
        capacities = [*recorded, *(slots_of_share(trace, share) for share in args.shares or SHARES)]
    capacities = [*dict.fromkeys(capacities)]
    settings = [
        Setting(slots, policy, depth, args.areas)
        for slots in sorted(capacities, key=sum)
        for policy in args.policies
        for depth in args.depths
    ]
    if args.more_gb is None:
        return settings, []
    policy = card.policy if card.policy in args.policies else args.policies[0]
    base = Setting(capacities[0], policy, args.depths[0], args.areas)
    more = Setting(slots_with_more(trace, base.slots, args.more_gb * 1e9), policy, base.depth, args.areas)
    if more.slots == base.slots:
        size = sum(card.record_bytes) / 1e9
        raise ConfigError(f"--more-gb {args.more_gb:g} is no slot more in each layer: one takes {size:.3g} GB")
    settings += [one for one in (base, more) if one not in settings]
    return settings, [settings.index(base), settings.index(more)]


def _list_of(convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def parse(text: str) -> tuple[Any, ...]:
        return tuple(dict.fromkeys(_all_of(convert)(text)))

    return parse


def _all_of(convert: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(convert(part.strip()) for part in text.split(","))


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {least} on")
        return int(text)

    return parse


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share above 0 and up to 1 (or 100%)")
    return value


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value
