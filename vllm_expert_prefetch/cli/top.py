"""`vllm-expert-prefetch top URL`: a running server's expert cache, in the terminal."""

import argparse
import contextlib
import json
import os
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from vllm_expert_prefetch.metrics.rates import NoMetrics, Scrape, parse_scrape, summarise

_TIMEOUT_SECONDS = 10
_BAR = 40
_COLOURS = {"hit": "green", "late": "yellow", "speculated": "cyan", "miss": "red"}
_SHADES = {"hit": "█", "late": "▓", "speculated": "▒", "miss": "░"}
"""Outcomes can be told apart without colours."""


class Unreachable(RuntimeError):
    """No page of metrics; the message says why."""


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser("top", help="watch a running server", description=__doc__)
    parser.add_argument("url", metavar="URL", help="the server, such as http://localhost:8000")
    parser.add_argument("--interval", type=_positive, default=2.0, metavar="SECONDS", help="between two looks (2)")
    parser.add_argument("--once", action="store_true", help="one interval, then end")
    parser.add_argument("--json", action="store_true", help="with --once: print one JSON object")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Show until interrupted, or `q` is pressed; 1 with a message when there is nothing to show."""
    if arguments.json and not arguments.once:
        print("--json needs --once", file=sys.stderr)
        return 2
    url = _metrics_url(arguments.url)
    try:
        before = scrape(url)
        time.sleep(arguments.interval)
        if arguments.once:
            summary = summarise(before, scrape(url))
            print(json.dumps(summary)) if arguments.json else _print_once(summary)
        else:
            _watch(url, before, arguments.interval)
    except (Unreachable, NoMetrics) as problem:
        print(f"{url}: {problem}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def scrape(url: str) -> Scrape:
    """One look at the server. Raises Unreachable, or NoMetrics when the plugin is not at work there."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as page:
            text = page.read().decode()
    except (urllib.error.URLError, OSError, ValueError) as error:
        raise Unreachable(f"cannot be read ({getattr(error, 'reason', error)})") from error
    return parse_scrape(text, time.monotonic())


def _watch(url: str, before: Scrape, interval: float) -> None:
    from rich.live import Live

    after = scrape(url)
    with _keys() as wants_to_quit, Live(render(summarise(before, after)), screen=True, auto_refresh=False) as live:
        while True:
            live.update(render(summarise(before, after)), refresh=True)
            if wants_to_quit(interval):
                return
            before, after = after, scrape(url)


