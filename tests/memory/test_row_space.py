"""The row space of the CPU platform: slots of one layer alone, overflow rows of all layers, and no byte left behind."""

import errno
import gc
import os
import platform
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from process_memory import PAGE, mapping_at, status_bytes
from processes import run_python, start_python

from vllm_expert_prefetch.memory import row_space as module
from vllm_expert_prefetch.memory.extent import Extent
from vllm_expert_prefetch.memory.row_space import RowSpaceError, SharedRows

NUM_EXPERTS = 8
ROW_BYTES = [1, 100, PAGE - 1, PAGE, PAGE + 904, 3 * PAGE + 8]


def rows_of(num_bytes, num_experts=NUM_EXPERTS):
    return {"w": torch.empty(num_experts, num_bytes, dtype=torch.uint8, device="meta")}


def memfds():
    """Files of row spaces that this process holds open or mapped."""
    names = []
    for path in Path("/proc/self/fd").iterdir():
        try:
            names.append(os.readlink(path))
        except OSError:  # the listing's own
            continue
    return [
        name for name in [*names, *Path("/proc/self/maps").read_text().splitlines()] if "memfd:expert_prefetch" in name
    ]


@pytest.fixture
def nothing_is_left():
    gc.collect()
    before = Counter(memfds())  # those of engines that other tests share
    yield
    gc.collect()
    assert not Counter(memfds()) - before


def test_the_tensors_are_those_of_plain_vllm_and_zero():
    like = {
        "w13": torch.empty(NUM_EXPERTS, 48, 101, dtype=torch.bfloat16),
        "w2": torch.empty(NUM_EXPERTS, 33, 7),
        "scale": torch.empty(NUM_EXPERTS, dtype=torch.float64),
    }
    tensors = SharedRows(like, num_slots=3).row_space(0)
    assert list(tensors) == list(like)
    for name, tensor in tensors.items():
        assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (like[name].shape, like[name].dtype, True)
        assert not tensor.view(torch.uint8).any()


@pytest.mark.parametrize("num_slots", range(1, NUM_EXPERTS + 1))
@pytest.mark.parametrize("num_bytes", ROW_BYTES)
def test_slots_are_a_layers_own_and_whole_pages_behind_them_are_shared(num_bytes, num_slots):
    shared = SharedRows(rows_of(num_bytes), num_slots)
    one, other = (shared.row_space(0)["w"] for _ in range(2))
    one[:num_slots], other[:num_slots] = 1, 2
    one[num_slots:] = 3
    assert (one[:num_slots] == 1).all()
    assert (other[:num_slots] == 2).all()
    private_bytes = -(-num_slots * num_bytes // PAGE) * PAGE
    seen = other.view(-1)[private_bytes:]
    assert (seen == 3).all()
    total = -(-NUM_EXPERTS * num_bytes // PAGE) * PAGE
    assert (shared.num_bytes, shared.private_bytes) == (total - private_bytes, 2 * private_bytes)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (1, 2), (2, 1)])
@pytest.mark.parametrize(("num_slots", "more"), [(1, 2), (3, 3), (2, 7), (3, NUM_EXPERTS)])
@pytest.mark.parametrize("num_bytes", ROW_BYTES)
def test_growing_makes_slots_of_overflow_rows_and_moves_no_row(num_bytes, num_slots, more, before, after):
    """Each tensor and each area keeps what is its own, and what is not needed any more is given back."""
    like = {"w": rows_of(num_bytes)["w"], "v": rows_of(num_bytes)["w"]}
    shared, as_made = SharedRows(like, num_slots, areas=before), SharedRows(like, more, areas=after)
    spaces = [shared.row_space(area) for area in (0, 0, 1)]
    addresses = [space["w"].data_ptr() for space in spaces]
    for space in spaces:
        space["w"].fill_(9), space["v"].fill_(9)
    shared.grow(more, after)
    spaces.append(shared.row_space(1))
    assert [space["w"].data_ptr() for space in spaces[:3]] == addresses
    like_it = [as_made.row_space(area) for area in (0, 0, 1, 1)]
    for number in range(4):
        for name in ("w", "v"):
            for made in (spaces, like_it):
                made[number][name].fill_(10 * number + (name == "v"))
    for space, expected in zip(spaces, like_it, strict=True):
        assert torch.equal(space["w"], expected["w"])
        assert torch.equal(space["v"], expected["v"])
    assert (shared.num_bytes, shared.private_bytes) == (as_made.num_bytes, as_made.private_bytes)
    if shared._file >= 0:
        assert os.fstat(shared._file).st_blocks * 512 <= shared.num_bytes


