"""The shared host store: who finds whose memory, who is refused, and what is left by those that are killed."""

import os
import re
import shutil
import signal
import threading
import time
import uuid
from functools import partial
from pathlib import Path

import pytest
import torch
from expert_tensors import NUM_EXPERTS, bits, expert_tensors
from process_memory import mapping_at
from processes import start_python

import vllm_expert_prefetch.memory.host_memory as host_memory
from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.memory.shared_store import SharedStore, check_store, remove_dead_stores

CHECKPOINT = {"model": "/models/one", "dtype": "bfloat16"}
MEMBER = """
import time
from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions
from vllm_expert_prefetch.memory.shared_store import SharedStore
member = SharedStore({name!r}, {checkpoint}, "rank0of1")
def fill(memory):
    memory.bytes.fill_(7)
    {amid}
kept = member.take("l0", "", {size}, HostMemoryOptions(), fill, lambda memory: None)
print(member.num_found, flush=True)
input()
"""


@pytest.fixture
def name():
    """Of a store that nobody else has; its folder is gone afterwards."""
    name = uuid.uuid4().hex
    yield name
    shutil.rmtree(folder_of(name), ignore_errors=True)


def folder_of(name):
    return Path(f"/dev/shm/expert-prefetch-store-{os.getuid()}-{name}")


def join(name, checkpoint=CHECKPOINT, rank="rank0of1"):
    return SharedStore(name, checkpoint, rank)


def store_in(member, tensors, layer="layers.0", options=None):
    return HostStore(tensors, options or HostMemoryOptions(), take_shared=partial(member.take, layer))


def take(member, value, layer="l0", size=4096, options=None):
    """Memory full of `value`."""
    return member.take(
        layer,
        "",
        size,
        options or HostMemoryOptions(),
        lambda memory: memory.bytes.fill_(value),
        lambda memory: None if (memory.bytes == value).all() else "a byte",
    )


def started(name, size=4096, amid="pass"):
    return start_python(MEMBER.format(name=name, checkpoint=CHECKPOINT, size=size, amid=amid))


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


def inode_of(memory):
    """Of the file behind it."""
    address = memory.bytes.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(text, 16) for text in line.split()[0].split("-"))
        if start <= address < end:
            return int(line.split()[4])
    raise AssertionError("it is not mapped")


def counts(member):
    return member.num_found, member.num_made


def test_a_second_member_maps_the_memory_of_the_first_and_every_record_has_its_bits(name):
    one, other = join(name), join(name)
    tensors = expert_tensors()
    stores = [store_in(one, tensors), store_in(other, expert_tensors())]
    assert (counts(one), counts(other)) == ((0, 1), (1, 0))
    assert inode_of(stores[0].memory) == inode_of(stores[1].memory) != 0
    for store in stores:
        assert store.num_bytes == NUM_EXPERTS * store.record_bytes
        for key, tensor in tensors.items():
            assert torch.equal(bits(store.views[key]), bits(tensor))
            assert store.views[key].shape == tensor.shape


def test_nobody_can_write_to_it(name):
    member = join(name)
    memory = take(member, 7)
    assert "wr" not in mapping_at(memory.bytes.data_ptr())["VmFlags"].split()
    (link,) = (path for path in folder_of(name).glob("member-*/*") if path.is_symlink())
    file = os.open(link, os.O_RDWR)
    with pytest.raises(PermissionError):
        os.write(file, b"x")
    os.close(file)


def test_another_process_finds_it_as_long_as_anybody_has_it(name):
    with started(name) as one:
        assert one.stdout.readline() == "0\n"
        second = join(name)
        memory = take(second, 7)
        assert counts(second) == (1, 0)
        kill(one)
        assert (memory.bytes == 7).all()
        third = join(name)
        take(third, 7)
        assert counts(third) == (1, 0), "it is still the second member's"


def test_memory_that_its_layer_no_longer_needs_is_not_found_any_more(name):
    one, other = join(name), join(name)
    memory = take(one, 7)
    last = memory.bytes[:2]
    del memory
    take(other, 8)
    assert counts(other) == (0, 1)
    assert last.tolist() == [7, 7]


def test_the_folder_goes_with_the_last_member(name):
    one, other = join(name), join(name)
    assert folder_of(name).stat().st_mode & 0o777 == 0o700
    del one
    assert folder_of(name).is_dir()
    del other
    assert not folder_of(name).exists()


