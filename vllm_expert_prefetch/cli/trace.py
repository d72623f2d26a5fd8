"""`vllm-expert-prefetch trace`: record routing, of a running server or of text, and bring in what others recorded."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from vllm_expert_prefetch.config import CONFIG_KEY, ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.tracing.card import TraceError


def add_parser(subparsers: Any) -> None:
    """Declare the subcommand."""
    parser = subparsers.add_parser("trace", help="record which experts are routed to", description=__doc__)
    acts = parser.add_subparsers(required=True, metavar="ACT")
    _add_start(acts)
    for name, do, text in (
        ("stop", _stop, "end the recording of a running server"),
        ("status", _status, "say what a running server records"),
    ):
        act = acts.add_parser(name, help=text, description=text)
        _add_server(act)
        if do is _stop:
            _add_profile(act)
        act.set_defaults(run=_guarded(do))
    act = acts.add_parser("show", help="say what a trace holds", description="Say what a trace holds, as JSON.")
    act.add_argument("trace", type=Path, metavar="TRACE")
    act.set_defaults(run=_guarded(_show))
    _add_import(acts)
    _add_run(acts)


def _add_start(acts: Any) -> None:
    act = acts.add_parser(
        "start",
        help="record a running server",
        description="Start recording what a server of this user on this host routes. It goes on until `trace stop`.",
    )
    act.add_argument("directory", type=Path, metavar="DIR", help="the recording gets a folder of its own in it")
    act.add_argument(
        "--max-mb",
        type=int,
        default=ExpertPrefetchConfig.trace_mb,
        metavar="MB",
        help="of all recordings in DIR: the oldest files go (%(default)s)",
    )
    act.add_argument("--weights", action="store_true", help="gate weights as well: three times the room")
    _add_server(act)
    act.set_defaults(run=_guarded(_start))


def _add_server(act: argparse.ArgumentParser) -> None:
    act.add_argument("--server", type=int, metavar="PID", help="process of the API server, where there are several")


def _add_profile(act: argparse.ArgumentParser) -> None:
    text = "write how often experts were used, for the key `profile`"
    act.add_argument("--write-profile", type=Path, metavar="FILE", help=text)


def _add_import(acts: Any) -> None:
    act = acts.add_parser(
        "import",
        help="make a trace of routing that another program recorded",
        description="FILE: .csv with turn,phase,step,layer,slot,expert; or .npy, .npz with the routed_experts that "
        "vLLM returns for a request (--enable-return-routed-experts), an array (tokens, layers, top-k) each.",
    )
    act.add_argument("file", type=Path, metavar="FILE")
    act.add_argument("-o", "--output", type=Path, required=True, metavar="TRACE", help="file to write, .safetensors")
    act.add_argument("--model", metavar="NAME", help="where FILE does not say")
    act.add_argument("--experts", type=int, metavar="N", help="of each layer, where FILE does not say")
    act.add_argument("--prompt-tokens", type=int, default=0, metavar="N", help="of each array, served in one step (0)")
    act.add_argument("--by-token", action="store_true", help="serve prompts token by token, not in one step")
    act.set_defaults(run=_guarded(_import))


def _add_run(acts: Any) -> None:
    act = acts.add_parser(
        "run",
        help="record a model on text, without a server",
        description="Serves prompts in this process, one after the other, and records their routing.",
    )
    act.add_argument("model", metavar="MODEL", help="model directory or name, as for vllm serve")
    act.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="as for trace start")
    act.add_argument(
        "--data", type=Path, metavar="FILE", help=".jsonl or .jsonl.gz with `text` or `prompt`; default: a small sample"
    )
    act.add_argument("--weights", action="store_true", help="gate weights as well: three times the room")
    number = {"type": int, "metavar": "N"}
    act.add_argument("--prompts", default=16, help="at most (default: %(default)s)", **number)
    act.add_argument("--prompt-tokens", default=128, help="of each, at most (default: %(default)s)", **number)
    act.add_argument("--tokens", default=128, help="to generate for each (default: %(default)s)", **number)
    act.add_argument(
        "--engine",
        type=json.loads,
        default={},
        metavar="JSON",
        help='more engine arguments, as {"additional_config": {"expert_prefetch": {"cache_gb": 12}}}',
    )
    _add_profile(act)
    act.set_defaults(run=_guarded(_run))


def _guarded(do: Any) -> Any:
    def run(args: argparse.Namespace) -> int:
        try:
            answer = do(args)
        except (TraceError, ConfigError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(json.dumps(answer))
        return 0

    return run


def _start(args: argparse.Namespace) -> dict[str, Any]:
    if args.max_mb < 1:
        raise TraceError(f"--max-mb must be at least 1, got {args.max_mb}")
    request = {
        "do": "start",
        "directory": str(args.directory.absolute()),
        "limit_mb": args.max_mb,
        "weights": args.weights,
    }
    return _joined(_ask(args.server, request))


def _stop(args: argparse.Namespace) -> dict[str, Any]:
    _check_profile(args)
    stopped = [answer for answer in _ask(args.server, {"do": "stop"}) if answer["recording"] is not None]
    if not stopped:
        raise TraceError("nothing is recorded")
    _write_profile(args, stopped)
    return _joined(stopped)


def _check_profile(args: argparse.Namespace) -> None:
    """A mistake in FILE is said before the recording ends."""
    from vllm_expert_prefetch.tracing.profile import check_can_write

    if args.write_profile is not None:
        check_can_write(args.write_profile)


def _write_profile(args: argparse.Namespace, stopped: list[dict[str, Any]]) -> None:
    """Where it is asked for, of the recordings that have just ended: one of each stage of a pipeline."""
    from vllm_expert_prefetch.tracing.profile import joined, profile_of, write_profile
    from vllm_expert_prefetch.tracing.trace import read_trace

    if args.write_profile is None:
        return
    if not all(answer.get("steps") for answer in stopped):
        raise TraceError("nothing was served while it was recorded: there is no profile to write")
    recorded = [read_trace(Path(answer["recording"])) for answer in stopped]
    write_profile(args.write_profile, joined([profile_of(trace) for trace in recorded]))


def _status(args: argparse.Namespace) -> dict[str, Any]:
    return _joined(_ask(args.server, {"do": "status"}))


def _joined(answers: list[dict[str, Any]]) -> dict[str, Any]:
    return answers[0] if len(answers) == 1 else {"workers": answers}


def _ask(server: int | None, request: dict[str, Any]) -> list[dict[str, Any]]:
    """The answers of the one server of this user that there is, or of the one with the process number `server`: one of
    each worker that can record, several where a pipeline has stages or a process has engines."""
    from vllm_expert_prefetch.locks import is_locked
    from vllm_expert_prefetch.metrics.runtime_dir import folders
    from vllm_expert_prefetch.tracing.control import SUFFIX, ask

    found = {int(folder.name.split("-")[2]): folder for folder in folders() if is_locked(folder)}
    sockets = {process: sorted(folder.glob(f"*{SUFFIX}")) for process, folder in found.items()}
    sockets = {process: own for process, own in sockets.items() if own and server in (None, process)}
    if len(sockets) > 1:
        raise TraceError(f"several servers: give --server with one of {', '.join(map(str, sorted(sockets)))}")
    answers = [answer for own in sockets.values() for path in own if (answer := ask(path, request)) is not None]
    if not answers:
        which = "no server" if server is None else f"no server with process number {server}"
        raise TraceError(
            f"{which} of this user serves with the plugin on this host, as far as it can be seen from here"
        )
    return answers


def _show(args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from vllm_expert_prefetch.tracing.trace import read_trace

    trace = read_trace(args.trace)
    counted = {"steps": len(trace), "decode_steps": int(trace.decodes.sum()), "tokens": int(trace.tokens.sum())}
    requests = None if trace.requests is None else len({*trace.requests.tolist()} - {-1})
    more = {"requests": requests, "weights": bool(trace.weights), "seconds": round(float(trace.seconds.sum()), 3)}
    return {**asdict(trace.card), **counted, **more}


def _import(args: argparse.Namespace) -> dict[str, Any]:
    from vllm_expert_prefetch.tracing.imports import import_routing
    from vllm_expert_prefetch.tracing.trace import SUFFIX, write_trace

    if args.output.suffix != SUFFIX:
        raise TraceError(f"{args.output}: the name of a trace ends in {SUFFIX}")
    trace = import_routing(args.file, args.model, args.experts, args.prompt_tokens, args.by_token)
    num_bytes = write_trace(args.output, trace)
    return {"trace": str(args.output), "steps": len(trace), "layers": trace.card.num_layers, "bytes": num_bytes}


def _run(args: argparse.Namespace) -> dict[str, Any]:
    import os

    _check_profile(args)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    for name in ("prompts", "prompt_tokens", "tokens"):
        if getattr(args, name) < 1:
            raise TraceError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    from vllm_expert_prefetch.calibration import CalibrationError
    from vllm_expert_prefetch.calibration.text import read_text
    from vllm_expert_prefetch.cli.calibrate import Bar, sample_data
    from vllm_expert_prefetch.studies.recording import open_in_process

    try:
        documents = read_text(args.data or sample_data()).documents[: args.prompts]
    except CalibrationError as error:
        raise TraceError(str(error)) from error
    options = dict(args.engine)
    additional = dict(options.pop("additional_config", {}))
    own = (
        {"prefetch": "off"}
        | additional.get(CONFIG_KEY, {})
        | {"trace": str(args.output), "trace_weights": args.weights}
    )
    window = args.prompt_tokens + args.tokens
    with open_in_process(args.model, window, additional_config={**additional, CONFIG_KEY: own}, **options) as opened:
        from vllm import SamplingParams

        from vllm_expert_prefetch.serving import compat

        llm, runner = opened
        switch = compat.moe_layers_of(runner.get_model())[0].worker.traces
        sampling = SamplingParams(temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False)
        with Bar() as bar:
            for number, text in enumerate(documents):
                prompt: Any = {"prompt_token_ids": llm.get_tokenizer().encode(text)[: args.prompt_tokens]}
                llm.generate(prompt, sampling, use_tqdm=False)
                bar.show("prompts", number + 1, len(documents))
        answer: dict[str, Any] = switch.answer({"do": "stop"})
    _write_profile(args, [answer])
    return answer
