"""`vllm-expert-prefetch calibrate`: make the artifact that better predictors need, from text."""

import argparse
import json
import os
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from vllm_expert_prefetch import __version__


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure a model's routing on text and train its look-ahead",
        description="Runs MODEL through vLLM over text, collects default vectors and routing tables, trains the "
        "estimator, and prints each predictor's recall on text that was held out. An interrupted run goes on where it "
        "was; ARTIFACT.work holds its intermediate results, about two bytes per token, layer and hidden value.",
    )
    parser.add_argument("model", metavar="MODEL", help="model directory or name, as for vllm serve")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ARTIFACT", help="directory to write")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help=".jsonl or .jsonl.gz with `text` or `prompt`; default: a small sample"
    )
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--max-tokens", default=50_000, help="of text, in all (default: %(default)s)", **number)
    parser.add_argument("--window", default=512, help="tokens of one run (default: %(default)s)", **number)
    parser.add_argument("--over-fetch", default=2, help="guesses beyond top-k (default: %(default)s)", **number)
    parser.add_argument("--lookahead-layers", help="how far ahead, at most (default: 3, or what there is)", **number)
    parser.add_argument(
        "--m", default=2, help="estimator: hidden size is divided by it (default: %(default)s)", **number
    )
    parser.add_argument("--n", default=2, help="estimator: its MLP is so much wider (default: %(default)s)", **number)
    parser.add_argument("--epochs", default=30, help="at most (default: %(default)s)", **number)
    parser.add_argument("--no-defaults", action="store_true", help="collect no default vectors")
    parser.add_argument("--no-estimator", action="store_true", help="train no estimator")
    parser.add_argument(
        "--guard-tokens",
        default=2048,
        help="decoded to choose the layers of speculative execution, 0: allow none (default: %(default)s)",
        **number,
    )
    parser.add_argument("--keep-recordings", action="store_true", help="do not delete ARTIFACT.work at the end")
    parser.add_argument(
        "--engine", type=json.loads, default={}, metavar="JSON", help='more engine arguments, as {"dtype": "bfloat16"}'
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the artifact; 0 when it is written, 1 with a message on stderr otherwise."""
    from vllm_expert_prefetch.calibration import CalibrationError
    from vllm_expert_prefetch.calibration.text import read_text
    from vllm_expert_prefetch.prediction import ArtifactError

    try:
        _check(args)
        text = read_text(args.data or sample_data())
        return _calibrate(args, text)
    except (CalibrationError, ArtifactError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def sample_data() -> Path:
    """The text in the package: 78 passages, 42 thousand tokens; its licences are in the README beside it."""
    return Path(str(files("vllm_expert_prefetch.demo") / "data" / "calibration.jsonl.gz"))


def _check(args: argparse.Namespace) -> None:
    from vllm_expert_prefetch.calibration import CalibrationError

    lowest = {"max_tokens": 64, "window": 16, "over_fetch": 0, "lookahead_layers": 1, "m": 1, "n": 1, "epochs": 1}
    lowest["guard_tokens"] = 0
    for name, low in lowest.items():
        if getattr(args, name) is not None and getattr(args, name) < low:
            raise CalibrationError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    if not isinstance(args.engine, dict):
        raise CalibrationError(f"--engine must be a JSON object, got {args.engine!r}")
    if args.output.exists() and not args.output.is_dir():
        raise CalibrationError(f"{args.output} is not a directory")


def _calibrate(args: argparse.Namespace, text: Any) -> int:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # before vLLM is imported: the bars are what counts here
    import torch

    from vllm_expert_prefetch.calibration.calibrate import Calibration, Options
    from vllm_expert_prefetch.calibration.report import recall_table
    from vllm_expert_prefetch.calibration.training import TrainingOptions
    from vllm_expert_prefetch.serving import compat
    from vllm_expert_prefetch.serving.sources import NotFound
    from vllm_expert_prefetch.studies.recording import open_recording_engine

    options = Options(
        window=args.window,
        max_tokens=args.max_tokens,
        over_fetch=args.over_fetch,
        depth=args.lookahead_layers,
        defaults=not args.no_defaults,
        estimator=not args.no_estimator,
        training=TrainingOptions(m=args.m, n=args.n, epochs=args.epochs),
        keep_recordings=args.keep_recordings,
    )
    versions = {"vllm-expert-prefetch": __version__, "vllm": compat.vllm_version(), "torch": torch.__version__}
    try:
        with open_recording_engine(args.model, args.window, **args.engine) as engine, Bar() as bar:
            job = Calibration(engine, text, args.output, args.model, versions, options, bar.show)
            artifact = job.run()
            top_k = engine.gates[0].routing.top_k
    except NotFound as missing:
        print(f"error: {args.model} cannot be calibrated: {missing}", file=sys.stderr)
        return 1
    print(recall_table(artifact.card, top_k))
    _guard(args, text, artifact)
    print(f"{args.output}: written")
    return 0


def _guard(args: argparse.Namespace, text: Any, artifact: Any) -> None:
    """Choose the layers of speculative execution, write them into the artifact, and say which."""
    from vllm_expert_prefetch.calibration import guard
    from vllm_expert_prefetch.calibration.text import cut
    from vllm_expert_prefetch.config import ConfigError
    from vllm_expert_prefetch.prediction import save_artifact
    from vllm_expert_prefetch.studies.forced_decoding import SHORTEST, CannotMeasure, open_forced_decoding

    if not args.guard_tokens:
        print("speculative execution is allowed in no layer: that was not measured")
        return
    try:
        with open_forced_decoding(args.model, args.window, args.output, **args.engine) as decoder, Bar() as bar:
            windows = cut(text, decoder.tokenize, args.window, args.max_tokens).validation
            windows = guard.first_tokens(windows, args.guard_tokens, SHORTEST)
            artifact = guard.with_guard(artifact, decoder, windows, bar.show)
    except (CannotMeasure, ConfigError) as reason:
        print(f"speculative execution is allowed in no layer: it cannot be measured here: {reason}")
        return
    save_artifact(artifact, args.output)
    allowed, num_tokens = ", ".join(map(str, artifact.card.allow_list)) or "none", artifact.card.guard["tokens"]
    if num_tokens < guard.MIN_TOKENS:
        print(
            f"speculative execution is allowed in no layer: {num_tokens} decoded tokens decide nothing, "
            f"{guard.MIN_TOKENS} are needed. Raise --guard-tokens, or give more text"
        )
        return
    print(
        f"speculative execution is allowed in layers: {allowed} (perplexity within {100 * guard.MAX_INCREASE:g} %, "
        f"measured on {num_tokens} decoded tokens)"
    )


class Bar:
    """A progress bar per stage."""

    def __enter__(self) -> "Bar":
        self._progress = Progress(console=Console(stderr=True))
        self._tasks: dict[str, TaskID] = {}
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def show(self, stage: str, done: int, total: int) -> None:
        """So much of `stage` is done."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done)
