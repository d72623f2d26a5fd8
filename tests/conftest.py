"""Settings that must stand before torch and vLLM are imported: one thread, the engine inside this process. And
`--skips-allowed`: what may be skipped. And `--write-features`: what was proved (`proofs.py`). And a package that vLLM
imports for nothing."""

import os
import re
import sys
from pathlib import Path
from types import ModuleType

import proofs
import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--skips-allowed", metavar="REGEX", help="a test skipped for any other reason counts as failed")
    parser.addoption("--write-features", metavar="FILE", help="which features the tests that ran have proved")


def pytest_configure(config):
    config.pluginmanager.register(proofs)
    path = config.getoption("--write-features")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(proofs.Writer(Path(path)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    allowed = item.config.getoption("--skips-allowed")
    if allowed is not None and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2]
        if not re.search(allowed, reason):
            report.outcome = "failed"
            report.longrepr = f"skipped, which --skips-allowed does not allow: {reason}"
    return report


@pytest.fixture
def torchvision(monkeypatch):
    """An empty one: for text as well, vLLM imports the image processors of models that also read images."""
    from transformers.utils import is_torchvision_available

    if not is_torchvision_available():
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.v2"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        sys.modules["torchvision.transforms.v2"].functional = ModuleType("functional")
