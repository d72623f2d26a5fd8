"""Models on the CPU platform whose threads end with the test."""

import pytest
from host_model import HostModel


@pytest.fixture
def make_model():
    made = []

    def make(*arguments, **named):
        made.append(HostModel(*arguments, **named))
        return made[-1]

    yield make
    for model in made:
        model.caches.close()
