"""What the headers of a checkpoint tell of its experts; nothing where they do not tell all of it."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from vllm_expert_prefetch.planning.checkpoint import read_layer_shapes
from vllm_expert_prefetch.planning.sizing import LayerShape

E, H, I = 4, 8, 6  # noqa: E741 - experts, hidden and intermediate size
SHAPES = [LayerShape(E, 2, (2 * I * H * 2, H * I * 2))] * 2
"""Of each layer: rows of w13 and of w2, two bytes a number."""


def experts(layer, prefix="model.", dtype=np.float32):
    names = {"gate_proj": (I, H), "up_proj": (I, H), "down_proj": (H, I)}
    return {
        f"{prefix}layers.{layer}.mlp.experts.{expert}.{name}.weight": np.zeros(shape, dtype)
        for expert in range(E)
        for name, shape in names.items()
    }


def fused(layer):
    prefix = f"model.layers.{layer}.mlp"
    return {
        f"{prefix}.experts.gate_up_proj": np.zeros((E, H, 2 * I), np.float16),
        f"{prefix}.experts.gate_up_proj_bias": np.zeros((E, 2 * I), np.float16),
        f"{prefix}.experts.down_proj": np.zeros((E, I, H), np.float16),
        f"{prefix}.experts.down_proj_bias": np.zeros((E, H), np.float16),
        f"{prefix}.router.weight": np.zeros((E, H), np.float16),
        f"{prefix}.shared_experts.down_proj.weight": np.zeros((H, I), np.float16),
    }


def write(folder, **files):
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")


def index(folder, *names):
    weight_map = {f"tensor of {name}": f"{name}.safetensors" for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def read(folder, num_ranks=1):
    return read_layer_shapes(folder, range(2), top_k=2, element_bytes=2, num_ranks=num_ranks)


def test_experts_one_by_one_in_the_type_that_they_are_served_in(tmp_path):
    write(tmp_path, model={**experts(0), **experts(1), "model.embed_tokens.weight": np.zeros((9, H))})
    assert read(tmp_path) == SHAPES
    assert [layer.row_bytes for layer in read(tmp_path, num_ranks=2)] == [(I * H * 2, H * I)] * 2


def test_a_rank_may_hold_whole_experts_the_smallest_share_of_them(tmp_path):
    write(tmp_path, model={**experts(0), **experts(1)})
    shares = read_layer_shapes(tmp_path, range(2), 2, element_bytes=2, num_ranks=1, num_shares=3)
    assert shares == [LayerShape(E // 3, 1, SHAPES[0].row_bytes)] * 2


def test_only_layers_with_these_numbers_are_told(tmp_path):
    write(tmp_path, model={**experts(0), **experts(1)})
    told = [len(read_layer_shapes(tmp_path, numbers, 2, 2, 1)) for numbers in (range(1), range(1, 3), range(2, 4))]
    assert told == [1, 1, 0]


def test_all_experts_in_one_tensor_with_biases_and_what_is_beside_them(tmp_path):
    write(tmp_path, model=fused(1))
    assert read(tmp_path) == [LayerShape(E, 2, (2 * I * H * 2, 2 * I * 2, H * I * 2, H * 2))]


def test_layers_behind_the_models_own_are_a_drafts(tmp_path):
    write(tmp_path, model={**experts(0), **experts(1), **experts(2), **experts(0, "mtp.")})
    assert read(tmp_path) == SHAPES


def test_of_several_files_those_that_the_index_names(tmp_path):
    write(tmp_path, a=experts(0), b=experts(1), consolidated={**experts(0, ""), **experts(1, "")})
    index(tmp_path, "a", "b")
    assert read(tmp_path) == SHAPES


def amid_a_download(folder):
    write(folder, a=experts(0))
    index(folder, "a", "b")


def without_an_index(folder):
    write(folder, a=experts(0), b=experts(1))


def of_two_models(folder):
    write(folder, model={**experts(0, "thinker.model."), **experts(0, "talker.model.")})


def quantised(folder):
    write(folder, model={**experts(0), **experts(1, dtype=np.int8)})


def damaged(folder):
    (folder / "model.safetensors").write_bytes(b"x" * 100)


@pytest.mark.parametrize("make", [amid_a_download, without_an_index, of_two_models, quantised, damaged, lambda _: None])
def test_nothing_where_the_files_do_not_tell_all_of_it(tmp_path, make):
    make(tmp_path)
    assert read(tmp_path) == []
