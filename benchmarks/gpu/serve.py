"""An engine in a process of its own, asleep until it is asked: the process itself, and `Server`, the asking side.

In the process: one JSON line on stdin is one measurement, one marked JSON line on stdout its result.
"""

import contextlib
import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import machine
from harness import Engine, counters, engine_environment

MARK = "@@ "
SETTLE_SECONDS = 0.7
"""On a GPU, totals reach the counters twice a second."""
START_SECONDS, MEASURE_SECONDS = 300, 120
"""A hanging engine is ended after so long."""


class Refused(Exception):
    """The plugin refuses to serve what it was asked for; the text is its own."""


class Server:
    """The asking side. Starting takes up to minutes: make all servers first, then wait for each."""

    def __init__(self, engine: Engine, log: Path) -> None:
        self._log = log
        self._stderr = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(asdict(engine))],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
        )

    def started(self) -> dict[str, Any]:
        """Wait for the engine: what it holds. Raises Refused, and RuntimeError with the log's end for all else."""
        answer = self._answer(START_SECONDS)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer

    def measure(self, prompts: list[list[int]], num_tokens: int, logprobs: bool = False) -> dict[str, Any]:
        """Greedy decoding of the prompts in one batch; see `measure` below."""
        command = {"prompts": prompts, "num_tokens": num_tokens, "logprobs": logprobs}
        try:
            _pipe(self._process.stdin).write(json.dumps(command) + "\n")
            _pipe(self._process.stdin).flush()
        except BrokenPipeError:
            raise RuntimeError(f"an engine is gone: {self._log.read_text()[-3000:]}") from None
        return self._answer(MEASURE_SECONDS)

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._stderr.close()

    def _answer(self, seconds: float) -> dict[str, Any]:
        watchdog = threading.Timer(seconds, self._process.kill)
        watchdog.start()
        try:
            for line in _pipe(self._process.stdout):
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
        finally:
            watchdog.cancel()
        raise RuntimeError(f"an engine ended, or hung for {seconds} s: {self._log.read_text()[-3000:]}")


def _pipe(stream: Any) -> TextIO:
    assert stream is not None
    return stream


def environment() -> dict[str, str]:
    """The engines' environment. Loading a large checkpoint wants more than one thread."""
    threads = {"OMP_NUM_THREADS": "2"} if machine.gpus() else {}
    return {**engine_environment(), "HF_HUB_OFFLINE": "1", **threads}


def main() -> None:
    """The process."""
    started = time.monotonic()
    engine = Engine(**json.loads(sys.argv[1]))
    try:
        llm = engine.open()
    except Exception as error:
        if "expert_prefetch: " not in str(error):
            raise
        _say({"refused": str(error)[str(error).index("expert_prefetch: ") :].splitlines()[0]})
        return
    _say({"start_seconds": round(time.monotonic() - started, 1), **_holdings()})
    for line in sys.stdin:
        _say(measure(llm, engine.config is not None, **json.loads(line)))


def _say(answer: dict[str, Any]) -> None:
    print(f"\n{MARK}{json.dumps(answer)}", flush=True)


def _holdings() -> dict[str, Any]:
    """What the engine holds where, and how the plugin describes itself."""
    import torch
    from prometheus_client import REGISTRY
    from vllm.version import __version__

    held = {name: value for name, value in counters().items() if name.endswith("_bytes")}
    info = [sample.labels for metric in REGISTRY.collect() for sample in metric.samples if _is_info(sample.name)]
    torch_gb = round(torch.cuda.memory_allocated() / 1e9, 3) if torch.cuda.is_available() else None
    return {"vllm": __version__, "allocated_gb": torch_gb, "plugin_bytes": held, "info": info[0] if info else {}}


def _is_info(name: str) -> bool:
    return name == "vllm_expert_prefetch_info"


def measure(llm: Any, counting: bool, prompts: list[list[int]], num_tokens: int, logprobs: bool) -> dict[str, Any]:
    """Seconds of each decode step, the tokens, and what the plugin counted in these steps."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    sampling = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, logprobs=1 if logprobs else None
    )
    started = time.monotonic_ns()
    names = [f"{started}-{number}" for number in range(len(prompts))]
    for name, prompt in zip(names, prompts, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, sampling)
    outputs: dict[str, Any] = {}
    before: dict[str, float] | None = None
    steps = []
    last = 0.0
    while engine.has_unfinished_requests():
        new = engine.step()
        now = time.perf_counter()
        outputs |= {output.request_id: output.outputs[0] for output in new}
        if before is not None and new:
            steps.append(now - last)
            last = now
        elif before is None and len(outputs) == len(prompts):  # all prompts are through
            before = _totals(counting)
            last = time.perf_counter()
    grown = {name: value - (before or {}).get(name, 0.0) for name, value in _totals(counting).items()}
    return {
        "steps": steps[1:],  # the first one also took the break for the totals
        "num_steps": len(steps),
        "tokens": [list(outputs[name].token_ids) for name in names],
        "logprobs": [_logprobs(outputs[name]) for name in names] if logprobs else [],
        "counted": {name: value for name, value in grown.items() if "_total" in name and value},
    }


def _totals(counting: bool) -> dict[str, float]:
    import torch

    if counting and torch.cuda.is_available():
        time.sleep(SETTLE_SECONDS)
    return counters()


def _logprobs(output: Any) -> list[float]:
    return [at[token].logprob for token, at in zip(output.token_ids, output.logprobs, strict=True)]


if __name__ == "__main__":
    main()
