"""The native staging engine: demands first, prefetches in the background, every byte once.

Links are slow here, tens of milliseconds per record, so that what is compared is the link's time and not the machine's.
"""

import random
import threading
import time
from pathlib import Path

import pytest
import torch
from expert_tensors import NUM_EXPERTS, expert_tensors
from processes import run_python

from vllm_expert_prefetch.experts import EmulatedLink, HostMemoryOptions, HostStore, SlotPool, TorchStaging
from vllm_expert_prefetch.experts.native_staging import NativeStaging, SlotState, StagingLane
from vllm_expert_prefetch.native.library import host_library, why_not_host

pytestmark = pytest.mark.skipif(host_library() is None, reason=f"no native library: {why_not_host()}")

FOLDER = str(Path(__file__).parent)
CPU = torch.device("cpu")
ROW_BYTES = 1024
RECORD_BYTES = 2 * ROW_BYTES
CHUNKS = 8  # per record
RECORD_SECONDS = 0.4
"""Longer than a busy machine stands still."""


def make_store(num_experts=16, seed=0):
    """A store whose records are two rows without padding, all bytes random."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_experts, ROW_BYTES)
    rows = {name: torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for name in ("w13", "w2")}
    return HostStore(rows, HostMemoryOptions())


def slow_link(record_seconds=RECORD_SECONDS, latency_us=0.0):
    return EmulatedLink(RECORD_BYTES / record_seconds / 1e9, latency_us)


class Layer:
    """One layer of a lane, and the store and pool to compare."""

    def __init__(self, lane, num_slots=12, seed=0):
        self.store = make_store(seed=seed)
        self.pool = SlotPool(self.store.views, num_slots, CPU)
        self.staging = NativeStaging(self.store, self.pool, lane)

    def holds(self, experts):
        """Whether each slot of `experts` (slot -> expert) holds its expert's record."""
        return all(
            torch.equal(self.pool.tensors[name][slot], view[expert])
            for slot, expert in experts.items()
            for name, view in self.store.views.items()
        )

    def is_empty(self, slot):
        return not any(tensor[slot].any() for tensor in self.pool.tensors.values())