@contextlib.contextmanager
def _keys() -> Iterator[Callable[[float], bool]]:
    """Waits so many seconds; True at once when `q` is pressed. Keys arrive without Enter, and are not shown."""
    if not sys.stdin.isatty():
        yield threading.Event().wait
        return
    import select
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)

    def quits(seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if select.select([sys.stdin], [], [], left)[0] and os.read(sys.stdin.fileno(), 1) in (b"q", b"Q"):
                return True
        return False

    try:
        yield quits
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


def _print_once(summary: dict[str, Any]) -> None:
    from rich.console import Console

    Console().print(render(summary))


def render(summary: dict[str, Any]) -> Any:
    """What is shown of `metrics.rates.summarise`: a rich renderable."""
    from rich.console import Group
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for name, value, more in _rows(summary):
        table.add_row(name, value, more)
    layers = [_layer_line(layer, counts) for layer, counts in summary["layers"].items() if sum(counts.values())]
    heading = (
        ["", f"[bold]layers[/bold]  {'  '.join(f'[{c}]{_SHADES[o]} {o}[/{c}]' for o, c in _COLOURS.items())}"]
        if layers
        else []
    )
    return Group(_title(summary), "", table, *heading, *layers)


def _title(summary: dict[str, Any]) -> str:
    first = summary["servers"][0]
    ranks, seconds = len(summary["servers"]), summary["elapsed_seconds"]
    return (
        f"[bold]{first['model_name']}[/bold]  policy {first['policy']}, execution {first['execution']}, prefetch "
        f"{first['prefetch']}, link {first['link']}, {ranks} rank{'s' * (ranks > 1)}, last {seconds:.1f} s"
    )


def _rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    copied, steps, of_layers = (summary[f"{name}_per_second"] for name in ("transfer_bytes", "steps", "moe_steps"))
    held = (
        f"{summary['slots']:.0f} slots ({summary['resident_slots']:.0f} resident) for {summary['experts']:.0f} experts"
    )
    return [
        ("TPOT", _milliseconds(summary["tpot_seconds"]), ""),
        ("hit rate", _percent(summary["hit_ratio"]), _planned_and_larger(summary)),
        ("stalls", _percent(summary["stall_ratio"]), "of the steps' time"),
        ("saved", _percent(summary["saved_ratio"]), "of the steps' time, by looking ahead"),
        ("prefetch", _percent(summary["prefetch_precision"]), "used, of all prefetches, cancelled ones too"),
        ("guesses", _percent(summary["prefetch_recall"]), f"of the experts found; {_open_layers(summary)}"),
        ("lookups", f"{sum(summary['lookups_per_second'].values()):.0f}/s", _bar(summary["lookups_per_second"])),
        ("copied", f"{_bytes(sum(copied.values()))}/s", _listed(copied, _bytes)),
        ("link", f"{_bytes(summary['link_bytes_per_second'])}/s", _at_start(summary)),
        ("evictions", f"{summary['evictions_per_second']:.0f}/s", ""),
        ("steps", f"{sum(steps.values()):.1f}/s", _listed(steps, "{:.1f}".format)),
        ("MoE steps", f"{sum(of_layers.values()):.0f}/s", _listed(of_layers, "{:.0f}".format)),
        ("cache", _bytes(summary["cache_bytes"]), f"{held}, {_bytes(summary['host_store_bytes'])} on the host"),
    ]


def _planned_and_larger(summary: dict[str, Any]) -> str:
    ghosts = summary["ghost_hit_ratios"].items()
    larger = ", ".join(f"{_percent(ratio)} with {scale} x" for scale, ratio in ghosts if ratio is not None)
    return f"planned {_percent(summary['planned_hit_ratio'])}" + (f"; {larger} the slots" if larger else "")


def _open_layers(summary: dict[str, Any]) -> str:
    depth = int(summary["servers"][0]["lookahead_layers"])
    if not depth:
        return "nothing looks ahead"
    layers = "/".join(f"{number:.0f}" for number in list(summary["open_layers"].values())[:depth])
    return f"{layers} layers, {'1' if depth == 1 else f'1 to {depth}'} ahead"


def _at_start(summary: dict[str, Any]) -> str:
    return f"while copying; {_bytes(summary['link_bytes_per_second_at_start'])}/s at start"


def _layer_line(layer: str, counts: dict[str, float]) -> str:
    return f"{layer:>6}  {_bar(counts)} {_percent(counts.get('hit', 0) / sum(counts.values()))} hits"


def _bar(counts: dict[str, float]) -> str:
    """A bar of _BAR characters, divided as the counts are; largest remainders make it exact."""
    whole = sum(counts.values())
    if not whole:
        return ""
    exact = {outcome: _BAR * counts.get(outcome, 0) / whole for outcome in _COLOURS}
    cells = {outcome: int(length) for outcome, length in exact.items()}
    for outcome in sorted(exact, key=lambda name: cells[name] - exact[name])[: _BAR - sum(cells.values())]:
        cells[outcome] += 1
    parts = [(_COLOURS[outcome], _SHADES[outcome] * cells[outcome]) for outcome in _COLOURS if cells[outcome]]
    return "".join(f"[{colour}]{cells_of_one}[/{colour}]" for colour, cells_of_one in parts)


def _listed(values: dict[str, float], text: Any) -> str:
    return ", ".join(f"{name} {text(value)}" for name, value in values.items() if value)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{1000 * value:.2f} ms"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0")
    return value


def _metrics_url(url: str) -> str:
    url = url.rstrip("/")
    if "://" not in url:
        url = f"http://{url}"
    return url if url.endswith("/metrics") else f"{url}/metrics"