@pytest.mark.parametrize("num_bytes", ROW_BYTES)
def test_an_overflow_row_holds_what_a_layer_writes_until_another_writes_there(num_bytes):
    """Also the row that begins on a layer's last page of its own."""
    shared = SharedRows(rows_of(num_bytes), num_slots=3)
    for value in range(1, 20):
        tensor = shared.row_space(0)["w"]
        tensor[3:] = value
        assert (tensor[3:] == value).all()


def test_areas_are_apart():
    shared = SharedRows(rows_of(PAGE) | {"scale": torch.empty(NUM_EXPERTS, PAGE)}, num_slots=2, areas=2)
    first, again, second = (shared.row_space(area) for area in (0, 0, 1))
    for name in first:
        first[name].fill_(5)
        assert (again[name][2:] == 5).all()
        assert not second[name].any()
        second[name].fill_(6)
        assert (first[name] == 5).all()
    assert shared.num_bytes == 2 * (6 * PAGE + 6 * 4 * PAGE)


def test_tensors_of_one_layer_do_not_share():
    tensors = SharedRows({"a": torch.empty(NUM_EXPERTS, PAGE), "b": torch.empty(NUM_EXPERTS, PAGE)}, 2).row_space(0)
    tensors["a"].fill_(1)
    tensors["b"].fill_(2)
    assert (tensors["a"] == 1).all()


def forbid_memfd(monkeypatch, code=errno.EPERM):
    def refuse(*_):
        raise PermissionError(code, os.strerror(code))

    monkeypatch.setattr(os, "memfd_create", refuse)


