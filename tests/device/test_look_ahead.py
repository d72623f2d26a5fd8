"""The looking ahead of tests/gpu/test_look_ahead.py on the shim (`shim.py`)."""

import runpy

import gpu_model
import pytest
from native_tools import ROOT

from device import shim

pytestmark = pytest.mark.skipif(not shim.load_setup().find_compiler(), reason="no C++20 compiler (g++) is installed")
TESTS = runpy.run_path(str(ROOT / "tests" / "gpu" / "test_look_ahead.py"))

globals().update({name: test for name, test in TESTS.items() if name.startswith("test_")})


@pytest.fixture(autouse=True)
def _on_the_shim(monkeypatch):
    shim.install_caches(monkeypatch)
    monkeypatch.setattr(gpu_model, "ROW_BYTES", (4096, 48))
    for test in TESTS.values():
        if getattr(test, "__name__", "").startswith("test_"):
            monkeypatch.setitem(test.__globals__, "torch", shim.Torch())
