"""The steps of gpu_check.py that start vLLM. Each takes a Job and returns its result; heavy imports happen inside."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapes import RESIDENCIES

if TYPE_CHECKING:
    from steps import Job

Step = Callable[["Job"], dict[str, Any]]
NEEDS_GPU, NEEDS_VLLM, LEFT_OUT = "needs a GPU", "needs vLLM", "left out"
FP8_LAYERS = 2


def _with_vllm(step: Step) -> Step:
    """The step, where there is a vLLM."""
    return lambda job: step(job) if find_spec("vllm") else {"status": NEEDS_VLLM}


def _model(job: "Job", num_layers: int | None = None, fp8: bool = False) -> tuple[Path, dict[str, Any]]:
    """The random checkpoint, written unless it is there, and what is known of it."""
    import torch
    from chain import ChainOptions
    from checkpoint import CheckpointOptions, write_checkpoint

    shape = job.serving.shape if num_layers is None else replace(job.serving.shape, num_layers=num_layers)
    folder = job.scratch / f"qwen3-moe-{shape.num_layers}-layers{'-fp8' if fp8 else ''}"
    device = torch.device("cuda" if job.on_gpu else "cpu")
    made = write_checkpoint(folder, CheckpointOptions(shape, ChainOptions(), fp8), device)
    return folder, {"shape": asdict(shape), **made}


def run_checkpoint(job: "Job") -> dict[str, Any]:
    """Random weights in the model's shapes, and the measured statistics of their routing."""
    return _model(job)[1]


def run_exact(job: "Job") -> dict[str, Any]:
    import exact

    return exact.measure(job.serving, job.scratch, job.on_gpu, job.quick)


def run_side(residency: float, job: "Job") -> dict[str, Any]:
    """All variants at one residency."""
    if residency not in job.serving.residencies:
        return {"status": LEFT_OUT}
    import side_by_side

    folder, made = _model(job)
    link_gbps = job.peak_gbps if job.serving.emulated_gbps is None else job.serving.emulated_gbps
    return {**made, **side_by_side.measure(folder, job.serving, residency, link_gbps, job.on_gpu)}


def run_fp8(job: "Job") -> dict[str, Any]:
    """A checkpoint of few layers in FP8: written, compared with its bfloat16 twin, and on a GPU served."""
    import fp8

    shape = replace(job.serving.shape, num_layers=FP8_LAYERS)
    if not job.on_gpu:  # FP8's blocks are 128 wide, wider than some of the tiny model's matrices
        shape = replace(shape, intermediate=128, num_kv_heads=2)
    few = replace(job.serving, shape=shape)
    job = replace(job, serving=few, scratch=job.scratch / "fp8")
    (small, made), (large, twin) = _model(job, fp8=True), _model(job)
    result = {**made, "bfloat16_gb": twin["gb"], "largest_error": round(fp8.largest_error(small, large), 4)}
    return {**result, **(fp8.serve_it(small, few) if job.on_gpu else {"status": NEEDS_GPU})}


def side_name(residency: float) -> str:
    """The step's name."""
    return f"side-{100 * residency:g}"


ENGINE_STEPS: dict[str, Step] = {
    "checkpoint": run_checkpoint,
    "exact": _with_vllm(run_exact),
    **{side_name(residency): _with_vllm(partial(run_side, residency)) for residency in RESIDENCIES},
    "fp8": _with_vllm(run_fp8),
}
