"""How many prompt tokens steps that decode may take, learnt from what they take."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
from engines import TINY_MODEL, layers, open_engine

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.serving.prompt_limit import LEAST_TOKENS, PromptLimit
from vllm_expert_prefetch.serving.scheduling import Bound, bound_of, check_scheduler


def serve(limit, seconds_of, steps):
    """The limits of so many steps that take all they may."""
    taken = []
    for _ in range(steps):
        taken.append(limit.tokens)
        limit.note(limit.tokens, seconds_of(limit.tokens))
    return taken


def test_the_limit_doubles_up_to_the_most_where_steps_are_short():
    assert serve(PromptLimit(1.0, 200), lambda tokens: 0.5, 7) == [16, 32, 64, 128, 200, 200, 200]


def test_it_settles_below_what_takes_too_long_and_tries_again_ever_more_rarely():
    taken = serve(PromptLimit(1.0, 2048), lambda tokens: tokens / 100, 2000)
    assert taken[:5] == [16, 32, 64, 128, 64]
    tries = [number for number, tokens in enumerate(taken) if tokens == 128]
    assert tries == [3, 68, 197, 454, 967, 1992]
    assert set(taken) == {16, 32, 64, 128}


def test_a_single_slow_step_changes_nothing():
    slow = iter([0.5, 2.0, 0.5, 2.0, 0.5] * 10)
    limit = PromptLimit(1.0, 64)
    serve(limit, lambda _: 0.5, 5)
    assert set(serve(limit, lambda _: next(slow), 50)) == {64}


def test_a_step_that_is_too_long_with_the_fewest_tokens_keeps_them():
    assert set(serve(PromptLimit(1.0, 512), lambda _: 5.0, 20)) == {LEAST_TOKENS}


def test_what_a_short_prompt_takes_says_nothing_of_the_limit():
    limit = PromptLimit(1.0, 512)
    for _ in range(10):
        limit.note(limit.tokens - 1, 0.1)
    assert limit.tokens == LEAST_TOKENS


class Scheduler(SimpleNamespace):
    """vLLM's rule in short: requests in their order, each no more than the threshold, all within the budget."""

    waiting: ClassVar = ()
    num_spec_tokens = 0

    def schedule(self):
        budget, taken = self.max_num_scheduled_tokens, {}
        for request in [*self.running, *self.waiting]:
            wanted = 1 + len(request.spec_token_ids) if request.num_output_tokens else request.num_left
            threshold = self.scheduler_config.long_prefill_token_threshold
            number = min(wanted, budget, threshold or wanted)
            taken[request.request_id] = number
            budget -= number
        return SimpleNamespace(num_scheduled_tokens=taken)


def request(name, num_output_tokens, num_left=4000, num_drafts=0):
    return SimpleNamespace(
        request_id=name,
        num_output_tokens=num_output_tokens,
        spec_token_ids=[7] * num_drafts,
        num_left=num_left,
    )


@pytest.mark.parametrize(
    ("running", "taken"),
    [
        (["d", "d", "p"], [1, 1, 16]),
        (["p", "d", "d"], [16, 1, 1]),
        (["p", "d", "p", "d"], [8, 1, 8, 1]),
        (["d", "d"], [1, 1]),
        (["p", "p"], [4000, 96]),
        (["d", "w", "w"], [1, 16, 0]),
        (["d", "p", "w"], [1, 16, 0]),
    ],
)
def test_prompts_share_the_limit_and_every_decode_has_its_token(running, taken):
    settings = SimpleNamespace(long_prefill_token_threshold=0)
    requests = [request(str(number), int(kind == "d")) for number, kind in enumerate(running)]
    num_running = len(running) - running.count("w")
    scheduler = Scheduler(max_num_scheduled_tokens=4096, scheduler_config=settings, running=requests[:num_running])
    scheduler.waiting = requests[num_running:]
    step = Bound(PromptLimit(1.0, 4096)).schedule(scheduler, scheduler.schedule)
    assert list(step.num_scheduled_tokens.values()) == taken
    assert (scheduler.max_num_scheduled_tokens, settings.long_prefill_token_threshold) == (4096, 0)


