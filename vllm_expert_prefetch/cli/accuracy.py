"""`vllm-expert-prefetch accuracy`: what speculative execution costs in quality, against exact execution."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "accuracy",
        help="measure what speculative execution costs in quality",
        description="Decodes text token by token in each mode, the text's own token always following, and compares "
        "what the model says of each next token with exact execution: perplexity, share of equal most likely tokens, "
        "KL divergence. Modes: exact; speculative in the layers that ARTIFACT allows; speculative in every layer but "
        "the first, as published.",
    )
    parser.add_argument("model", metavar="MODEL", help="model directory or name, as for vllm serve")
    parser.add_argument(
        "--artifact",
        type=Path,
        metavar="ARTIFACT",
        help="directory that calibrate has written; without one the predictor is `router` and no layer is allowed",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=".jsonl or .jsonl.gz with `text` or `prompt`, not used in calibration; default: what calibrate held out "
        "of its sample",
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--max-tokens", default=2000, help="of text, in all (default: %(default)s)", **number)
    parser.add_argument("--window", default=256, help="tokens of one sequence (default: %(default)s)", **number)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument(
        "--engine", type=_engine, default={}, metavar="JSON", help='more engine arguments, as {"dtype": "bfloat16"}'
    )
    parser.set_defaults(run=run)


def _engine(value: str) -> Any:
    found = json.loads(value)
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {value}")
    return found


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 0, or 1 with a message on stderr."""
    from vllm_expert_prefetch.calibration import CalibrationError
    from vllm_expert_prefetch.config import ConfigError
    from vllm_expert_prefetch.prediction import ArtifactError

    try:
        return _measure(args)
    except (CalibrationError, ArtifactError, ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _measure(args: argparse.Namespace) -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # before vLLM is imported: the table is what counts here
    from vllm_expert_prefetch.calibration.accuracy import accuracy_json, accuracy_table, measure
    from vllm_expert_prefetch.calibration.text import read_text
    from vllm_expert_prefetch.cli.calibrate import Bar, sample_data
    from vllm_expert_prefetch.prediction import load_artifact

    _check(args)
    text = read_text(args.data or sample_data())
    card = load_artifact(args.artifact).card if args.artifact else None

    from vllm_expert_prefetch.lookahead.create import allowed_layers
    from vllm_expert_prefetch.studies.forced_decoding import CannotMeasure, open_forced_decoding

    try:
        with open_forced_decoding(args.model, args.window, args.artifact, **args.engine) as decoder, Bar() as bar:
            layers = range(decoder.num_layers)
            modes = {"speculative, as published": frozenset(layers[1:])}
            if card is not None:
                modes = {"speculative": allowed_layers(card, decoder.num_layers), **modes}
            results = measure(decoder, _windows(args, text, card, decoder), modes, bar.show)
    except CannotMeasure as reason:
        print(f"error: {args.model} cannot be measured: {reason}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(accuracy_json(results, len(layers)), indent=1))
    else:
        print(accuracy_table(results, len(layers)))
    return 0


def _check(args: argparse.Namespace) -> None:
    from vllm_expert_prefetch.calibration import CalibrationError

    for name, low in {"max_tokens": 16, "window": 16}.items():
        if getattr(args, name) < low:
            raise CalibrationError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")


def _windows(args: argparse.Namespace, text: Any, card: Any, decoder: Any) -> list[list[int]]:
    """Of the text that calibration saw, the part that it held out; of another, all."""
    from vllm_expert_prefetch.calibration import CalibrationError
    from vllm_expert_prefetch.calibration.guard import first_tokens
    from vllm_expert_prefetch.calibration.text import cut
    from vllm_expert_prefetch.studies.forced_decoding import SHORTEST

    if card is not None and card.data.get("sha256") == text.sha256:
        if "window" not in card.data:
            raise CalibrationError(
                "this artifact does not say what of its text it held out: give other text with --data"
            )
        held_out = cut(text, decoder.tokenize, card.data["window"], card.data["max_tokens"]).test
        windows = [
            piece[start : start + args.window] for piece in held_out for start in range(0, len(piece), args.window)
        ]
    else:
        windows = [decoder.tokenize(document)[: args.window] for document in text.documents]
    kept = first_tokens(windows, args.max_tokens, SHORTEST)
    if not kept:
        raise CalibrationError(f"the text has no document of {SHORTEST} tokens")
    return kept
