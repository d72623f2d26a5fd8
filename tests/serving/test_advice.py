"""What is said of prompts at start: the bytes of absent experts, the link's time, and the tokens computed meanwhile."""

from types import SimpleNamespace

import pytest
from engines import TINY_MODEL, layers, open_engine

from vllm_expert_prefetch.serving import advice
from vllm_expert_prefetch.serving.advice import PromptStep, measure_prompt_step

LAYER = SimpleNamespace(cache=SimpleNamespace(record_bytes=1000, num_experts=16, num_slots=4))


@pytest.mark.parametrize(("microseconds", "tokens"), [(1, 4096), (5, 1024), (4000, 1)])
def test_as_many_tokens_as_are_computed_while_the_absent_experts_are_copied(monkeypatch, microseconds, tokens):
    asked = []
    monkeypatch.setattr(
        advice, "_compute_seconds", lambda layer, number: asked.append(number) or microseconds * 1e-6 * number
    )
    step = measure_prompt_step([LAYER, LAYER], 4e6, 8192)
    assert asked == [2048]
    assert step == PromptStep(24_000, 0.006, tokens)


def test_where_every_expert_is_resident_nothing_is_said():
    full = SimpleNamespace(cache=SimpleNamespace(record_bytes=1000, num_experts=16, num_slots=16))
    assert measure_prompt_step([full], 1e9, 512) is None


@pytest.mark.engine
def test_an_engine_says_it():
    with open_engine(TINY_MODEL, {"cache_fraction": 0.5, "emulated_link_gbps": 0.1}) as llm:
        (line,) = (line for line in layers(llm)[0].worker.describe() if line.startswith("prompts: "))
        worker = layers(llm)[0].worker
        step = worker._prompt_step
        assert step.num_bytes == 8 * 8 * 49152
        assert step.copy_seconds == step.num_bytes / worker.publisher.counters.get("link_bytes_per_second")
        assert step.copy_seconds > step.num_bytes / 0.101e9
        assert step.tokens >= 64
        assert f"--max-num-batched-tokens {step.tokens}" in line
        runs = [[advice._compute_seconds(layers(llm)[0], number) for number in (16, 512)] for _ in range(5)]
        few, many = map(min, zip(*runs, strict=True))
        assert 0 < few < many
