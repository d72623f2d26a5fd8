"""Loading the native libraries: late, without CUDA, and never one that does not belong to this package."""

import shutil
import sys
from types import SimpleNamespace

import pytest
from native_tools import load_and_fork
from processes import run_python
from source_rules import PACKAGE

from vllm_expert_prefetch.cli import doctor
from vllm_expert_prefetch.native import library

TORCH_FREE = ("plugin", "config", "residency", "planning.sizing", "metrics.collector", "metrics.counters", "cli.main")


@pytest.fixture
def fresh():
    """Nothing loaded before, nothing remembered after."""
    library._load.cache_clear()
    yield library
    library._load.cache_clear()


@pytest.fixture
def built(fresh):
    """The host library's file. Skips where none was built; one that is there and unusable is a failure."""
    path = fresh.FOLDER / "libvep_host.so"
    if not path.exists():
        pytest.skip(fresh.why_not_host())
    assert fresh.why_not_host() is None
    fresh._load.cache_clear()
    return path


def test_importing_the_package_loads_nothing_and_leaves_cuda_to_forked_children():
    output = run_python(f"""
        import importlib, os, sys
        for module in {(*TORCH_FREE, "native.library")!r}:
            importlib.import_module("{PACKAGE}." + module)
        maps = open("/proc/self/maps").read()
        print([name for name in ("libcuda.so", "libcudart", "libtvm_ffi", "libvep_") if name in maps])
        print(sorted({{"torch", "tvm_ffi", "vllm"}} & sys.modules.keys()), flush=True)
        if os.fork() == 0:
            import torch
            assert not torch.cuda.is_initialized()
            if torch.cuda.is_available():
                torch.zeros(1, device="cuda")
            print("child done", flush=True)
            os._exit(0)
        _, status = os.wait()
        assert status == 0, status
    """)
    assert output.splitlines() == ["[]", "[]", "child done"]


def test_loading_the_library_leaves_cuda_to_forked_children(built):
    load_and_fork("host", built.parent)


def test_the_host_library_tells_its_version_and_its_tvm_ffi(built, fresh):
    module = fresh.host_library()
    assert module.version() == fresh.__version__
    assert module.tvm_ffi_version() >= 110  # 0.1.10
    assert fresh.host_library() is module


def test_the_switch_turns_both_libraries_off(built, fresh, monkeypatch):
    monkeypatch.setenv(fresh.SWITCH, "0")
    assert (fresh.host_library(), fresh.cuda_library()) == (None, None)
    assert fresh.why_not_host() == fresh.why_not_cuda() == "turned off by EXPERT_PREFETCH_NATIVE=0"


@pytest.mark.parametrize("value", ["", "no", "2"])
def test_any_other_value_of_the_switch_is_an_error(fresh, monkeypatch, value):
    monkeypatch.setenv(fresh.SWITCH, value)
    with pytest.raises(ValueError, match=f"EXPERT_PREFETCH_NATIVE={value}:"):
        fresh.host_library()


@pytest.mark.parametrize(("part", "remedy"), [("host", "run make setup"), ("cuda", "run VEP_BUILD_CUDA=1 make setup")])
def test_a_library_that_was_not_built_is_named_with_what_it_needs(fresh, monkeypatch, tmp_path, part, remedy):
    monkeypatch.setattr(fresh, "FOLDER", tmp_path)
    reason = getattr(fresh, f"why_not_{part}")()
    assert reason.startswith(f"not built: libvep_{part}.so needs ")
    assert reason.endswith(remedy)


def test_outside_a_checkout_the_remedy_is_to_install_again(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(fresh, "FOLDER", tmp_path)
    monkeypatch.setattr(fresh, "CHECKOUT", tmp_path)
    assert fresh.why_not_host().endswith("install the package again, from its source")


def test_a_library_of_another_version_is_stale(built, fresh, monkeypatch):
    monkeypatch.setattr(fresh, "__version__", "9.9.9")
    assert fresh.host_library() is None
    assert fresh.why_not_host().startswith("stale: built for version ")
    assert "this is 9.9.9: run make setup" in fresh.why_not_host()


def test_a_library_of_other_sources_is_stale_in_a_checkout(built, fresh, monkeypatch, tmp_path):
    shutil.copytree(fresh.CHECKOUT / "csrc", tmp_path / "csrc")
    monkeypatch.setattr(fresh, "CHECKOUT", tmp_path)
    assert fresh.why_not_host() is None
    fresh._load.cache_clear()
    with (tmp_path / "csrc" / "host" / "version.cc").open("a") as source:
        source.write("// changed\n")
    assert fresh.why_not_host() == "stale: csrc/ changed after it was built: run make setup"


def test_a_library_that_tells_no_version_is_stale(fresh, monkeypatch):
    monkeypatch.setattr(fresh, "_open", lambda part: SimpleNamespace())
    assert fresh.why_not_host() == "stale: it does not tell its version: run make setup"


def test_a_file_that_is_no_library_is_named(fresh, monkeypatch, tmp_path):
    (tmp_path / "libvep_host.so").write_text("not a library")
    monkeypatch.setattr(fresh, "FOLDER", tmp_path)
    assert fresh.host_library() is None
    assert fresh.why_not_host().startswith("libvep_host.so cannot be loaded (")


def test_a_missing_tvm_ffi_is_named(built, fresh, monkeypatch):
    monkeypatch.setitem(sys.modules, "tvm_ffi", None)
    assert fresh.host_library() is None
    assert "pip install 'apache-tvm-ffi>=0.1.10'" in fresh.why_not_host()


@pytest.mark.parametrize(
    ("driver", "runtime", "refused"),
    [(12080, 13000, True), (13000, 12080, False), (12040, 12080, False), (13000, 13000, False), (0, 13000, False)],
)
def test_a_driver_older_than_the_runtime_inside_is_refused(fresh, monkeypatch, driver, runtime, refused):
    module = SimpleNamespace(driver_version=lambda: driver, runtime_version=lambda: runtime)
    monkeypatch.setattr(fresh, "_open", lambda part: module)
    monkeypatch.setattr(fresh, "_check_age", lambda module, part: None)
    assert (fresh.cuda_library() is None) == refused
    if refused:
        assert fresh.why_not_cuda().startswith("built with CUDA 13.0, and the NVIDIA driver goes up to 12.8: ")


def test_doctor_names_each_library_and_why_it_is_not_used(fresh):
    native = doctor._native()
    for part in ("host", "cuda"):
        reason = getattr(fresh, f"why_not_{part}")()
        assert (native[part]["usable"], native[part]["reason"]) == (reason is None, reason)
        words = doctor._as_words(native[part])
        assert words.startswith("usable") if reason is None else words.endswith(f"no: {reason}")


def test_doctor_shows_the_gpu_targets(fresh, monkeypatch):
    module = SimpleNamespace(architectures=lambda: "80 120", driver_version=lambda: 0, runtime_version=lambda: 13000)
    monkeypatch.setattr(fresh, "_open", lambda part: module)
    monkeypatch.setattr(fresh, "_check_age", lambda module, part: None)
    assert doctor._as_words(doctor._native()["cuda"]) == "usable sm_80 sm_120"
