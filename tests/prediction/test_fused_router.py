"""The fused Triton router against torch. Without a GPU it runs in Triton's interpreter, in a process of its own: the
interpreter is chosen by an environment variable when the kernel is defined."""

import os
import subprocess
import sys

import pytest
import torch
from toy_moe import make_gates, tokens

from vllm_expert_prefetch.prediction import Routing, Signals, router
from vllm_expert_prefetch.prediction.fused_router import FusedRouter, can_fuse, create_fused_router, is_available
from vllm_expert_prefetch.prediction.router import RouterPredictor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(not is_available(), reason="Triton is not installed")


@needs_triton
@pytest.mark.skipif(DEVICE == "cuda" or IN_INTERPRETER, reason="the tests below run here")
def test_the_kernel_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-k", "kernel_gives or count_returns or no_numbers"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout


runs_here = pytest.mark.skipif(
    not is_available() or (DEVICE == "cpu" and not IN_INTERPRETER), reason="needs a GPU or Triton's interpreter"
)


def inputs(num_tokens, num_experts, hidden_size, with_bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size + 8, generator=generator).bfloat16()[:, :hidden_size]
    weight = torch.randn(num_experts, hidden_size, generator=generator)
    bias = torch.randn(num_experts, generator=generator) if with_bias else None
    return hidden.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE)


@runs_here
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("routing", "num_tokens", "num_experts", "hidden_size", "count"),
    [
        (Routing(2), 3, 16, 128, 4),
        (Routing(2, renormalize=False), 1, 16, 576, 2),
        (Routing(8, scaling=2.5), 2, 128, 512, 11),
        (Routing(4), 2, 60, 100, 6),
        (Routing(2), 1, 5, 16, 9),
    ],
)
def test_the_kernel_gives_what_torch_gives(routing, num_tokens, num_experts, hidden_size, count, with_bias):
    hidden, weight, bias = inputs(num_tokens, num_experts, hidden_size, with_bias)
    fused = FusedRouter(weight, bias, routing, max_tokens=4)
    expected = routing.choose(torch.nn.functional.linear(hidden.float(), weight, bias), count)
    found = fused.predict(hidden, count)
    assert torch.equal(found.ids, expected.ids)
    torch.testing.assert_close(found.weights, expected.weights, rtol=1e-4, atol=1e-5)


@runs_here
def test_the_count_returns_to_zero_so_that_calls_can_follow_each_other():
    hidden, weight, _ = inputs(4, 16, 128, False)
    fused = FusedRouter(weight, None, Routing(2), max_tokens=4)
    for rows in (hidden, hidden.flip(0), hidden[:1]):
        expected = Routing(2).choose(rows.float() @ weight.T, 4)
        assert torch.equal(fused.predict(rows, 4).ids, expected.ids)


@runs_here
def test_rows_that_are_no_numbers_give_ids_that_exist():
    hidden, weight, _ = inputs(3, 5, 128, False)
    hidden[1] = float("nan")
    found = FusedRouter(weight, None, Routing(2), max_tokens=4).predict(hidden, 4)
    assert int(found.ids.min()) >= 0
    assert int(found.ids.max()) < 5
    expected = Routing(2).choose(hidden[::2].float() @ weight.T, 4)
    assert torch.equal(found.ids[::2], expected.ids)


@pytest.mark.parametrize("routing", [Routing(2, "sigmoid"), Routing(2, correction_bias=torch.zeros(4))])
def test_other_routing_is_left_to_torch(routing):
    assert not can_fuse(routing)
    with pytest.raises(ValueError, match="softmax"):
        FusedRouter(torch.zeros(4, 8), None, routing, 1)


def test_nothing_is_fused_off_the_gpu():
    assert create_fused_router(torch.zeros(4, 8), None, Routing(2)) is None


def test_the_router_predictor_fuses_narrow_steps_only(monkeypatch):
    asked = []

    class Fused:
        max_tokens = 2

        def predict(self, hidden, count):
            asked.append((len(hidden), count))
            return "fused"

    monkeypatch.setattr(router, "create_fused_router", lambda weight, bias, routing: Fused())
    predictor = RouterPredictor(make_gates())
    signals = [Signals(tokens(count), torch.zeros(count, 2), torch.zeros(count, 2)) for count in (2, 3)]
    assert predictor.predict(0, signals[0], 3) == "fused"
    assert predictor.predict(0, signals[1], 3).ids.shape == (3, 3)
    assert asked == [(2, 3)]
