"""Host memory: its exact size, how it is placed, and what it says when it cannot be."""

import ctypes
import gc
import mmap
import platform
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from process_memory import PAGE, has_numa_calls, mapping_at, numa_policy_at, status_bytes
from processes import run_python

import vllm_expert_prefetch.memory.host_memory as module
from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.memory.host_memory import (
    HostMemory,
    HostMemoryOptions,
    _advise_huge_pages,
    check_can_lock,
    check_huge_pages,
    host_memory_options,
    memlock_limit_bytes,
    numa_node_of_gpu,
)

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
PINNED_BYTES = 4 * PAGE + 100
"""Five pages, which a power of two would round up to eight."""
SMALL_LIMIT_BYTES = 60_000
"""Just below what unprivileged processes may lock on older systems."""
LIMIT_BYTES = memlock_limit_bytes()

needs_numa = pytest.mark.skipif(not has_numa_calls(), reason="no NUMA system calls here")
needs_memlock = pytest.mark.skipif(
    LIMIT_BYTES is not None and LIMIT_BYTES < SMALL_LIMIT_BYTES, reason=f"only {LIMIT_BYTES} bytes can be locked here"
)


class FakeCudaRuntime:
    """Stands in for torch.cuda.cudart(): notes what is asked and whether the memory still exists then."""

    def __init__(self, status=0):
        self.status = status
        self.calls = []

    def cudaHostRegister(self, address, num_bytes, flags):
        self.calls.append(("register", address, num_bytes, flags))
        return self.status

    def cudaHostUnregister(self, address):
        self.calls.append(("unregister", address, mapping_at(address) is not None))


@pytest.mark.parametrize("num_bytes", [1, 1000, PAGE, PAGE + 1])
def test_the_tensor_has_exactly_the_bytes_asked_for_and_they_are_zero(num_bytes):
    memory = HostMemory(num_bytes, HostMemoryOptions())
    assert memory.num_bytes == memory.bytes.numel() == num_bytes
    assert memory.bytes.dtype == torch.uint8
    assert memory.bytes.device.type == "cpu"
    assert not memory.bytes.any()


def test_the_mapping_is_not_rounded_up():
    num_bytes = 513 * 2**20  # a power of two would be 1 GiB
    memory = HostMemory(num_bytes, HostMemoryOptions())
    size = int(mapping_at(memory.bytes.data_ptr())["Size"].split()[0]) * 1024
    assert num_bytes <= size < num_bytes * 1.2
    assert memory.bytes.numel() == num_bytes


@needs_memlock
def test_exactly_the_pages_asked_for_are_locked_and_no_longer_than_needed():
    before = status_bytes("VmLck")
    memory = HostMemory(PINNED_BYTES, HostMemoryOptions(pin=True))
    assert status_bytes("VmLck") - before == 5 * PAGE
    del memory
    gc.collect()
    assert status_bytes("VmLck") == before


def test_nothing_is_locked_unless_asked():
    before = status_bytes("VmLck")
    memory = HostMemory(PINNED_BYTES, HostMemoryOptions())
    memory.bytes.fill_(1)
    assert status_bytes("VmLck") == before


@pytest.mark.parametrize(("pin", "on_gpu", "pins"), [("auto", True, True), ("auto", False, False), ("on", False, True)])
def test_the_host_store_is_page_locked_on_every_gpu(pin, on_gpu, pins):
    options = host_memory_options(ExpertPrefetchConfig(pin_memory=pin, numa_node=0), on_gpu)
    assert (options.pin, options.cuda) == (pins, on_gpu)


@needs_memlock
def test_a_memlock_limit_that_is_too_small_is_an_error_that_names_it_and_the_remedy():
    output = run_python(f"""
        from process_memory import obey_memlock_limit
        from vllm_expert_prefetch.config import ConfigError
        from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions
        obey_memlock_limit({SMALL_LIMIT_BYTES})
        HostMemory({PINNED_BYTES}, HostMemoryOptions(pin=True))
        try:
            HostMemory(3_000_000, HostMemoryOptions(pin=True))
        except ConfigError as error:
            print(error)
    """)
    assert "cannot page-lock 3.0 MB" in output
    assert "memlock limit 0.1 MB" in output
    assert "ulimit -l unlimited" in output
    assert "set pin_memory to off" in output