@pytest.fixture
def make_lane():
    """Lanes that are closed when the test ends."""
    lanes = []

    def make(link=None):
        lanes.append(StagingLane(link, RECORD_BYTES // CHUNKS))
        return lanes[-1]

    yield make
    for lane in lanes:
        lane.close()


@pytest.fixture
def slow(make_lane):
    return Layer(make_lane(slow_link()))


@pytest.fixture
def fast(make_lane):
    return Layer(make_lane())


def until(condition, seconds=20):
    deadline = time.perf_counter() + seconds
    while not condition():
        assert time.perf_counter() < deadline, "it did not happen"
        time.sleep(0.0005)


def until_copying(layer, slot):
    until(lambda: layer.staging.state(slot) is not SlotState.QUEUED)
    assert layer.staging.state(slot) is SlotState.COPYING, "this machine stood still for longer than a record takes"


def seconds_of(call, *arguments):
    started = time.perf_counter()
    call(*arguments)
    return time.perf_counter() - started


def counted(layer, *names):
    counters = layer.staging.lane.counters()
    return [counters[name] for name in names]


def test_stages_the_same_bytes_as_torch_and_counts_them_alike(make_lane):
    store = HostStore(expert_tensors(), HostMemoryOptions())
    pools = [SlotPool(store.views, 4, CPU) for _ in range(2)]
    buffers = [SlotPool(store.views, NUM_EXPERTS, CPU) for _ in range(2)]
    stagings = [TorchStaging(store, pools[0], None), NativeStaging(store, pools[1], make_lane())]
    for staging, buffer in zip(stagings, buffers, strict=True):
        staging.fill([(5, 0), (2, 3)])
        staging.stage([(1, 1), (0, 1), (0, 2)])
        staging.stage([])
        staging.stage_stream([(3, 3), (4, 4)], [(0, 1), (5, 0)], buffer)
    for torch_side, native_side in (pools, buffers):
        for name, tensor in torch_side.tensors.items():
            assert torch.equal(native_side.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
    assert stagings[0].total_bytes == stagings[1].total_bytes == 5 * store.record_bytes
    assert stagings[1].total_seconds > 0
    stagings[1].reset_totals()
    assert (stagings[1].total_bytes, stagings[1].total_seconds) == (0, 0.0)


def test_a_lone_demand_lasts_as_long_as_the_link_says(make_lane):
    staging = Layer(make_lane(slow_link(0.01, latency_us=5000))).staging
    lasted = [seconds_of(staging.stage, [(0, 0), (1, 1)]) for _ in range(5)]
    assert 0.025 <= min(lasted) < 0.03


def test_filling_is_neither_counted_nor_slowed(make_lane):
    layer = Layer(make_lane(slow_link(10.0)))
    assert seconds_of(layer.staging.fill, [(3, 0), (4, 1)]) < 5
    assert layer.holds({0: 3})
    assert layer.staging.total_bytes == 0
    assert counted(layer, "demand_bytes", "prefetch_bytes") == [0, 0]


def test_a_prefetch_returns_at_once_and_lands_in_order_of_priority(slow):
    assert seconds_of(slow.staging.prefetch, [(5, 2), (6, 0), (7, 1)]) < RECORD_SECONDS
    assert not any(slow.staging.landed(slot) for slot in (0, 1, 2))
    landed = []
    while len(landed) < 3:
        landed += [slot for slot in (0, 1, 2) if slot not in landed and slow.staging.landed(slot)]
        time.sleep(0.001)
    assert landed == [2, 0, 1]
    assert slow.holds({2: 5, 0: 6, 1: 7})


def test_a_demand_waits_for_one_chunk_of_a_long_queue_at_most(slow):
    slow.staging.prefetch([(expert, expert) for expert in range(10)])
    until_copying(slow, 0)
    lasted = seconds_of(slow.staging.stage, [(15, 10)])
    assert slow.holds({10: 15})
    assert RECORD_SECONDS <= lasted < 1.6 * RECORD_SECONDS
    assert not slow.staging.landed(9)


def test_a_prefetch_yields_to_a_demand_in_the_middle_of_its_record(slow):
    slow.staging.prefetch([(0, 0)])
    until_copying(slow, 0)
    slow.staging.stage([(1, 1), (2, 2)])
    assert slow.staging.state(0) is SlotState.COPYING
    assert counted(slow, "yields", "demand_records") == [1, 2]
    until(lambda: slow.staging.landed(0))
    assert slow.holds({0: 0})


def test_a_late_record_whose_copy_runs_is_waited_for_and_copied_once(slow):
    slow.staging.prefetch([(3, 0)])
    until_copying(slow, 0)
    slow.staging.stage([], late_slots=[0])
    assert slow.staging.landed(0)
    assert slow.holds({0: 3})
    names = ("awaited_records", "claimed_records", "prefetch_bytes", "demand_bytes")
    assert counted(slow, *names) == [1, 0, RECORD_BYTES, 0]
    assert slow.staging.total_late_seconds > 0.25 * RECORD_SECONDS


def test_a_late_record_is_finished_while_the_same_demand_copies_others(slow):
    slow.staging.prefetch([(3, 0)])
    until_copying(slow, 0)
    lasted = seconds_of(slow.staging.stage, [(4, 1), (5, 2)], [0])
    assert slow.holds({0: 3, 1: 4, 2: 5})
    assert all(slow.staging.landed(slot) for slot in (0, 1, 2))
    assert lasted < 3.5 * RECORD_SECONDS, "the link carries three records, each once"


def test_a_late_record_that_has_not_started_is_claimed_and_copied_by_the_demand(slow):
    slow.staging.prefetch([(3, 0), (4, 1), (5, 2)])
    until_copying(slow, 0)
    lasted = seconds_of(slow.staging.stage, [], [2])
    assert slow.holds({2: 5})
    assert lasted < 1.5 * RECORD_SECONDS, "neither of the records before it is waited for"
    until(lambda: slow.staging.landed(1))
    names = ("claimed_records", "prefetch_records", "prefetch_bytes", "demand_bytes")
    assert counted(slow, *names) == [1, 2, 2 * RECORD_BYTES, RECORD_BYTES]


def test_a_prefetch_that_had_time_costs_the_step_nothing(slow):
    slow.staging.prefetch([(3, 0), (4, 1)])
    time.sleep(3 * RECORD_SECONDS)
    assert seconds_of(slow.staging.stage, [], [0, 1]) < 0.5 * RECORD_SECONDS
    assert slow.holds({0: 3, 1: 4})
    assert counted(slow, "demand_bytes") == [0]


def test_what_is_cancelled_before_it_starts_is_never_copied(slow):
    slow.staging.prefetch([(3, 0), (4, 1), (5, 2)])
    until_copying(slow, 0)
    assert slow.staging.cancel([0, 1, 5]) == [1], "0 has started, 5 was never asked for"
    assert slow.staging.state(1) is SlotState.DROPPED
    until(lambda: slow.staging.landed(2))
    assert slow.is_empty(1)
    assert slow.holds({0: 3})
    assert counted(slow, "prefetch_records", "cancelled_records") == [2, 1]


@pytest.mark.parametrize("reuse", ["prefetch", "stage"])
def test_a_cancelled_slot_is_free_at_once_though_its_old_entry_is_still_queued(reuse, slow):
    slow.staging.prefetch([(3, 0), (4, 1)])
    until_copying(slow, 0)
    assert slow.staging.cancel([1]) == [1]
    getattr(slow.staging, reuse)([(9, 1)])
    slow.staging.prefetch([(5, 2)])  # behind the old entry
    until(lambda: slow.staging.landed(2))
    assert slow.staging.landed(1)
    assert slow.holds({1: 9})
    assert counted(slow, "prefetch_records")[0] + counted(slow, "demand_records")[0] == 3


def test_two_layers_share_one_link(make_lane):
    lane = make_lane(slow_link(0.1))
    layers = [Layer(lane, seed=1), Layer(lane, seed=2)]
    started = time.perf_counter()
    for layer in layers:
        layer.staging.prefetch([(7, 0), (8, 1)])
    until(lambda: all(layer.staging.landed(1) for layer in layers))
    assert 0.4 <= time.perf_counter() - started < 0.7, "four records, one after the other"
    assert all(layer.holds({0: 7, 1: 8}) for layer in layers)
    assert [layer.staging.total_bytes for layer in layers] == [0, 0]


def test_latency_delays_what_lands_and_occupies_nothing(make_lane):
    layer = Layer(make_lane(slow_link(0.01, latency_us=200_000)))
    started = time.perf_counter()
    layer.staging.prefetch([(expert, expert) for expert in range(8)])
    until(lambda: layer.staging.landed(7))
    lasted = time.perf_counter() - started
    assert 0.28 <= lasted < 0.8, "8 transfers and one latency, not 8 latencies"


def test_waiting_for_everything_lands_everything(slow):
    slow.staging.prefetch([(3, 0), (4, 1), (5, 2)])
    slow.staging.wait_all()
    assert all(slow.staging.landed(slot) for slot in range(12))
    assert slow.holds({0: 3, 1: 4, 2: 5})


def test_a_streamed_step_waits_for_the_prefetches_into_the_slots_it_keeps(slow):
    buffer = SlotPool(slow.store.views, 16, CPU)
    slow.staging.prefetch([(3, 0)])
    until_copying(slow, 0)
    slow.staging.stage_stream([(5, 5)], [(3, 0)], buffer)
    for name, view in slow.store.views.items():
        assert torch.equal(buffer.tensors[name][3], view[3])
        assert torch.equal(buffer.tensors[name][5], view[5])


def test_the_slot_words_are_the_engines_own(slow):
    words = slow.staging.slot_words()
    assert words.dtype == torch.int32
    assert words.tolist() == [0] * 12
    slow.staging.prefetch([(3, 0), (4, 7)])
    assert words[7] & 7 == SlotState.QUEUED
    slow.staging.wait_all()
    assert (words & 7).tolist() == [SlotState.READY] * 12
    assert words[7] >> 3 == 1, "one use of the slot"


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
    slow.staging.stage([(expert, expert) for expert in range(3)])
    during = ticks - before
    stop.set()
    thread.join()
    assert during > 50, "more than a second of it"


def test_a_slow_link_does_not_burn_a_core(slow):
    slow.staging.prefetch([(expert, expert) for expert in range(8)])
    started, cpu_started = time.perf_counter(), time.process_time()
    time.sleep(4 * RECORD_SECONDS)
    busy = (time.process_time() - cpu_started) / (time.perf_counter() - started)
    assert counted(slow, "prefetch_records")[0] >= 2
    assert busy < 0.3


@pytest.mark.parametrize(
    ("call", "arguments", "message"),
    [
        ("stage", [[(16, 0)]], r"expert 16 is not in 0\.\.15"),
        ("stage", [[(-1, 0)]], r"expert -1 is not in"),
        ("stage", [[(0, 12)]], r"slot 12 is not in 0\.\.11"),
        ("stage", [[(0, 9)], [12]], r"slot 12 is not in"),
        ("stage", [[(0, 3)], [3]], "slot 3 is late and loaded"),
        ("stage", [[(2, 1)]], "expert 2 cannot be loaded into slot 1, which is QUEUED with expert 4"),
        ("stage", [[], [2]], "slot 2 cannot be late: its prefetch was cancelled"),
        ("fill", [[(16, 0)]], r"expert 16 is not in"),
        ("fill", [[(2, 1)]], "slot 1, which is QUEUED"),
        ("prefetch", [[(2, 1)]], "slot 1, which is QUEUED"),
        ("prefetch", [[(2, 5), (3, 5)]], "slot 5 stands twice"),
        ("prefetch", [[(2, -1)]], r"slot -1 is not in"),
        ("cancel", [[12]], r"slot 12 is not in"),
        ("state", [12], r"slot 12 is not in"),
        ("landed", [-1], r"slot -1 is not in"),
    ],
)
def test_bad_input_is_refused_with_the_numbers_and_changes_nothing(call, arguments, message, make_lane):
    layer = Layer(make_lane(slow_link(1000.0)))
    layer.staging.prefetch([(3, 0), (4, 1), (5, 2)])
    until_copying(layer, 0)
    layer.staging.cancel([2])
    before = layer.staging.slot_words().clone()
    with pytest.raises(ValueError, match=message):
        getattr(layer.staging, call)(*arguments)
    assert torch.equal(layer.staging.slot_words(), before)
    assert all(layer.is_empty(slot) for slot in range(1, 12))
    layer.staging.cancel([1])
    assert counted(layer, "demand_records", "cancelled_records") == [0, 2]


@pytest.mark.parametrize(("gbps", "chunk_bytes"), [(None, 262_144), (50, 262_144), (0.05, 10_000), (0.001, 1024)])
def test_a_demand_waits_for_a_chunk_of_200_microseconds_at_most_unless_the_link_is_very_slow(gbps, chunk_bytes):
    assert StagingLane(None if gbps is None else EmulatedLink(gbps, 0)).chunk_bytes == chunk_bytes


@pytest.mark.parametrize(
    ("gbps", "latency_us", "chunk_bytes"), [(-1, 0, 1), (float("nan"), 0, 1), (0, 5, 1), (1, -1, 1), (1, 0, 0)]
)
def test_links_and_chunks_that_make_no_sense_are_refused(gbps, latency_us, chunk_bytes):
    with pytest.raises(ValueError):
        StagingLane(EmulatedLink(gbps, latency_us), chunk_bytes)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (0, 0, "null address"),
        (2, 0, "null address"),
        (4, 0, "rows of 0 bytes"),
        (1, 100, "stride 100 of the store is below the row of 1024 bytes"),
        (3, 2**61, "more than an address space"),
        (2, None, "overlap"),
    ],
)
def test_segments_that_make_no_sense_are_refused(column, value, message, fast):
    lane = fast.staging.lane
    rows = [make_store().views["w13"], torch.zeros(12, ROW_BYTES, dtype=torch.uint8)]
    segment = [rows[0].data_ptr(), RECORD_BYTES, rows[1].data_ptr(), ROW_BYTES, ROW_BYTES]
    segment[column] = segment[0] if value is None else value
    with pytest.raises(ValueError, match=message):
        lane.library.staging_add_layer(lane.engine, torch.tensor([segment]), 16, 12, 0)


def test_a_pool_elsewhere_is_refused(fast):
    pool = SlotPool(fast.store.views, 2, torch.device("meta"))
    with pytest.raises(ValueError, match="CPU tensors, w13 is on meta"):
        NativeStaging(fast.store, pool, fast.staging.lane)


def test_a_closed_lane_says_so(slow):
    slow.staging.prefetch([(expert, expert) for expert in range(12)])
    assert seconds_of(slow.staging.lane.close) < 5 * RECORD_SECONDS, "what is queued is dropped"
    for call, argument in (("stage", [(0, 0)]), ("prefetch", [(0, 0)]), ("landed", 0), ("cancel", [0])):
        with pytest.raises(RuntimeError, match="closed"):
            getattr(slow.staging, call)(argument)


CHILD = """
    import os, sys, time
    sys.path.insert(0, {folder!r})
    from test_staging_engine import Layer, StagingLane, slow_link, RECORD_BYTES
    NUM_SLOTS = 200
    layer = Layer(StagingLane(slow_link(0.5), RECORD_BYTES // 8), NUM_SLOTS)
    layer.staging.prefetch([(expert % 16, expert) for expert in range(NUM_SLOTS)])
    time.sleep(0.1)
"""


def test_a_process_ends_at_once_with_prefetches_queued():
    assert seconds_of(run_python, CHILD.format(folder=FOLDER)) < 60, "100 seconds of prefetching were queued"


def test_a_forked_child_is_told_and_does_not_hang():
    code = (
        CHILD
        + """
    child = os.fork()
    if child == 0:
        for call, argument in (("stage", [(0, 0)]), ("prefetch", []), ("landed", 0), ("wait_all", None)):
            try:
                getattr(layer.staging, call)(*([] if argument is None else [argument]))
                os._exit(1)
            except RuntimeError as error:
                if "fork" not in str(error):
                    os._exit(2)
        layer.staging.lane.close()
        del layer  # ends the engine
        sys.exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    layer.staging.stage([], [0])
    print(layer.holds({{0: 0}}))
    """
    )
    assert run_python(code.format(folder=FOLDER)).split() == ["0", "True"]


class Walk:
    """Random operations on one layer, and what they must leave behind."""

    def __init__(self, layer, seed):
        self.layer, self.staging = layer, layer.staging
        self.random = random.Random(seed)
        self.expected = {}  # slot -> expert, of every slot but dropped ones
        self.num_issued = self.num_cancelled = self.num_loaded = 0

    def in_flight(self):
        busy = (SlotState.QUEUED, SlotState.COPYING)
        return [slot for slot in range(12) if self.staging.state(slot) in busy]

    def some_loads(self, most):
        free = sorted(set(range(12)) - set(self.in_flight()))
        slots = self.random.sample(free, min(len(free), self.random.randint(0, most)))
        loads = [(self.random.randrange(16), slot) for slot in slots]
        self.expected |= {slot: expert for expert, slot in loads}
        return loads

    def prefetch(self):
        loads = self.some_loads(4)
        self.staging.prefetch(loads)
        self.num_issued += len(loads)

    def cancel(self):
        for slot in self.staging.cancel(self.random.sample(range(12), 4)):
            del self.expected[slot]
            self.num_cancelled += 1

    def demand(self):
        loads = self.some_loads(3)
        late = [slot for slot in self.in_flight() if self.random.random() < 0.5]
        self.staging.stage(loads, late)
        self.num_loaded += len(loads)
        self.check([*late, *(slot for _, slot in loads)])

    def check(self, slots):
        for slot in slots:
            assert self.staging.landed(slot)
            assert self.layer.holds({slot: self.expected[slot]})


@pytest.mark.parametrize("link", [None, slow_link(0.0002, latency_us=50)], ids=["no_link", "link"])
def test_a_random_walk_leaves_every_slot_as_it_should_be(make_lane, link):
    lane = make_lane(link)
    walks = [Walk(Layer(lane, seed=seed), seed) for seed in (1, 2)]
    for step in range(10_000 if link is None else 1000):
        walk = walks[step % 2]
        walk.random.choice([walk.prefetch, walk.prefetch, walk.cancel, walk.demand])()
    for walk in walks:
        walk.staging.wait_all()
        walk.check(walk.expected)
    counters = lane.counters()
    issued, cancelled, loaded = (
        sum(getattr(walk, name) for walk in walks) for name in ("num_issued", "num_cancelled", "num_loaded")
    )
    assert counters["cancelled_records"] == cancelled
    assert issued == counters["prefetch_records"] + counters["claimed_records"] + cancelled
    assert counters["demand_records"] == loaded + counters["claimed_records"]
    assert counters["prefetch_bytes"] == counters["prefetch_records"] * RECORD_BYTES
    assert counters["demand_bytes"] == counters["demand_records"] * RECORD_BYTES
    assert counters["demand_bytes"] == sum(walk.staging.total_bytes for walk in walks)
    assert min(issued, cancelled, loaded, counters["prefetch_records"], counters["claimed_records"]) > 0
