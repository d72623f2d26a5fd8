"""The steps of gpu_check.py. Each takes a Job and returns its result; heavy imports happen inside."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import machine
from engine_steps import ENGINE_STEPS, LEFT_OUT, NEEDS_GPU
from shapes import Plan, ServingPlan

OK, NOT_HERE, FAILED = "ok", "not here", "failed"
FINISHED = (OK, NEEDS_GPU, NOT_HERE, LEFT_OUT)
ASSUMED_PEAK_GBPS = 50.0
ASSUMED_COMPUTE_MS = 5.0
DEFAULT_BLOCKS = 16
IS_BUILT = """
import sys
from importlib.metadata import version
from vllm_expert_prefetch.native.library import cuda_library, why_not_cuda, why_not_host
version("vllm-expert-prefetch")
sys.exit(why_not_host() or why_not_cuda() or sys.argv[1] not in cuda_library().architectures().split())
"""


@dataclass(frozen=True)
class Job:
    """What a step may know: the plans, whether a GPU is used, a folder for checkpoints, and the results so far."""

    plan: Plan
    serving: ServingPlan
    on_gpu: bool
    quick: bool
    scratch: Path
    before: dict[str, Any] = field(default_factory=dict)

    @property
    def peak_gbps(self) -> float:
        """The link's measured peak, or the assumed one of a rehearsal."""
        return self.before.get("link", {}).get("peak_gbps", ASSUMED_PEAK_GBPS)


def run_machine(job: Job) -> dict[str, Any]:
    return machine.describe()


def run_build(job: Job) -> dict[str, Any]:
    """The libraries in place, the CUDA one for this card only, and the metadata by which the package knows itself.

    Kept as they are where they were built from these sources, for this card too.
    """
    if not job.on_gpu:
        return {"status": NEEDS_GPU, "nvcc": machine.nvcc()}
    arch = machine.gpus()[0]["compute_cap"].replace(".", "")
    kept = _command([sys.executable, "-c", IS_BUILT, arch], 120, archs=arch)
    if kept["status"] == OK:
        return kept
    environment = {**os.environ, "VEP_BUILD_CUDA": "1", "VEP_CUDA_ARCHS": arch}
    return _command([sys.executable, "setup.py", "egg_info", "build_ext", "--inplace"], 600, environment, archs=arch)


def run_link(job: Job) -> dict[str, Any]:
    if not job.on_gpu:
        return {"status": NEEDS_GPU, "sizes_bytes": job.plan.link_bytes}
    import link

    return link.measure(job.plan)


def run_gather(job: Job) -> dict[str, Any]:
    if not job.on_gpu:
        return {"status": NEEDS_GPU, "num_measurements": _num_gathers(job.plan)}
    import kernels

    return kernels.measure_gather(job.plan, job.peak_gbps)


def _num_gathers(plan: Plan) -> int:
    return len(plan.record_bytes) * len(plan.num_records) * (len(plan.num_blocks) + 2)


def run_plan(job: Job) -> dict[str, Any]:
    if not job.on_gpu:
        return {"status": NEEDS_GPU}
    import kernels

    return kernels.measure_plans(job.plan)


def run_tests(job: Job) -> dict[str, Any]:
    """tests/gpu. Without a GPU they are collected and skipped."""
    if job.quick and not job.on_gpu:
        return {"status": NEEDS_GPU}
    done = _command([sys.executable, "-m", "pytest", "tests/gpu", "-q", "--no-header"], 900)
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done["tail"])}
    return {"status": NEEDS_GPU, **counts} if not job.on_gpu else {**done, **counts}


def run_sanitizer(job: Job) -> dict[str, Any]:
    """memcheck over the gather tests, the long one left out."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not job.on_gpu:
        return {"status": NOT_HERE if tool is None else NEEDS_GPU}
    files = ["tests/gpu/test_gather.py", "tests/gpu/test_prefetch.py"]
    pytest = [sys.executable, "-m", "pytest", "-q", "--no-header", "-o", "timeout=0", *files]
    return _command([tool, "--error-exitcode", "9", *pytest, "-k", "not replays and not crowded and not large"], 900)


def run_decode(job: Job) -> dict[str, Any]:
    """The synthetic decoder; without a GPU its trace and its bounds, for an assumed link and compute time."""
    import routing

    plan = job.plan
    trace = routing.make_trace(plan.shape, plan.num_decode_steps, routing.TraceOptions())
    result: dict[str, Any] = {"shape": asdict(plan.shape), "trace": routing.measured_locality(trace)}
    if job.on_gpu:
        import decode

        blocks = job.before.get("gather", {}).get("fewest_blocks") or DEFAULT_BLOCKS
        return {**result, "blocks": blocks, **decode.measure(plan, trace, job.peak_gbps, blocks)}
    rows = []
    for label, slots, cached, _ in routing.variants(plan.shape, plan.cache_fractions):
        missed = routing.missed_bytes(trace, plan.shape, slots, cached)
        bound = routing.bound_ms(ASSUMED_COMPUTE_MS, missed, job.peak_gbps)
        row = {"variant": label, "slots_per_layer": slots, "missed_mb_per_token": round(missed / 1e6, 2)}
        rows.append({**row, "bound_ms": round(bound, 3)})
    assumed = {"link_gbps": job.peak_gbps, "compute_ms": ASSUMED_COMPUTE_MS}
    return {"status": NEEDS_GPU, **result, "assumed": assumed, "rows": rows}


_STEPS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "machine": run_machine,
    "build": run_build,
    "link": run_link,
    "gather": run_gather,
    "plan": run_plan,
    "tests": run_tests,
    "sanitizer": run_sanitizer,
    "decode": run_decode,
    **ENGINE_STEPS,
}

SECONDS = {
    "machine": 5,
    "build": 60,
    "link": 15,
    "tests": 90,
    "plan": 20,
    "gather": 60,
    "exact": 120,
    "checkpoint": 40,
    "side-50": 180,
    "decode": 60,
    "side-25": 180,
    "side-100": 90,
    "side-75": 170,
    "side-12.5": 200,
    "fp8": 100,
    "sanitizer": 120,
}
"""What each step is expected to take on an H200, estimated before any was run. The order is that of the run: what
others need, then what tells most."""

STEPS = {name: _STEPS[name] for name in SECONDS}


def _command(
    command: list[str], seconds: float, environment: dict[str, str] | None = None, **more: Any
) -> dict[str, Any]:
    """Run it in the repository: its exit code and the end of its output."""
    done = subprocess.run(
        command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, timeout=seconds, check=False
    )
    output = (done.stdout + done.stderr).strip()
    return {"status": FAILED if done.returncode else OK, "rc": done.returncode, "tail": output[-6000:], **more}