@pytest.mark.parametrize(
    ("running", "num_drafts", "taken"),
    [
        ("ppppppppd", 3, [4] * 9),
        ("dpppppppp", 3, [4] * 9),
        ("dp", 3, [4, 16]),
        ("p" * 20 + "d", 0, [1] * 21),
        ("dw", 3, [4, 16]),
    ],
)
def test_every_decode_keeps_its_drafts_however_many_prompts_there_are(running, num_drafts, taken):
    settings = SimpleNamespace(long_prefill_token_threshold=0)
    requests = [request(str(number), int(kind == "d"), 4000, num_drafts) for number, kind in enumerate(running)]
    scheduler = Scheduler(
        max_num_scheduled_tokens=4096,
        scheduler_config=settings,
        running=[own for own, kind in zip(requests, running, strict=True) if kind != "w"],
        waiting=[own for own, kind in zip(requests, running, strict=True) if kind == "w"],
        num_spec_tokens=num_drafts,
    )
    step = Bound(PromptLimit(1.0, 4096)).schedule(scheduler, scheduler.schedule)
    assert list(step.num_scheduled_tokens.values()) == taken


def test_a_threshold_that_was_asked_for_stays():
    settings = SimpleNamespace(long_prefill_token_threshold=5)
    scheduler = Scheduler(
        max_num_scheduled_tokens=99, scheduler_config=settings, running=[request("d", 1), request("p", 0)]
    )
    step = Bound(PromptLimit(1.0, 99)).schedule(scheduler, scheduler.schedule)
    assert step.num_scheduled_tokens == {"d": 1, "p": 5}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"enable_chunked_prefill": False}, "prompts come in one piece: drop --no-enable-chunked-prefill, or the key"),
        (
            {"long_prefill_token_threshold_adaptive": True},
            "vLLM lets prompts exceed any threshold: drop --long-prefill-token-threshold-adaptive, or the key",
        ),
        ({"scheduler_cls": "my.Scheduler"}, "my.Scheduler is not vLLM's scheduler: drop --scheduler-cls, or the key"),
    ],
)
def test_a_scheduler_that_cannot_be_held_to_the_bound_is_refused(settings, message):
    vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(**{"enable_chunked_prefill": True, "scheduler_cls": None} | settings)
    )
    with pytest.raises(ConfigError, match=f"max_decode_delay_ms is 50, and {message}"):
        check_scheduler(vllm_config, ExpertPrefetchConfig(max_decode_delay_ms=50))
    check_scheduler(vllm_config, ExpertPrefetchConfig())


@pytest.mark.proves("a bound for decodes (`max_decode_delay_ms`)")
@pytest.mark.engine
def test_a_prompt_beside_decodes_comes_in_pieces(monkeypatch):
    """Without them, in one."""
    from vllm import SamplingParams

    config = {"cache_fraction": 0.5, "max_decode_delay_ms": 0.001}
    with open_engine(TINY_MODEL, config, max_num_batched_tokens=512) as llm:
        engine = llm.llm_engine
        scheduler = engine.engine_core.engine_core.scheduler
        seen = []
        ended = Bound.ended
        monkeypatch.setattr(
            Bound, "ended", lambda self, step: (seen.append(step.num_scheduled_tokens), ended(self, step))
        )
        forever = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
        short = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
        long = {"prompt_token_ids": [7] * 300}
        engine.add_request("alone", long, short)
        while engine.has_unfinished_requests():
            engine.step()
        assert [sum(step.values()) for step in seen if step] == [300]
        for name in ("a", "b"):
            engine.add_request(name, {"prompt_token_ids": [5, 6, 7]}, forever)
        for _ in range(3):
            engine.step()
        seen.clear()
        engine.add_request("long", long, short)
        while engine.has_unfinished_requests():
            engine.step()
        pieces = [number for step in seen for name, number in step.items() if name.startswith("long")]
        assert pieces == [16] * 18 + [12]
        assert bound_of(scheduler).limit.tokens == 16
        assert layers(llm)
