"""Settings that must stand before torch and vLLM are imported: one thread, the engine inside this process. And
`--skips-allowed`: what may be skipped."""

import os
import re

import pytest

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--skips-allowed", metavar="REGEX", help="a test skipped for any other reason counts as failed")


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
