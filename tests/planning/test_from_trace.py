"""`plan --from-trace`: what a recording of the model changes of a plan, and the configuration that comes of it."""

import json
import random
from dataclasses import replace

import pytest

from vllm_expert_prefetch.cli.main import main
from vllm_expert_prefetch.config import ExpertPrefetchConfig, config_from_additional
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.planning.replay import Setting
from vllm_expert_prefetch.planning.simulate import simulate_all
from vllm_expert_prefetch.residency import POLICIES
from vllm_expert_prefetch.tracing.card import TraceCard
from vllm_expert_prefetch.tracing.trace import trace_of_steps, write_trace

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

LAYERS, EXPERTS, TOP_K = 48, 128, 8
CARD = TraceCard(
    "Qwen/Qwen3-30B-A3B", tuple(map(str, range(LAYERS))), (EXPERTS,) * LAYERS, (TOP_K,) * LAYERS, (1,) * LAYERS
)
ON_A_4090 = ("Qwen3-30B-A3B", "--gpu", "RTX 4090")
SLOTS = 33
"""That fit such a card."""


def made(likely, num_steps=48, sequences=1, num_prompt=1):
    """`likely(step)`: the experts from which a step's are drawn, in every layer."""
    rng = random.Random(1)
    steps = [
        [[rng.sample(likely(step), TOP_K) for _ in range(sequences)] for _ in range(LAYERS)]
        for step in range(num_steps)
    ]
    return trace_of_steps(CARD, steps, num_prompt)


def few(step):
    return range(TOP_K)


def uniform(step):
    return range(EXPERTS)