def test_the_memory_lives_as_long_as_any_tensor_over_it_and_no_longer():
    memory = HostMemory(256 * 2**20, HostMemoryOptions())
    memory.bytes[-1] = 7
    last = memory.bytes[-4:]
    address = last.data_ptr()
    del memory
    gc.collect()
    assert last.tolist() == [0, 0, 0, 7]
    del last
    gc.collect()
    assert mapping_at(address) is None


def test_pinning_for_a_gpu_registers_exactly_the_mapping_and_unregisters_it_before_it_goes(monkeypatch):
    runtime = FakeCudaRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    memory = HostMemory(PINNED_BYTES, HostMemoryOptions(pin=True, cuda=True))
    address = memory.bytes.data_ptr()
    assert runtime.calls == [("register", address, PINNED_BYTES, 3)]  # portable, mapped
    row = memory.bytes.detach()[3:5]  # shares nothing with `bytes` but the memory
    del memory
    gc.collect()
    assert len(runtime.calls) == 1, "unregistered under a living tensor"
    del row
    gc.collect()
    assert runtime.calls[1:] == [("unregister", address, True)]


def test_a_refused_registration_is_an_error_that_names_the_limit_and_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeCudaRuntime(status=2))
    with pytest.raises(ConfigError, match=r"cannot page-lock 5\.0 MB.*returned 2; memlock limit .*fewer bits") as error:
        HostMemory(5_000_000, HostMemoryOptions(pin=True, cuda=True))
    assert "pin_memory" not in str(error.value), "a GPU cannot do without"


def test_memory_that_need_not_be_bound_is_used_as_it_is_and_says_why(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syscall=lambda *_: -1))
    memory = HostMemory(PAGE, HostMemoryOptions(numa_node=0, must_bind=False))
    assert len(memory.notes) == 1
    assert "numa_node 0" in memory.notes[0]


def test_large_memory_is_there_before_anybody_writes_to_it():
    before = status_bytes("RssAnon")
    memory = HostMemory(200 * 2**20 + 5, HostMemoryOptions())
    if status_bytes("RssAnon") == before:
        pytest.skip("this kernel does not populate pages on request")
    assert status_bytes("RssAnon") - before >= 200 * 2**20
    assert not memory.bytes.any()


@pytest.mark.parametrize(("text", "node"), [("1\n", 1), ("-1\n", None), ("?\n", None), (None, None)])
def test_the_numa_node_of_a_gpu_is_the_one_that_the_system_names(monkeypatch, text, node):
    asked = []

    def read_text(path):
        asked.append(str(path))
        if text is None:
            raise FileNotFoundError(path)
        return text

    gpu = SimpleNamespace(pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert numa_node_of_gpu(0) == node
    assert asked == ["/sys/bus/pci/devices/0000:c1:00.0/numa_node"]


@needs_numa
def test_numa_node_binds_the_mapping_to_that_node():
    memory = HostMemory(16 * PAGE, HostMemoryOptions(numa_node=0))
    memory.bytes.fill_(3)
    assert int(memory.bytes.sum()) == 3 * 16 * PAGE
    assert numa_policy_at(memory.bytes.data_ptr()) in ("bind:0", "bind=static:0", None)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="numa_node is refused here")
