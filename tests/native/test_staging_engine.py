"""The staging engine behind the CPU platform's caches: demands first, prefetches in the background, every byte once.

Links are slow here, a quarter of a second per record: what is compared is the link's time and not the machine's.
"""

import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from host_model import HostModel
from processes import run_python

from vllm_expert_prefetch.cache.host import HostCaches, _chunk_for
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.native.library import host_library, why_not_host

pytestmark = pytest.mark.skipif(host_library() is None, reason=f"no native library: {why_not_host()}")

FOLDER = str(Path(__file__).parent)
ROW_BYTES = 1024
RECORD_BYTES = 2 * ROW_BYTES
CHUNKS = 8  # per record
RECORD_SECONDS = 0.25
"""Longer than a busy machine stands still."""
NUM_EXPERTS, NUM_SLOTS = 16, 12


def random_rows(number):
    """Records of two rows without padding."""
    generator = torch.Generator().manual_seed(number)
    shape = (NUM_EXPERTS, ROW_BYTES)
    return {name: torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator) for name in ("w13", "w2")}


def slow_link(record_seconds=RECORD_SECONDS, latency_us=0.0):
    return EmulatedLink(RECORD_BYTES / record_seconds / 1e9, latency_us)


class Layers(HostModel):
    """Layers whose slots are free, to be taken in order: the first record lies in slot 0."""

    def __init__(self, link, num_layers=1):
        super().__init__(num_layers, NUM_SLOTS, random_rows, link=link, top_k=1, chunk_bytes=RECORD_BYTES // CHUNKS)

    def step(self, *experts, number=0):
        """Serve a step of `experts`; returns how long it took."""
        topk_ids = torch.tensor(experts).view(-1, 1)
        return seconds_of(self.serve, number, topk_ids, len(experts))

    def prefetch(self, *experts, number=0):
        self.layers[number].prefetch(torch.tensor(experts), 1)

    def words(self, number=0):
        return self.layers[number].words()

    def is_empty(self, row):
        return not self.bytes_there(row)

    def bytes_there(self, row):
        """No byte of a record is 0."""
        return sum(int(tensor[row].count_nonzero()) for tensor in self.layers[0].tensors.values())

    def until_landed(self, num_records):
        """Until the lane has copied so many. Their bytes are there earlier: a record lands when its time is over."""
        deadline = time.perf_counter() + 20
        while self.num_landed() < num_records:
            assert time.perf_counter() < deadline, "it did not happen"
            time.sleep(0.0005)

    def until_copying(self, row):
        """Until the lane has begun with the record that goes there."""
        deadline = time.perf_counter() + 20
        while self.is_empty(row):
            assert time.perf_counter() < deadline, "it did not happen"
        assert not self.layers[0].tensors["w2"][row].any(), "this machine stood still for longer than a record takes"

    def num_landed(self):
        return host_library().engine_num_landed(self.caches.engine)


@pytest.fixture
def make_layers():
    made = []

    def make(*arguments):
        made.append(Layers(*arguments))
        return made[-1]

    yield make
    for layers in made:
        layers.caches.close()


@pytest.fixture
def slow(make_layers):
    return make_layers(slow_link())


def seconds_of(call, *arguments):
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def test_a_lone_demand_lasts_as_long_as_the_link_says_and_is_counted_as_a_stall(make_layers):
    layers = make_layers(slow_link(0.01, latency_us=5000))
    lasted = [layers.step(2 * step, 2 * step + 1) for step in range(5)]
    assert 0.025 <= min(lasted) < 0.03
    words = layers.words()
    assert 5 * 0.025 <= words.stall_ns / 1e9 <= sum(lasted)
    assert words.late_ns == 0


def test_without_a_link_and_without_a_copy_nothing_stalls(make_layers):
    layers = make_layers(None)
    layers.step(1, 2)
    before = layers.words()
    layers.step(1, 2)
    assert (layers.words().stall_ns, layers.words().hits) == (before.stall_ns, 2)


def test_a_prefetch_returns_at_once_and_lands_in_order_of_priority(slow):
    assert seconds_of(slow.prefetch, 5, 6, 7) < RECORD_SECONDS
    landed = []
    deadline = time.perf_counter() + 20
    while len(landed) < 3 and time.perf_counter() < deadline:
        landed += [row for row in (2, 1, 0) if row not in landed and slow.holds(0, row, 5 + row)]
    assert landed == [0, 1, 2]


def test_a_demand_waits_for_one_chunk_of_a_long_queue_at_most(slow):
    slow.prefetch(*range(10))
    slow.until_copying(0)
    lasted = slow.step(15)
    assert RECORD_SECONDS <= lasted < 1.6 * RECORD_SECONDS
    words = slow.words()
    assert (words.issued, words.cancelled, words.num_in_flight, words.demanded) == (10, 9, 1, 1)


def test_a_prefetch_yields_to_a_demand_in_the_middle_of_its_record(slow):
    """No byte of it moves meanwhile, unless a chunk ended just before: four tries."""
    for row in range(0, NUM_SLOTS, 3):
        slow.prefetch(row)
        slow.until_copying(row)
        before = slow.bytes_there(row)
        demand = threading.Thread(target=slow.step, args=(row + 1, row + 2))
        demand.start()
        time.sleep(0.5 * RECORD_SECONDS)
        during = slow.bytes_there(row)
        demand.join()
        slow.until_landed(row // 3 + 1)
        assert slow.holds(0, row, row)
        if during == before:
            return
    pytest.fail("the lane went on copying")


def test_a_late_record_whose_copy_runs_is_waited_for_and_copied_once(slow):
    slow.prefetch(3)
    slow.until_copying(0)
    slow.step(3)
    words = slow.words()
    assert (words.late, words.claimed, words.demanded, words.used) == (1, 0, 0, 1)
    assert slow.num_landed() == 1
    assert 0.25 * RECORD_SECONDS < words.late_ns / 1e9 <= words.stall_ns / 1e9


def test_a_late_record_is_finished_while_the_same_demand_copies_others(slow):
    slow.prefetch(3)
    slow.until_copying(0)
    assert slow.step(3, 4, 5) < 3.5 * RECORD_SECONDS, "the link carries three records, each once"
    assert (slow.words().late, slow.words().demanded) == (1, 2)


def test_a_late_record_that_has_not_started_is_claimed_and_copied_by_the_demand(slow):
    slow.prefetch(3, 4, 5)
    slow.until_copying(0)
    assert slow.step(5) < 1.5 * RECORD_SECONDS, "neither of the records before it is waited for"
    words = slow.words()
    assert (words.late, words.claimed, words.demanded, words.cancelled, words.prefetched) == (1, 1, 1, 1, 1)
    slow.until_landed(1)
    assert slow.holds(0, 0, 3)


def test_a_prefetch_that_had_time_costs_the_step_nothing(slow):
    slow.prefetch(3, 4)
    time.sleep(2.6 * RECORD_SECONDS)
    assert slow.step(3, 4) < 0.5 * RECORD_SECONDS
    words = slow.words()
    assert (words.hits, words.late, words.used, words.demanded) == (2, 0, 2, 0)


def test_what_is_cancelled_before_it_starts_is_never_copied(slow):
    slow.step(9)
    slow.prefetch(3, 4)
    slow.until_copying(1)
    slow.step(9)
    assert slow.words().cancelled == 1
    slow.until_landed(1)
    time.sleep(0.3 * RECORD_SECONDS)
    assert slow.is_empty(2)
    assert slow.num_landed() == 1


@pytest.mark.parametrize("reuse", ["prefetch", "step"])
def test_a_cancelled_slot_is_free_at_once_though_its_old_entry_is_still_queued(reuse, slow):
    slow.step(9)
    slow.prefetch(3, 4)
    slow.until_copying(1)
    slow.step(9)
    getattr(slow, reuse)(5)  # into the slot of 4
    slow.prefetch(5, 6)  # 6 behind the old entry
    slow.until_landed(3 if reuse == "prefetch" else 2)
    assert slow.holds(0, 2, 5)
    assert slow.holds(0, 3, 6)
    assert slow.words().demanded == (1 if reuse == "prefetch" else 2)


def test_two_layers_share_one_link(make_layers):
    layers = make_layers(slow_link(0.1), 2)
    started = time.perf_counter()
    for number in range(2):
        layers.prefetch(7, 8, number=number)
    layers.until_landed(4)
    assert 0.35 <= time.perf_counter() - started < 0.7, "four records, one after the other"
    assert layers.holds(0, 1, 8)
    assert layers.holds(1, 1, 8)


def test_latency_delays_what_lands_and_occupies_nothing(make_layers):
    layers = make_layers(slow_link(0.01, latency_us=200_000))
    started = time.perf_counter()
    layers.prefetch(*range(8))
    layers.until_landed(8)
    assert 0.28 <= time.perf_counter() - started < 0.8, "8 transfers and one latency, not 8 latencies"


def test_other_python_threads_run_during_a_long_demand(slow):
    ticks = 0
    stop = threading.Event()

    def tick():
        nonlocal ticks
        while not stop.wait(0.002):
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks
    slow.step(0, 1)
    during = ticks - before
    stop.set()
    thread.join()
    assert during > 20, "half a second of it"


def test_a_slow_link_does_not_burn_a_core(slow):
    slow.prefetch(*range(8))
    started, cpu_started = time.perf_counter(), time.process_time()
    time.sleep(4 * RECORD_SECONDS)
    busy = (time.process_time() - cpu_started) / (time.perf_counter() - started)
    assert slow.num_landed() >= 2
    assert busy < 0.3


def test_the_thread_leaves_signals_to_the_main_one(slow):
    slow.prefetch(0)
    tasks, deadline = [], time.monotonic() + 20
    while not tasks:
        assert time.monotonic() < deadline, "no thread of this name"
        tasks = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text() == "vep-prefetch\n"]
    for task in tasks:
        (blocked,) = [line for line in (task / "status").read_text().splitlines() if line.startswith("SigBlk")]
        mask = int(blocked.split()[1], 16)
        assert all(mask >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD))


