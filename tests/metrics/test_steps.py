"""The clock of engine steps: what is counted, under which phase, and how long it took."""

import importlib.util
import random
from types import SimpleNamespace

import pytest
from counter_files import make_counters

from vllm_expert_prefetch.metrics.counters import read_counters
from vllm_expert_prefetch.metrics.definitions import PHASES, SERIES, STEP_BUCKETS, histogram_series
from vllm_expert_prefetch.metrics.steps import StepClock
from vllm_expert_prefetch.serving import steps
from vllm_expert_prefetch.serving.steps import count_sequences


class Time:
    """A clock that is moved by hand."""

    def __init__(self):
        self.seconds = 1000.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def time():
    return Time()


@pytest.fixture
def counters(tmp_path):
    return make_counters(tmp_path)


@pytest.fixture
def step(time, counters):
    """Run one step of so many sequences that takes so long, after an idle time."""
    clock = StepClock(counters, time)

    def run(num_prefilling, num_decoding, seconds, idle=0.0, continues=False):
        time.seconds += idle
        clock.begin(num_prefilling, num_decoding, continues)
        time.seconds += seconds
        clock.end()

    return run


def histogram(counters, stem):
    *counts, total = [counters.get(key) for key in histogram_series(stem, STEP_BUCKETS)]
    return counts, total


@pytest.mark.parametrize(("prefilling", "decoding", "phase"), [(1, 0, "prefill"), (0, 2, "decode"), (1, 3, "mixed")])
def test_a_step_counts_under_its_phase_alone(step, counters, prefilling, decoding, phase):
    step(prefilling, decoding, 0.25)
    assert {name: counters.get(f"steps_total/{name}") for name in PHASES} == {
        name: float(name == phase) for name in PHASES
    }
    counts, total = histogram(counters, f"step_seconds/{phase}")
    assert (sum(counts), total) == (1, 0.25)


def test_after_an_idle_time_a_step_lasts_from_its_own_start(step, counters):
    step(0, 1, 0.25, idle=100)
    assert histogram(counters, "step_seconds/decode")[1] == 0.25


def test_a_step_that_continues_lasts_from_the_end_of_the_one_before(step, counters):
    step(1, 0, 0.5, idle=100)
    step(0, 1, 0.25, idle=0.125, continues=True)
    assert histogram(counters, "step_seconds/decode")[1] == 0.375


def test_time_per_output_token_weighs_a_step_by_the_sequences_beyond_their_first_token(step, counters):
    step(2, 0, 4.0)
    step(1, 3, 0.5)
    counts, total = histogram(counters, "tpot_seconds")
    assert (sum(counts), total) == (3, 1.5)


@pytest.mark.parametrize("bound", STEP_BUCKETS)
def test_a_bucket_contains_its_bound(counters, time, bound):
    time.seconds = 0.0
    clock = StepClock(counters, time)
    clock.begin(0, 1, False)
    time.seconds = bound
    clock.end()
    counts, _ = histogram(counters, "tpot_seconds")
    assert counts.index(1) == STEP_BUCKETS.index(bound)


def test_what_is_beyond_the_last_bound_is_counted_as_well(step, counters):
    step(0, 1, 10 * STEP_BUCKETS[-1])
    assert histogram(counters, "tpot_seconds")[0][-1] == 1


def test_an_end_without_a_beginning_counts_nothing(step, counters, time):
    step(0, 1, 0.5)
    before = [counters.get(key) for key in SERIES]
    StepClock(counters, time).end()
    assert [counters.get(key) for key in SERIES] == before


