"""The looking ahead of tests/gpu/test_look_ahead.py on the shim (`shim.py`)."""

import pytest

from device import shim

pytestmark = pytest.mark.skipif(not shim.load_setup().find_compiler(), reason="no C++20 compiler (g++) is installed")

globals().update(shim.tests_of_gpu("test_look_ahead"))


@pytest.fixture(autouse=True)
def _on_the_shim(monkeypatch):
    shim.install_caches(monkeypatch)