def test_processes_that_were_killed_leave_no_memory_and_the_next_member_removes_the_rest(name):
    def shared_bytes():
        return 1024 * int(re.search(r"^Shmem:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)[1])

    size = 512 << 20
    with started(name, size) as one, started(name, size) as other:
        assert sorted(process.stdout.readline() for process in (one, other)) == ["0\n", "1\n"]
        before = shared_bytes()
        kill(one)
        kill(other)
        assert before - shared_bytes() > 0.8 * size
    assert len(list(folder_of(name).glob("member-*"))) == 2
    member = join(name, {"model": "/models/other"})
    assert len(list(folder_of(name).glob("member-*"))) == 1
    take(member, 9)
    assert counts(member) == (0, 1)


def test_a_server_removes_what_killed_members_of_any_store_have_left_and_nothing_else(name):
    other, open_to_all = f"{name}-other", f"{name}-open"
    member = join(other)
    folder_of(open_to_all).mkdir(mode=0o755)
    with started(name) as killed:
        assert killed.stdout.readline() == "0\n"
        remove_dead_stores()
        assert folder_of(name).exists(), "its member lives"
        kill(killed)
    remove_dead_stores()
    assert [folder_of(store).exists() for store in (name, other, open_to_all)] == [False, True, True]
    folder_of(open_to_all).rmdir()
    take(member, 7)


def test_who_waits_for_a_process_that_is_killed_amid_filling_goes_on(name):
    with started(name, amid="print('filling', flush=True); time.sleep(600)") as filler:
        assert filler.stdout.readline() == "filling\n"
        member, done = join(name), []
        waiting = threading.Thread(target=lambda: done.append(take(member, 9)))
        waiting.start()
        time.sleep(0.3)
        assert not done, "it did not wait"
        kill(filler)
        waiting.join(30)
        assert (done[0].bytes == 9).all()
        assert counts(member) == (0, 1)


def test_members_that_fill_memory_of_other_ranks_do_not_wait(name):
    with started(name, amid="print('filling', flush=True); time.sleep(600)") as filler:
        assert filler.stdout.readline() == "filling\n"
        member = join(name, rank="rank1of2")
        take(member, 9)
        assert counts(member) == (0, 1)
        kill(filler)


@pytest.mark.parametrize("what", ["rank", "layer", "node", "layout"])
def test_memory_for_something_else_is_not_shared(name, what, monkeypatch):
    monkeypatch.setattr(host_memory, "_place_on_node", lambda *_: None)
    one, other = join(name), join(name, rank="rank0of2" if what == "rank" else "rank0of1")
    bind = HostMemoryOptions(numa_node=0) if what == "node" else HostMemoryOptions()
    tensors = expert_tensors()
    stores = [store_in(one, tensors)]
    if what == "layout":
        tensors["code"] = tensors["code"].view(torch.uint8)
    stores.append(store_in(other, tensors, "layers.1" if what == "layer" else "layers.0", bind))
    assert counts(other) == (0, 1)
    assert inode_of(stores[0].memory) != inode_of(stores[1].memory)


def test_a_node_that_is_only_preferred_hinders_nobody(name, monkeypatch):
    placed = []
    monkeypatch.setattr(host_memory, "_place_on_node", lambda address, size, node, mode: placed.append(node))
    one, other = join(name), join(name)
    kept = [
        take(member, 7, options=HostMemoryOptions(numa_node=node, must_bind=False))
        for member, node in [(one, 0), (other, 1)]
    ]
    assert counts(other) == (1, 0)
    assert placed == [0], "who fills memory decides where it lies"
    assert len(kept) == 2


def test_other_weights_are_refused_with_the_tensor_the_layer_and_the_remedy(name):
    one, other = join(name), join(name)
    store = store_in(one, expert_tensors())
    wrong = expert_tensors()
    wrong["w2"].view(torch.uint8)[3].view(-1)[-1] ^= 1
    message = rf"{name} holds other weights .* w2 of expert 3 of layers.0 .*name of its own"
    with pytest.raises(ConfigError, match=message):
        store_in(other, wrong)
    assert store.views
    assert counts(other) == (0, 0)


def test_another_checkpoint_is_refused_by_name_while_the_first_is_there(name):
    other = CHECKPOINT | {"model": "/models/two"}
    member = join(name)
    for refused in (lambda: check_store(name, other), lambda: join(name, other)):
        with pytest.raises(ConfigError, match=rf"{name} holds .* /models/one, .* /models/two, .*name of its own"):
            refused()
    check_store(name, CHECKPOINT)
    del member
    check_store(name, other)
    assert join(name, other)


def test_a_folder_that_others_may_enter_is_refused_with_the_remedy(name):
    folder_of(name).mkdir(mode=0o755)
    for refused in (lambda: check_store(name, CHECKPOINT), lambda: join(name)):
        with pytest.raises(ConfigError, match=r"this user alone may enter. Remove it"):
            refused()


def test_memory_is_page_locked_by_every_member_and_its_notes_are_those_of_who_filled_it(name, monkeypatch):
    locked = []
    monkeypatch.setattr(host_memory, "_lock", lambda memory, size: locked.append(size))

    def refuse(mapping, is_shared):
        raise ConfigError("no huge pages")

    monkeypatch.setattr(host_memory, "_advise_huge_pages", refuse)
    options = HostMemoryOptions(pin=True, huge_pages=True, must_have_huge_pages=False)
    one, other = join(name), join(name)
    memories = [take(one, 7, options=options), take(other, 7, options=options)]
    assert [memory.is_pinned for memory in memories] == [True, True]
    assert locked == [4096, 4096]
    assert [memory.notes for memory in memories] == [["no huge pages"], []]


def test_a_gpu_is_told_that_it_is_read_only(name, monkeypatch):
    calls = []

    class Runtime:
        def cudaHostRegister(self, address, num_bytes, flags):
            calls.append(flags)
            return 801 if len(calls) > 1 else 0

        def cudaHostUnregister(self, address):
            pass

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    member = join(name)
    assert take(member, 7, options=HostMemoryOptions(pin=True, cuda=True)).is_pinned
    assert calls == [1 | 2 | 8]  # portable, mapped, read-only
    with pytest.raises(ConfigError, match=r"returned 801: for read-only memory.*shared_store off"):
        take(member, 7, "l1", options=HostMemoryOptions(pin=True, cuda=True))


def test_memory_of_a_file_is_seen_by_who_maps_it_as_well():
    file = os.memfd_create("test")
    os.ftruncate(file, 4096)
    one, other = (HostMemory(4096, HostMemoryOptions(), file) for _ in range(2))
    one.bytes.fill_(3)
    assert (other.bytes == 3).all()
    os.close(file)


def test_memory_that_is_given_back_leaves_no_link(name):
    member = join(name)
    memory = take(member, 1)
    links = folder_of(name).glob
    assert len([*links("member-*/*")]) == 2, "what checkpoint it is of, and the memory"
    del memory
    assert len([*links("member-*/*")]) == 1