def test_the_wall_clock_may_jump(counters, monkeypatch):
    """Only a clock that never runs backwards is read. The module is imported anew, to find the jumping one if any."""
    monkeypatch.setattr("time.time", lambda: random.uniform(-1e9, 1e9))
    spec = importlib.util.find_spec(StepClock.__module__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    clock = module.StepClock(counters)
    for _ in range(100):
        clock.begin(0, 1, True)
        clock.end()
    counts, total = histogram(counters, "tpot_seconds")
    assert sum(counts) == 100
    assert 0 <= total < 10


def test_a_random_walk_keeps_the_totals_together(step, counters):
    generator = random.Random(5)
    num_tokens = num_steps = 0
    seconds = 0.0
    for _ in range(300):
        prefilling, decoding = generator.choice([(1, 0), (0, 4), (2, 3)])
        lasts = generator.expovariate(100)
        step(prefilling, decoding, lasts, idle=generator.random())
        num_tokens += decoding
        num_steps += 1
        seconds += lasts
    histograms = [histogram(counters, f"step_seconds/{phase}") for phase in PHASES]
    assert sum(counters.get(f"steps_total/{phase}") for phase in PHASES) == num_steps
    assert sum(sum(counts) for counts, _ in histograms) == num_steps
    assert sum(total for _, total in histograms) == pytest.approx(seconds)
    assert sum(histogram(counters, "tpot_seconds")[0]) == num_tokens


def test_another_process_reads_the_same(step, counters):
    step(0, 2, 0.5)
    snapshot = read_counters(counters.path)
    assert {key: snapshot.value(key) for key in SERIES} == {key: counters.get(key) for key in SERIES}


def scheduled(new=0, outputs=(), resumed=()):
    names = [str(index) for index in range(len(outputs))]
    cached = SimpleNamespace(req_ids=names, num_output_tokens=list(outputs), resumed_req_ids=set(resumed))
    return SimpleNamespace(scheduled_new_reqs=[None] * new, scheduled_cached_reqs=cached)


@pytest.mark.parametrize(
    ("output", "counted"),
    [
        (scheduled(new=2), (2, 0, False)),
        (scheduled(outputs=(1, 7)), (0, 2, True)),
        (scheduled(new=1, outputs=(0, 3, 9)), (2, 2, True)),
        (scheduled(outputs=(0, 3, 9), resumed=("1",)), (2, 1, True)),
        (scheduled(outputs=(0, 3), resumed=("0",)), (1, 1, True)),
    ],
)
def test_sequences_are_told_apart_by_what_the_scheduler_says_of_them(output, counted):
    assert count_sequences(output) == counted


@pytest.mark.parametrize(
    ("output", "samples"),
    [(None, True), ("of a pooling model", False), ("what the next stage of a pipeline needs", True)],
)
def test_a_step_ends_once_wherever_it_is_computed(monkeypatch, output, samples):
    seen = []
    runner = SimpleNamespace(execute_model=lambda step: output, sample_tokens=lambda grammar: "tokens")
    worker = SimpleNamespace(
        publisher=True,
        traces=None,
        step_begins=lambda *counted: seen.append(counted),
        step_ended=lambda: seen.append("end"),
    )
    monkeypatch.setattr(steps, "find_worker", lambda vllm_config: worker)
    steps.watch_steps(runner, None)
    for _ in range(2):
        step = scheduled(outputs=(1, 7))
        step.total_num_scheduled_tokens = 2
        assert runner.execute_model(step) == output
        if samples:
            assert runner.sample_tokens(None) == "tokens"
        runner.execute_model(SimpleNamespace(total_num_scheduled_tokens=0))  # vLLM has news, and no tokens
    assert seen == [(0, 2, True), "end"] * 2


def test_the_totals_of_decode_steps_change_together(time, counters):
    """A thread that reads them between two counters would see a step that took no time."""
    clock = StepClock(counters, time)
    seen = []
    clock._add = lambda place, amount: seen.append(clock.totals)
    for num_prefilling, seconds in ((0, 2.0), (1, 5.0), (0, 1.0)):
        clock.begin(num_prefilling, 1, False)
        time.seconds += seconds
        clock.end()
    assert list(dict.fromkeys(seen)) == [(1, 1, 2.0), (2, 1, 2.0), (3, 2, 3.0)]
