"""The worker's side: a small private file that other processes read while it is written."""

import gc
import os
import shutil
import stat
import sys

import pytest
from counter_files import INFO, Worker, labels, make_counters
from processes import run_python

from vllm_expert_prefetch.locks import is_locked
from vllm_expert_prefetch.metrics.counters import HEADER_BYTES, SUFFIX, Counters, layer_index, read_counters
from vllm_expert_prefetch.metrics.definitions import INDEX, LAYER_INDEX, LAYER_SERIES, SERIES

HIT = "lookups_total/hit"


def values_of(path):
    snapshot = read_counters(path)
    return {series: snapshot.value(series) for series in SERIES}


def test_the_file_is_private_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        counters = make_counters(tmp_path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(counters.path.stat().st_mode) == 0o600


def test_a_reader_gets_labels_info_and_values(tmp_path):
    counters = make_counters(tmp_path, rank="3")
    counters.set("slots", 48)
    snapshot = read_counters(counters.path)
    assert (snapshot.labels, snapshot.info) == (labels("3"), INFO)
    assert values_of(counters.path) == {**dict.fromkeys(SERIES, 0.0), "slots": 48.0}


def test_layers_are_counted_apart_and_only_when_named(tmp_path):
    counters = make_counters(tmp_path, layers=("0", "3"))
    for layer in range(2):
        for series in LAYER_SERIES:
            counters.add(layer_index(layer, series), 1 + 100 * layer + LAYER_INDEX[series])
    snapshot = read_counters(counters.path)
    assert snapshot.layers == ["0", "3"]
    for layer in range(2):
        for series in LAYER_SERIES:
            assert snapshot.value(series, layer) == 1 + 100 * layer + LAYER_INDEX[series]
    assert set(values_of(counters.path).values()) == {0.0}
    without = make_counters(tmp_path, "engine0-rank1-000000")
    assert len(read_counters(without.path).values) == len(SERIES)


def test_every_series_has_a_place_of_its_own(tmp_path):
    counters = make_counters(tmp_path)
    for series in SERIES:
        counters.add(INDEX[series], 1 + INDEX[series])
    assert values_of(counters.path) == {series: 1.0 + index for index, series in enumerate(SERIES)}


def test_add_adds_and_set_sets(tmp_path):
    counters = make_counters(tmp_path)
    counters.add(INDEX[HIT], 2)
    counters.add(INDEX[HIT], 0.5)
    counters.set("slots", 4)
    counters.set("slots", 3)
    assert (counters.get(HIT), counters.get("slots")) == (2.5, 3.0)
    assert (values_of(counters.path)[HIT], values_of(counters.path)["slots"]) == (2.5, 3.0)


def test_another_process_sees_every_addition_at_once(tmp_path):
    with Worker(tmp_path) as worker:
        (path,) = tmp_path.glob(f"*{SUFFIX}")
        for expected in (1.0, 2.0, 3.0):
            worker.add(HIT, 1)
            assert values_of(path)[HIT] == expected


def test_nothing_temporary_is_left(tmp_path):
    counters = make_counters(tmp_path)
    assert list(tmp_path.iterdir()) == [counters.path]


def test_where_there_is_no_space_left_the_file_is_named_and_nothing_stays(tmp_path):
    """Not found by the first write to the mapping: that would be SIGBUS, and the end of the server."""
    output = run_python(f"""
        import errno, os
        from pathlib import Path
        from counter_files import make_counters
        kept = make_counters(Path({str(tmp_path)!r}), rank="1", stem="kept")
        kept.path.unlink()
        def full(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate = full
        for attempt in (lambda: make_counters(Path({str(tmp_path)!r})), kept.keep):
            try:
                attempt()
            except OSError as error:
                print(error)
        kept.add(0, 1)
        print(list(Path({str(tmp_path)!r}).iterdir()))
    """)
    first, second, left = output.splitlines()
    assert first.startswith(f"{tmp_path}/engine0-rank0-000000{SUFFIX}: No space left on device")
    assert second.startswith(f"{tmp_path}/kept{SUFFIX}: No space left on device")
    assert left == "[]"


def test_a_header_that_is_too_long_is_refused_and_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match=rf"metrics header of \d+ bytes exceeds {HEADER_BYTES - 4}"):
        Counters(tmp_path / f"a{SUFFIX}", labels(model_name="m" * HEADER_BYTES), INFO)
    assert list(tmp_path.iterdir()) == []


def test_a_header_that_just_fits_is_read_back_whole(tmp_path):
    def refused(length):
        try:
            Counters(tmp_path / f"{length}{SUFFIX}", labels(model_name="m" * length), INFO)
        except ValueError:
            return True
        return False

    longest = next(length for length in range(HEADER_BYTES, 0, -1) if not refused(length))
    counters = Counters(tmp_path / f"longest{SUFFIX}", labels(model_name="m" * longest), INFO)
    counters.add(0, 1)
    assert int.from_bytes(counters.path.read_bytes()[:4], "little") == HEADER_BYTES - 4, "room is wasted"
    snapshot = read_counters(counters.path)
    assert (snapshot.labels["model_name"], snapshot.info, snapshot.values[0]) == ("m" * longest, INFO, 1.0)


def test_the_file_and_its_descriptors_go_with_the_counters(tmp_path):
    gc.collect()
    before = os.listdir("/proc/self/fd")
    counters = make_counters(tmp_path)
    del counters
    gc.collect()
    assert list(tmp_path.iterdir()) == []
    assert os.listdir("/proc/self/fd") == before


def test_the_file_goes_when_its_process_ends_and_not_when_a_forked_child_does(tmp_path):
    output = run_python(f"""
        import os, sys
        from pathlib import Path
        from counter_files import make_counters
        counters = make_counters(Path({str(tmp_path)!r}))
        child = os.fork()
        if child == 0:
            sys.exit(0)
        os.waitpid(child, 0)
        print(counters.path.exists())
    """)
    assert output.strip() == "True"
    assert list(tmp_path.iterdir()) == []


def test_counters_end_in_silence_when_their_folder_has_become_a_file(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    counters = make_counters(folder)
    shutil.rmtree(folder)
    folder.touch()
    with pytest.MonkeyPatch.context() as patch:
        unraisable = []
        patch.setattr(sys, "unraisablehook", unraisable.append)
        del counters
        gc.collect()
    assert unraisable == []


def test_a_file_that_was_removed_is_written_anew_with_what_it_held(tmp_path):
    """Something cleans temporary folders, while the worker goes on."""
    folder = tmp_path / "runtime"
    folder.mkdir(mode=0o700)
    counters = make_counters(folder, rank="3", layers=("0", "3"))
    counters.add(INDEX[HIT], 5)
    counters.add(layer_index(1, LAYER_SERIES[0]), 7)
    assert not counters.keep()
    shutil.rmtree(folder)
    assert counters.keep()
    counters.add(INDEX[HIT], 1)
    snapshot = read_counters(counters.path)
    assert (snapshot.labels, snapshot.layers, snapshot.value(HIT)) == (labels("3"), ["0", "3"], 6)
    assert snapshot.value(LAYER_SERIES[0], 1) == 7
    assert is_locked(counters.path)
    assert is_locked(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
