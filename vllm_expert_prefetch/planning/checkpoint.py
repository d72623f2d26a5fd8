"""What a checkpoint says of its routed experts: the names and shapes in its safetensors headers. No weight is read."""

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vllm_expert_prefetch.planning.sizing import LayerShape

_OF_EXPERTS = re.compile(
    r"(?P<layer>(\w+\.)*layers\.(?P<number>\d+)(\.\w+)?)\.(experts\.((?P<expert>\d+)\.)?|(?=(input|output)_linear))"
    r"(?P<tensor>\w+?)(?P<bias>[._]bias)?(\.weight)?"
)
"""One expert's tensor, or one with a row per expert: `experts.down_proj`, Granite's `output_linear`."""
_SECOND = ("down_proj", "w2", "output_linear")
"""The names of the matrix that gives the expert's output. vLLM keeps the others in one tensor, w13."""
_FLOATS = ("BF16", "F16", "F32")


def read_layer_shapes(
    folder: Path, numbers: range, top_k: int, element_bytes: int, num_ranks: int, num_shares: int = 1
) -> list[LayerShape]:
    """The MoE layers among those of these `numbers` of the checkpoint in `folder`, as a rank holds them: one of
    `num_ranks` parts of every expert, or the smallest of `num_shares` shares of whole ones.

    `element_bytes`: of the type in which the model is served. Empty where that cannot be told: files are missing or
    damaged, the experts are quantised or go unrecognised, or the files hold more than one model's layers.
    """
    try:
        headers = list(_headers(folder))
    except SafetensorError:
        return []
    experts: dict[str, int] = {}
    elements: dict[str, dict[str, int]] = {}
    found_numbers = set()
    for name, shape, dtype in headers:
        found = _OF_EXPERTS.fullmatch(name)
        if not found or int(found["number"]) not in numbers or name.startswith("mtp."):
            continue
        one, has_bias = found["expert"] is not None, found["bias"] is not None
        if len(shape) != 3 - one - has_bias:
            continue
        if dtype not in _FLOATS:
            return []
        layer = found["layer"]
        found_numbers.add(found["number"])
        experts[layer] = max(experts.get(layer, 0), int(found["expert"]) + 1 if one else shape[0])
        row = f"{'w2' if found['tensor'] in _SECOND else 'w13'}{'_bias' if has_bias else ''}"
        rows = elements.setdefault(layer, {})
        rows[row] = rows.get(row, 0) + math.prod(shape)
    if len(found_numbers) < len(elements):
        return []
    return [
        LayerShape(
            count // num_shares,
            min(top_k, count // num_shares),
            tuple(rows[row] // count * element_bytes // num_ranks for row in sorted(rows)),
        )
        for rows, count in zip(elements.values(), experts.values(), strict=True)
    ]


def _headers(folder: Path) -> Iterator[tuple[str, list[int], str]]:
    """Name, shape and type of every tensor."""
    for path in _files(folder):
        with safe_open(path, framework="numpy") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_slice(name)
                yield name, tensor.get_shape(), tensor.get_dtype()


def _files(folder: Path) -> list[Path]:
    """Those that the index names, or the only one; none where some are missing, as amid a download."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        paths = [folder / name for name in sorted({*json.loads(index.read_text())["weight_map"].values()})]
    else:
        paths = list(folder.glob("*.safetensors"))
    is_whole = all(path.exists() for path in paths) and (index.exists() or len(paths) == 1)
    return paths if is_whole else []
