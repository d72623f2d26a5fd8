"""The emulated link takes the time that it was told to take."""

import time

import pytest

from vllm_expert_prefetch.experts import EmulatedLink


@pytest.mark.parametrize(
    ("gbps", "latency_us", "num_bytes", "seconds"),
    [(10, 0, 10**9, 0.1), (50, 0, 9_440_000, 188.8e-6), (1, 20, 0, 20e-6), (2, 500, 10**6, 0.001)],
)
def test_a_batch_lasts_latency_plus_bytes_over_bandwidth(gbps, latency_us, num_bytes, seconds):
    assert EmulatedLink(gbps, latency_us).seconds(num_bytes) == pytest.approx(seconds)


@pytest.mark.parametrize("num_bytes", [100_000, 2_000_000])  # spinning only, and sleeping as well
def test_waiting_lasts_at_least_that_long_and_less_than_twice(num_bytes):
    link = EmulatedLink(gbps=0.1, latency_us=100)
    lasted = []
    for _ in range(5):
        started = time.perf_counter()
        link.wait(started, num_bytes)
        lasted.append(time.perf_counter() - started)
    assert link.seconds(num_bytes) <= min(lasted) < 2 * link.seconds(num_bytes)


def test_time_already_spent_on_the_copy_is_not_waited_for_again():
    link = EmulatedLink(gbps=1, latency_us=300_000)
    started = time.perf_counter()
    link.wait(started - 10, 1000)
    assert time.perf_counter() - started < 0.3