@pytest.mark.parametrize(("gbps", "chunk_bytes"), [(None, 262_144), (50, 262_144), (0.05, 10_000), (0.001, 1024)])
def test_a_demand_waits_for_a_chunk_of_200_microseconds_at_most_unless_the_link_is_very_slow(gbps, chunk_bytes):
    assert _chunk_for(None if gbps is None else EmulatedLink(gbps, 0)) == chunk_bytes


@pytest.mark.parametrize(
    ("gbps", "latency_us", "chunk_bytes"), [(-1, 0, 1), (float("nan"), 0, 1), (0, 5, 1), (1, -1, 1), (1, 0, -1)]
)
def test_links_and_chunks_that_make_no_sense_are_refused(gbps, latency_us, chunk_bytes):
    with pytest.raises(ValueError):
        HostCaches(host_library(), 1, EmulatedLink(gbps, latency_us), chunk_bytes)


def test_closed_caches_say_so_and_drop_what_is_queued(slow):
    slow.prefetch(*range(12))
    assert seconds_of(slow.caches.close) < 2 * RECORD_SECONDS
    before = slow.words()
    for call in (slow.step, slow.prefetch, lambda _: slow.caches.measure_bandwidth()):
        with pytest.raises(RuntimeError, match="closed"):
            call(1)
    assert slow.words() == before


CHILD = """
    import os, sys, time
    sys.path.insert(0, {folder!r})
    from test_staging_engine import Layers, slow_link
    layers = Layers(slow_link(10.0))
    layers.prefetch(*range(12))
    time.sleep(0.1)
"""


def test_a_process_ends_at_once_with_prefetches_queued():
    assert seconds_of(run_python, CHILD.format(folder=FOLDER)) < 60, "120 seconds of prefetching were queued"


def test_a_forked_child_is_told_and_does_not_hang():
    code = (
        CHILD.replace("10.0", "2.0")
        + """
    child = os.fork()
    if child == 0:
        for call in (layers.step, layers.prefetch, lambda _: layers.caches.measure_bandwidth()):
            try:
                call(1)
                os._exit(1)
            except RuntimeError as error:
                if "fork" not in str(error):
                    os._exit(2)
        layers.caches.close()
        del layers  # ends the engine
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    layers.step(3)
    print(layers.words().used)
    """
    )
    assert run_python(code.format(folder=FOLDER)).split() == ["0", "1"]
