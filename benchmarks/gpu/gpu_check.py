"""Everything that is to be proven on a machine with a GPU, in steps that can be resumed. See docs/gpu-check.md.

Each step runs in a process of its own and writes its JSON when it ends. `--rehearse` needs no GPU.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import machine
from report import table, write_report
from shapes import Plan, ServingPlan
from steps import FAILED, FINISHED, OK, SECONDS, STEPS, Job

STEP_SECONDS = 900


def main() -> int:
    arguments = parse()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.step:
        write(arguments, arguments.step, run_here(arguments, arguments.step))
        return 0
    if not arguments.report:
        run_steps(arguments)
    results = {name: result for name in STEPS if (result := read(arguments, name))}
    if not arguments.json:
        print("\n".join(["", *table(results)]))
    written = write_report(arguments.out, results)
    print(json.dumps({"device": arguments.device, "quick": arguments.quick, "written": written, **results}))
    return int(any(result["status"] == FAILED for result in results.values()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="as --device cpu --quick")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: rehearse what needs no GPU")
    parser.add_argument("--quick", action="store_true", help="small numbers")
    parser.add_argument("--only", nargs="+", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--minutes", type=float, help="begin no step that is expected to end later than this")
    parser.add_argument("--fresh", action="store_true", help="repeat steps that have succeeded before")
    parser.add_argument("--report", action="store_true", help="run nothing: report and pictures of what is there")
    parser.add_argument("--json", action="store_true", help="print nothing but the JSON line")
    parser.add_argument("--out", type=Path, help="folder of the steps' JSON (default benchmarks/results/GPU)")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rehearse:
        arguments.device, arguments.quick = "cpu", True
    on_gpu = arguments.device == "cuda"
    if arguments.out is None:
        arguments.out = machine.ROOT / (f"benchmarks/results/{machine.short_name()}" if on_gpu else "build/gpu-check")
    return arguments


def run_steps(arguments: argparse.Namespace) -> None:
    """Every step that is asked for and not done yet, in the order of SECONDS, within --minutes."""
    started = time.monotonic()
    asked = [name for name in STEPS if name in (arguments.only or STEPS)]
    kept = {name: done for name in asked if not arguments.fresh and (done := finished(arguments, name))}
    planned = [name for name in asked if name not in kept]
    say = (lambda line: None) if arguments.json else (lambda line: print(line, flush=True))
    for name, done in kept.items():
        say(f"== {name}: kept from {done['date']}")
    if planned and arguments.device == "cuda":
        say(f"planned, {sum(SECONDS[name] for name in planned)} s: {', '.join(f'{n} {SECONDS[n]} s' for n in planned)}")
    for name in planned:
        elapsed = time.monotonic() - started
        if arguments.minutes and elapsed + SECONDS[name] > 60 * arguments.minutes:
            say(f"== {name}: for the next call")
            continue
        say(f"== {name}")
        left = 60 * arguments.minutes - elapsed if arguments.minutes else STEP_SECONDS
        run_apart(arguments, name, left)
        if result := read(arguments, name):
            say(f"   {result['status']} after {result['seconds']} s")
            if result["status"] == FAILED:
                say(str(result.get("error") or result.get("tail") or result)[-2500:])


def run_apart(arguments: argparse.Namespace, name: str, seconds: float) -> None:
    """A step in a process group of its own: one that dies, or hangs for `seconds`, takes nothing with it."""
    command = [sys.executable, __file__, "--step", name, "--device", arguments.device, "--out", str(arguments.out)]
    # This checkout's package, whatever else is installed, also in the engines that a step starts.
    path = os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH")]))
    before = time.monotonic()
    step = subprocess.Popen(
        [*command, *(["--quick"] if arguments.quick else [])],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = step.communicate(timeout=seconds)
        error = "" if step.returncode == 0 else f"exit code {step.returncode}: {output[-3000:]}"
    except subprocess.TimeoutExpired:
        os.killpg(step.pid, signal.SIGKILL)
        error = f"not finished after {seconds:.0f} s: {step.communicate()[0][-3000:]}"
    if error:
        write(arguments, name, {"status": FAILED, "error": error, "seconds": round(time.monotonic() - before, 1)})


def run_here(arguments: argparse.Namespace, name: str) -> dict[str, Any]:
    """One step: its result with `status`, `seconds` and, when it failed, `error`."""
    plan = Plan.small() if arguments.quick else Plan.full()
    on_gpu = arguments.device == "cuda"
    serving = ServingPlan.of(on_gpu, arguments.quick)
    scratch = machine.ROOT / "build/checkpoints" if on_gpu else arguments.out / "checkpoints"
    before = {other: read(arguments, other) or {} for other in STEPS}
    start = time.monotonic()
    try:
        result = STEPS[name](Job(plan, serving, on_gpu, arguments.quick, scratch, before))
    except Exception:
        result = {"status": FAILED, "error": traceback.format_exc()[-3000:]}
    return {"status": OK, **result, "seconds": round(time.monotonic() - start, 1)}


def write(arguments: argparse.Namespace, name: str, result: dict[str, Any]) -> None:
    record = {**result, "fingerprint": fingerprint(arguments), "date": time.strftime("%Y-%m-%d %H:%M")}
    (arguments.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def read(arguments: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """The step's last result; unless only a report is asked for, with these settings and sources."""
    path = arguments.out / f"{name}.json"
    result = json.loads(path.read_text()) if path.exists() else None
    return result if result and (arguments.report or result["fingerprint"] == fingerprint(arguments)) else None


def finished(arguments: argparse.Namespace, name: str) -> dict[str, Any] | None:
    """The result of a step that need not run again."""
    result = read(arguments, name)
    return result if result and result["status"] in FINISHED else None


def fingerprint(arguments: argparse.Namespace) -> str:
    """Changes with the settings and with every source that a result depends on."""
    digest = hashlib.sha256(f"{arguments.device} {arguments.quick}".encode())
    folders = (machine.ROOT / "csrc", machine.ROOT / "benchmarks/gpu", machine.ROOT / "vllm_expert_prefetch")
    for path in sorted(path for folder in folders for path in folder.rglob("*.*")):
        if path.suffix in (".py", ".h", ".cu", ".cuh", ".cc"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
