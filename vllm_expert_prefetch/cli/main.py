"""Entry point of `vllm-expert-prefetch`."""

import argparse
import sys

from vllm_expert_prefetch import __version__
from vllm_expert_prefetch.cli import accuracy, bench, calibrate, demo_model, doctor, plan, simulate, top, trace

COMMANDS = (plan, bench, doctor, demo_model, calibrate, accuracy, top, trace, simulate)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = argparse.ArgumentParser(
        prog="vllm-expert-prefetch", description="Tools around the expert_prefetch plugin."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand; its exit code."""
    parsed = build_parser().parse_args(arguments)
    return int(parsed.run(parsed))


if __name__ == "__main__":
    sys.exit(main())
