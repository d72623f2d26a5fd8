"""Which planner and staging a configuration gets, and what it says when that is not there."""

import pytest

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.native.library import host_library
from vllm_expert_prefetch.serving import cache_factory
from vllm_expert_prefetch.serving.cache_factory import CacheFactory

REASON = "not built: libvep_host.so needs a compiler"

needs_library = pytest.mark.skipif(host_library() is None, reason="the host library is not there")


@pytest.fixture
def without_library(monkeypatch):
    monkeypatch.setattr(cache_factory, "why_not_host", lambda: REASON)


@needs_library
@pytest.mark.parametrize(("staging", "name"), [("auto", "native"), ("native", "native"), ("torch", "torch")])
def test_the_cpu_platform_stages_natively_unless_told_otherwise(staging, name):
    assert CacheFactory(ExpertPrefetchConfig(staging=staging)).staging_name == name


def test_without_the_library_torch_stages_and_the_log_says_why(without_library, monkeypatch):
    lines = []
    logger = type("Logger", (), {"warning": lambda self, text, *values: lines.append(text % values)})()
    monkeypatch.setattr(cache_factory.compat, "logger", lambda: logger)
    assert CacheFactory(ExpertPrefetchConfig()).staging_name == "torch"
    assert len(lines) == 1
    assert REASON in lines[0]


def test_native_staging_without_the_library_is_refused(without_library):
    with pytest.raises(ConfigError, match=f"staging is native and a library is missing: {REASON}. Or set it to auto"):
        CacheFactory(ExpertPrefetchConfig(staging="native"))


@needs_library
def test_a_gpu_needs_the_cuda_library_as_well(monkeypatch):
    monkeypatch.setattr(cache_factory.compat, "on_cuda_platform", lambda: True)
    monkeypatch.setattr(cache_factory, "why_not_cuda", lambda: "not built: libvep_cuda.so needs nvcc")
    with pytest.raises(ConfigError, match=r"libvep_cuda.so needs nvcc"):
        CacheFactory(ExpertPrefetchConfig(staging="native"))
    assert CacheFactory(ExpertPrefetchConfig(staging="torch")).staging_name == "torch"