@pytest.mark.parametrize(("num_bytes", "num_slots"), [(PAGE, NUM_EXPERTS), (PAGE // NUM_EXPERTS, 1)])
def test_where_nothing_is_shared_no_file_is_made(monkeypatch, num_bytes, num_slots):
    """A slot for every expert, or all rows of a tensor within a page."""
    forbid_memfd(monkeypatch)
    shared = SharedRows(rows_of(num_bytes), num_slots)
    one, other = (shared.row_space(0)["w"] for _ in range(2))
    one.fill_(1)
    assert not other.any()
    assert shared.num_bytes == 0


@pytest.mark.usefixtures("nothing_is_left")
def test_the_memory_lives_as_long_as_any_tensor_over_it_and_no_longer():
    before = status_bytes("VmSize")
    shared = SharedRows(rows_of(2**25), num_slots=4)
    one, other = (shared.row_space(0)["w"] for _ in range(2))
    last_row = one[-1]
    addresses = [tensor.data_ptr() for tensor in (one, other)]
    del shared, one
    gc.collect()
    last_row.fill_(9)
    assert (other[-1] == 9).all(), "the file is gone before its last mapping"
    del last_row, other
    gc.collect()
    assert [mapping_at(address) for address in addresses] == [None, None]
    assert status_bytes("VmSize") - before < 2**25


def test_a_forbidden_memfd_create_is_an_error_that_names_it_and_the_remedy(monkeypatch):
    forbid_memfd(monkeypatch)
    with pytest.raises(
        RowSpaceError, match=r"memfd_create failed \(Operation not permitted\).*seccomp.*cache_fraction 1"
    ):
        SharedRows(rows_of(PAGE), num_slots=2)


MEMFD_CREATE = {"x86_64": 319, "aarch64": 279}.get(platform.machine())


@pytest.mark.skipif(MEMFD_CREATE is None, reason="the number of memfd_create is not known here")
def test_a_seccomp_profile_without_memfd_create_is_named():
    output = run_python(f"""
        import ctypes, struct, torch
        from vllm_expert_prefetch.memory.row_space import RowSpaceError, SharedRows
        libc = ctypes.CDLL(None, use_errno=True)
        # Load the number of the system call; memfd_create: EPERM, all others: allowed.
        steps = [(0x20, 0, 0, 0), (0x15, 0, 1, {MEMFD_CREATE}), (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
        program = ctypes.create_string_buffer(struct.pack("HP", len(steps), ctypes.addressof(code)))
        assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
        if libc.prctl(22, 2, program, 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
            print("no seccomp here")
        else:
            try:
                SharedRows({{"w": torch.empty(8, 4096)}}, 2)
            except RowSpaceError as error:
                print(error)
    """)
    if "no seccomp" in output:
        pytest.skip("this kernel does not let a process filter its system calls")
    assert "memfd_create failed (Operation not permitted)" in output


@pytest.mark.usefixtures("nothing_is_left")
def test_no_room_for_the_file_is_an_error_with_the_size(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    with pytest.raises(RowSpaceError, match=f"no {6 * PAGE} bytes for overflow rows: No space left on device"):
        SharedRows(rows_of(PAGE), num_slots=2)


@pytest.mark.usefixtures("nothing_is_left")
@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_mapping_that_is_refused_is_an_error_and_leaves_nothing_mapped(monkeypatch, call):
    before = status_bytes("VmSize")
    calls = 0

    class Refusing:
        munmap = module._libc.munmap

        def mmap(self, *arguments):
            nonlocal calls
            calls += 1
            return mapped(*arguments) if calls < call else module._FAILED

    mapped = module._libc.mmap
    monkeypatch.setattr(module, "_libc", Refusing())
    shared = SharedRows(rows_of(2**25), num_slots=2)
    with pytest.raises(RowSpaceError, match=r"cannot map \d+ bytes for expert rows: .*vm.max_map_count"):
        shared.row_space(0)
    assert status_bytes("VmSize") - before < 2**25


def test_a_killed_process_leaves_nothing():
    process = start_python("""
        import torch
        from vllm_expert_prefetch.memory.row_space import SharedRows
        shared = SharedRows({"w": torch.empty(8, 1 << 20)}, 2)
        spaces = [shared.row_space(0) for _ in range(3)]
        for space in spaces:
            space["w"].fill_(1)
        print("ready", flush=True)
        input()
    """)
    assert process.stdout.readline() == "ready\n"
    maps = [line.split(maxsplit=5) for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines()]
    shared = {fields[5] for fields in maps if fields[1] == "rw-s"}
    assert shared == {"/memfd:expert_prefetch (deleted)"}, "what has no name cannot stay behind"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not [path for path in Path("/dev/shm").iterdir() if "expert_prefetch" in path.name]


@pytest.mark.parametrize(
    ("row_bytes", "num_experts", "num_slots", "expected"),
    [
        (4096, 8, 3, (3 * 4096, 5 * 4096)),
        (5000, 8, 3, (4 * 4096, 6 * 4096)),  # 15000 and 40000 bytes
        (100, 8, 3, (4096, 0)),
        (100, 128, 3, (4096, 3 * 4096)),
        (5000, 8, 8, (10 * 4096, 0)),
    ],
)
def test_the_extent_of_a_tensor(row_bytes, num_experts, num_slots, expected):
    assert Extent.of(row_bytes, num_experts, num_slots, page=4096) == expected
