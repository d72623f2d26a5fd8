"""What setup.py decides: what is built, with which compilers, for which targets."""

import os

import pytest
from native_tools import load_setup

from vllm_expert_prefetch.native.sources import source_digest


@pytest.fixture
def build(monkeypatch):
    """setup.py, with no setting of the caller's."""
    for name in ("VEP_BUILD_CUDA", "VEP_CUDA_ARCHS", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    return load_setup()


@pytest.mark.parametrize(
    ("setting", "nvcc", "built"),
    [("auto", "nvcc", True), ("auto", None, False), ("0", "nvcc", False), ("0", None, False), ("1", "nvcc", True)],
)
def test_cuda_is_built_as_asked(build, monkeypatch, setting, nvcc, built):
    monkeypatch.setenv("VEP_BUILD_CUDA", setting)
    assert build.wants_cuda(["g++"], nvcc) == built


@pytest.mark.parametrize("setting", ["yes", "", "2"])
def test_an_unknown_setting_is_named(build, monkeypatch, setting):
    monkeypatch.setenv("VEP_BUILD_CUDA", setting)
    with pytest.raises(SystemExit, match=f"VEP_BUILD_CUDA={setting} is none of auto, 1, 0"):
        build.wants_cuda(["g++"], "nvcc")


@pytest.mark.parametrize(
    ("compiler", "nvcc", "missing"),
    [(["g++"], None, "nvcc"), ([], "nvcc", r"a C\+\+20 compiler"), ([], None, r"nvcc and a C\+\+20 compiler")],
)
def test_cuda_that_was_asked_for_and_cannot_be_built_is_an_error(build, monkeypatch, compiler, nvcc, missing):
    monkeypatch.setenv("VEP_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match=f"VEP_BUILD_CUDA=1 needs {missing}, not found"):
        build.wants_cuda(compiler, nvcc)


def test_without_a_compiler_cuda_is_left_out(build):
    assert build.wants_cuda([], "nvcc") is False


@pytest.mark.parametrize("works", [True, False])
def test_a_compiler_counts_when_it_knows_cxx20(build, monkeypatch, tmp_path, works):
    compiler = tmp_path / "my-g++"
    compiler.write_text(f"#!/bin/sh\nexit {0 if works else 1}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -m64")
    assert build.find_compiler() == ([str(compiler), "-m64"] if works else [])


def test_no_compiler_is_found_in_an_empty_path(build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_compiler() == []


@pytest.mark.parametrize("text", ["80 90", "80;90", "80,90", " 80, 90 "])
def test_targets_can_be_chosen(build, monkeypatch, text):
    monkeypatch.setenv("VEP_CUDA_ARCHS", text)
    assert build.cuda_archs("nvcc") == ["80", "90"]


def test_a_wrong_target_is_named(build, monkeypatch):
    monkeypatch.setenv("VEP_CUDA_ARCHS", "80 sm_90 hopper")
    with pytest.raises(SystemExit, match="VEP_CUDA_ARCHS names sm_90, hopper;"):
        build.cuda_archs("nvcc")


@pytest.mark.parametrize(
    ("setting", "has_gpu", "has_nvcc", "compiler", "fetched"),
    [
        ("1", False, False, ["g++"], True),
        ("auto", True, False, ["g++"], True),
        ("auto", False, False, ["g++"], False),
        ("auto", True, True, ["g++"], False),
        ("1", False, True, ["g++"], False),
        ("0", True, False, ["g++"], False),
        ("1", True, False, [], False),
    ],
)
def test_nvcc_is_fetched_where_it_is_wanted_and_missing(
    build, monkeypatch, setting, has_gpu, has_nvcc, compiler, fetched
):
    monkeypatch.setenv("VEP_BUILD_CUDA", setting)
    monkeypatch.setattr(build, "find_nvcc", lambda: "nvcc" if has_nvcc else None)
    monkeypatch.setattr(build.Path, "exists", lambda path: has_gpu)
    assert build.build_requirements(compiler) == (build.NVCC_WHEELS if fetched else [])


def test_nvcc_is_found_among_the_wheels(build, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvidia" / "cu13" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    build.find_nvcc.cache_clear()
    found = build.find_nvcc()
    build.find_nvcc.cache_clear()
    assert found == str(nvcc)


def test_targets_that_nvcc_lacks_are_left_out_and_named(build, tmp_path, capsys):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\nprintf 'sm_80\\nsm_86\\nsm_89\\nsm_90\\n'\n")
    nvcc.chmod(0o755)
    assert build.cuda_archs(str(nvcc)) == ["80", "86", "89", "90"]
    assert "too old for the CUDA targets 100, 120" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("symbols", "tag"),
    [
        ([b"GLIBC_2.2.5 GLIBC_2.34 GLIBCXX_3.4.30", b"GLIBC_2.4"], "manylinux_2_34"),
        ([b"GLIBC_2.9"], "manylinux_2_17"),
        ([b"no version at all"], "linux"),
    ],
)
def test_the_tag_is_the_newest_glibc_that_the_libraries_name(build, tmp_path, symbols, tag):
    libraries = [tmp_path / f"{number}.so" for number in range(len(symbols))]
    for library, text in zip(libraries, symbols, strict=True):
        library.write_bytes(b"\x7fELF\0" + text + b"\0")
    assert build.glibc_tag(libraries) == f"{tag}_{os.uname().machine}"


def test_the_digest_follows_every_source_of_its_own_library(tmp_path):
    files = {
        "a.h": "host cuda",
        "host/a.cc": "host",
        "host/b.h": "host",
        "cuda/a.cu": "cuda",
        "cuda/b.cc": "cuda",
        "cuda/b.cuh": "cuda",
    }
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    before = {part: source_digest(tmp_path, part) for part in ("host", "cuda")}
    for name, parts in files.items():
        (tmp_path / name).write_text("2")
        changed = {part for part in before if source_digest(tmp_path, part) != before[part]}
        assert changed == set(parts.split()), name
        (tmp_path / name).write_text("1")
    (tmp_path / "host" / "notes.txt").write_text("not a source")
    assert {part: source_digest(tmp_path, part) for part in before} == before