@pytest.mark.parametrize("node", [0, 1, 63, 64, 130])
@pytest.mark.parametrize("must", [True, False])
def test_the_kernel_is_asked_for_exactly_that_node_or_for_it_first(monkeypatch, node, must):
    """A store larger than a node's memory must not end in the kernel's out-of-memory killer while others have room."""
    asked = []

    def syscall(number, address, num_bytes, mode, mask, num_bits, flags):
        asked.append((mode, [bit for bit in range(num_bits.value) if mask[bit // 64] >> bit % 64 & 1]))
        return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syscall=syscall))
    HostMemory(PAGE, HostMemoryOptions(numa_node=node, must_bind=must))
    preferred, bind = 1, 2
    assert asked == [(bind if must else preferred, [node])]


@needs_numa
@pytest.mark.parametrize("node", [900, 5000])
def test_a_numa_node_that_does_not_exist_is_refused_by_name_with_those_that_do(node):
    online = Path("/sys/devices/system/node/online")
    there_are = f"Nodes here: {online.read_text().strip()}" if online.exists() else "This machine shows no NUMA nodes"
    with pytest.raises(ConfigError, match=rf"numa_node {node}: .*{re.escape(there_are)}"):
        HostMemory(PAGE, HostMemoryOptions(numa_node=node))


@pytest.mark.skipif(not THP.exists(), reason="this kernel has no transparent huge pages")
@pytest.mark.parametrize("asked", [True, False])
def test_huge_pages_are_advised_exactly_when_asked_for(asked):
    if "[never]" in THP.read_text():
        pytest.skip("this kernel gives no transparent huge pages")
    memory = HostMemory(8 * 2**20, HostMemoryOptions(huge_pages=asked))
    mapping = mapping_at(memory.bytes.data_ptr())
    assert ("hg" in mapping["VmFlags"].split()) == asked


def test_refused_huge_pages_are_an_error_that_names_the_key_and_the_remedy():
    class Refusing:
        def madvise(self, advice):
            assert advice == mmap.MADV_HUGEPAGE
            raise OSError(22, "Invalid argument")

    with pytest.raises(ConfigError, match=r"refuses transparent huge pages .*; set huge_pages to off"):
        _advise_huge_pages(Refusing(), False)


@pytest.mark.parametrize(
    ("of_this_size", "of_all", "is_refused"),
    [
        (None, "always [madvise] never", False),
        (None, "always madvise [never]", True),
        (None, "always within_size advise never [deny] force", True),
        ("always [inherit] madvise never", "always madvise [never]", True),
        ("always inherit [madvise] never", "always madvise [never]", False),
        ("always inherit madvise [never]", "[always] madvise never", True),
        (None, None, False),
        (None, "what a later kernel says", False),
    ],
)
@pytest.mark.parametrize("is_shared", [False, True])
def test_a_kernel_that_gives_no_huge_pages_is_known_by_its_files(tmp_path, is_shared, of_this_size, of_all, is_refused):
    name = "shmem_enabled" if is_shared else "enabled"
    (tmp_path / "hugepages-2048kB").mkdir()
    for folder, text in (("hugepages-2048kB", of_this_size), ("", of_all)):
        if text is not None:
            (tmp_path / folder / name).write_text(text + "\n")
    if is_refused:
        with pytest.raises(ConfigError, match=rf"huge_pages: {tmp_path}/.*{name} is set to .*huge_pages to off"):
            check_huge_pages(is_shared, tmp_path)
    else:
        check_huge_pages(is_shared, tmp_path)


@pytest.mark.parametrize("is_file", [False, True])
def test_memory_of_a_file_is_judged_by_the_setting_for_files(monkeypatch, is_file):
    asked = []
    monkeypatch.setattr(module, "check_huge_pages", asked.append)
    options = HostMemoryOptions(huge_pages=True, must_have_huge_pages=False)
    with tempfile.TemporaryFile() as file:
        file.truncate(PAGE)
        HostMemory(PAGE, options, file.fileno() if is_file else None)
    assert asked == [is_file]


def test_huge_pages_that_need_not_be_are_done_without_and_it_says_why(monkeypatch):
    def refuse(mapping, is_shared):
        raise ConfigError("the kernel refuses transparent huge pages")

    monkeypatch.setattr(module, "_advise_huge_pages", refuse)
    memory = HostMemory(PAGE, HostMemoryOptions(huge_pages=True, must_have_huge_pages=False))
    assert memory.notes == ["the kernel refuses transparent huge pages"]
    with pytest.raises(ConfigError):
        HostMemory(PAGE, HostMemoryOptions(huge_pages=True))


@pytest.mark.parametrize(
    ("limit", "capabilities", "fits"),
    [(None, 0, True), (10_000, 0, True), (9_999, 0, False), (9_999, 1 << 14, True), (9_999, 1 << 13, False)],
)
def test_what_cannot_be_locked_is_known_before_it_is_there(monkeypatch, limit, capabilities, fits):
    monkeypatch.setattr(module, "memlock_limit_bytes", lambda: limit)
    monkeypatch.setattr(Path, "read_text", lambda path: f"Name:\tx\nCapEff:\t{capabilities:016x}\nSeccomp:\t0\n")
    if fits:
        check_can_lock(10_000)
    else:
        with pytest.raises(ConfigError, match=r"cannot page-lock 0.0 MB .* pin_memory"):
            check_can_lock(10_000)
