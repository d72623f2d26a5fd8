"""The FP8 checkpoint: is it what it says, and do plain vLLM and the plugin serve it?"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import block_fp8
from chain import followed, walk
from safetensors import safe_open
from serve import Refused, Server
from shapes import ServingPlan
from side_by_side import engine_of
from variants import CACHE, RESIDENT, variants

NUM_TOKENS = 24


def largest_error(fp8: Path, bf16: Path) -> float:
    """Of the first layer's experts: the largest difference, as a share of the largest weight."""
    worst = 0.0
    with (
        safe_open(fp8 / "model-00000.safetensors", "pt") as small,
        safe_open(bf16 / "model-00000.safetensors", "pt") as large,
    ):
        for name in (name for name in small.keys() if "experts" in name and name.endswith(".weight")):  # noqa: SIM118
            true = large.get_tensor(name).float()
            read = block_fp8.dequantise(small.get_tensor(name), small.get_tensor(f"{name}_scale_inv"))
            worst = max(worst, ((read - true).abs().max() / true.abs().max()).item())
    return worst


def serve_it(model: Path, plan: ServingPlan) -> dict[str, Any]:
    """Share of greedy tokens that follow the cycle, of plain vLLM and of the plugin, or why the plugin refuses."""
    found = {variant.name: variant for variant in variants(plan.shape, 0.5, {})}
    prompt = walk(plan.shape.vocab, 0, plan.num_prompt_tokens)
    result: dict[str, Any] = {}
    for name in (RESIDENT, CACHE):
        with tempfile.TemporaryDirectory() as folder:
            engine = replace(engine_of(model, plan, found[name], True), max_num_seqs=1)
            server = Server(engine, Path(folder) / "log")
            try:
                server.started()
                (tokens,) = server.measure([prompt], NUM_TOKENS)["tokens"]
                result[name] = {"tokens_of_the_cycle": followed(prompt, tokens, plan.shape.vocab) / NUM_TOKENS}
            except Refused as error:
                result[name] = {"refused": str(error)}
            finally:
                server.close()
    return result