def in_turn(step):
    """Others every eight steps: what was used most is not what comes."""
    return range(40 * (step // 8 % 3), 40 * (step // 8 % 3) + 30)


def favourites(step):
    """A few in every other step, anybody in between: what was used last is not what comes."""
    return range(20) if step % 2 else range(20, EXPERTS)


@pytest.fixture
def plan(capsys, tmp_path):
    def planned(trace, *arguments):
        path = tmp_path / f"{len([*tmp_path.iterdir()])}.safetensors"
        write_trace(path, trace)
        assert main(["plan", *ON_A_4090, "--json", "--from-trace", str(path), *map(str, arguments)]) == 0
        return json.loads(capsys.readouterr().out)

    return planned


@pytest.mark.parametrize(("likely", "policy"), [(in_turn, "lru"), (favourites, "lfu")])
def test_the_policy_is_the_one_that_hits_most_on_the_trace(plan, likely, policy):
    trace = made(likely)
    found = plan(trace)
    assert found["slots_per_layer"] == SLOTS
    rates = {own: simulate_all(trace, Setting((SLOTS,) * LAYERS, own)).decode_hits for own in POLICIES}
    assert max(rates, key=lambda own: rates[own]) == policy
    at_most = {own["policy"]: own["hit_rate"] for own in found["trace"]["options"] if own["lookahead_layers"] == 0}
    assert found["trace"]["recommended"]["policy"] == policy
    assert f"--additional-config.expert_prefetch.policy {policy}" in found["command"]
    assert found["hit_rate"]["expected"] == pytest.approx(at_most[policy], abs=1e-3)


def test_hit_rate_bytes_and_times_are_of_the_trace(plan):
    warm, cold = plan(made(few, num_prompt=0)), plan(made(uniform))  # first uses are not counted
    assert warm["hit_rate"] == {"low": 1.0, "expected": 1.0, "high": 1.0}
    assert (warm["bytes_per_token"], warm["experts_needed_per_layer"]) == (0, TOP_K)
    assert cold["hit_rate"]["expected"] == pytest.approx(SLOTS / EXPERTS, abs=0.03), "no policy knows what comes"
    assert cold["tpot_ms"]["expected"] > 5 * warm["tpot_ms"]["expected"]
    prompts = trace_of_steps(CARD, [[[[*range(8)], [*range(8, 16)]]] * LAYERS] * 40, num_prompt=4)
    found = plan(prompts)
    assert found["ttft_tokens"] == 2
    assert found["other_formats"]["fp8"]["hit_rate"]["expected"] == 1, "of this trace as well"


def test_batches_are_those_of_the_trace(plan):
    found = plan(made(uniform, sequences=3, num_prompt=0))
    assert (found["concurrency"], found["trace"]["sequences"]) == (3, 3)
    assert found["experts_needed_per_layer"] == pytest.approx(EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** 3), rel=0.03)
    assert found["bytes_per_token"] == pytest.approx(
        found["experts_needed_per_layer"] * LAYERS * found["record_bytes"] * (1 - found["hit_rate"]["expected"]) / 3,
        rel=0.01,
    )
    assert any("no prompts" in note for note in found["notes"])
    executed = replace(made(few), card=replace(CARD, execution="speculative in 3 of 48 layers"))
    found = plan(executed, "--concurrency", 2)
    assert found["concurrency"] == 2
    assert any("speculative execution" in note for note in found["notes"])


def test_fewer_slots_where_they_do_as_well(plan):
    recommended = plan(made(few))["trace"]["recommended"]
    assert recommended["slots_per_layer"] == SLOTS // 4
    assert recommended["prefetch"] == "off", "nothing is missed"
    found = plan(made(uniform))
    assert "slots_per_layer" not in found["trace"]["recommended"]
    assert "kv_cache_tokens" in found["command"]
    given = plan(made(few), "--cache-gb", 12)["trace"]
    assert "slots_per_layer" not in given["recommended"], "the size was given"
    assert len({own["slots_per_layer"] for own in given["options"]}) == 1


def test_it_looks_ahead_as_far_as_that_is_faster(plan):
    found = plan(made(uniform))
    depth = found["trace"]["recommended"]["lookahead_layers"]
    times = {
        own["lookahead_layers"]: own["tpot_ms"]["expected"]
        for own in found["trace"]["options"]
        if (own["slots_per_layer"], own["policy"]) == (SLOTS, found["trace"]["recommended"]["policy"])
    }
    assert sorted(times) == [0, 1, 2, 3, 4]
    assert times[depth] < times[0] / 1.02
    assert times[depth] <= 1.02 * min(times.values())
    assert found["tpot_ms"]["expected"] == pytest.approx(times[depth], rel=1e-3)


@pytest.mark.parametrize("likely", [few, uniform])
def test_vllm_reads_the_configuration_that_is_written(plan, tmp_path, likely):
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    file = tmp_path / "best.yaml"
    found = plan(made(likely), "--context", 4096, "--write-config", file)
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    read = parser.parse_args(["--config", str(file)])
    assert (read.model, read.max_model_len, read.max_num_seqs) == ("Qwen/Qwen3-30B-A3B", 4096, 1)
    assert read.gpu_memory_utilization == 0.9
    size = {} if likely is few else {"kv_cache_tokens": 4096}
    expected = ExpertPrefetchConfig(**found["trace"]["recommended"], **size)
    assert config_from_additional(read.additional_config) == expected


def test_without_a_trace_the_plan_is_written_as_well(capsys, tmp_path):
    file = tmp_path / "plan.yaml"
    assert main(["plan", *ON_A_4090, "--json", "--write-config", str(file)]) == 0
    assert json.loads(capsys.readouterr().out)["trace"] is None
    assert "kv_cache_tokens: 8192" in file.read_text()
    assert main(["plan", "OLMoE-1B-7B-0924", "--gpu", "RTX 4090", "--write-config", str(file)]) == 0
    assert "expert_prefetch" not in file.read_text(), "plain vLLM serves it"


def test_the_text_says_what_is_recommended_and_why(capsys, tmp_path):
    write_trace(tmp_path / "t.safetensors", made(in_turn))
    assert main(["plan", *ON_A_4090, "--from-trace", str(tmp_path / "t.safetensors")]) == 0
    text = capsys.readouterr().out
    for part in (
        "policy lru, 47 decode steps of",
        "recommended:",
        "policy lru: hits of decode steps lru",
        "47 decode steps are few",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("trace", "says"),
    [
        (replace(made(few), card=replace(CARD, model="/models/OLMoE")), ["/models/OLMoE", "Qwen3-30B-A3B"]),
        (replace(made(few), card=replace(CARD, num_experts=(64,) * LAYERS)), ["64 experts", "128 experts"]),
        (made(few, num_steps=20), ["19 decode steps", "32 at least"]),
    ],
)
def test_what_says_nothing_of_this_model_is_refused(capsys, tmp_path, trace, says):
    write_trace(tmp_path / "t.safetensors", trace)
    assert main(["plan", *ON_A_4090, "--from-trace", str(tmp_path / "t.safetensors")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in ("t.safetensors", *says):
        assert part in message


def test_where_every_expert_fits_nothing_is_compared(capsys, tmp_path):
    write_trace(tmp_path / "t.safetensors", made(uniform))
    big = ("Qwen3-30B-A3B", "--gpu-memory", "141", "--json", "--from-trace", str(tmp_path / "t.safetensors"))
    assert main(["plan", *big]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "--plugin" not in found["command"]
    assert "options" not in found["trace"]
