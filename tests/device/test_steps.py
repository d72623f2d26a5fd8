"""The steps of tests/gpu/test_steps.py on the shim (`shim.py`): captured, and replayed with other routing."""

import gpu_model
import pytest
import torch

from device import shim
from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore

pytestmark = pytest.mark.skipif(not shim.load_setup().find_compiler(), reason="no C++20 compiler (g++) is installed")
NEEDS_A_GPU = "test_nothing_waits_for_the_gpu"

globals().update(shim.tests_of_gpu("test_steps"))
del globals()[NEEDS_A_GPU]


@pytest.fixture(autouse=True)
def _on_the_shim(monkeypatch):
    shim.install_caches(monkeypatch)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_step_of_a_layer_takes_two_launches_and_looking_ahead_two_for_each_distance(ahead):
    model = gpu_model.Model()
    model.route()
    shim.library().shim_launches()
    model.run(ahead=False)
    assert list(shim.library().shim_launches()) == [2 * gpu_model.NUM_LAYERS, 0]
    model.run(ahead)
    looking = (gpu_model.NUM_LAYERS - 1 + gpu_model.NUM_LAYERS - 2) * ahead
    assert list(shim.library().shim_launches()) == [2 * gpu_model.NUM_LAYERS + looking, looking]


def test_a_store_that_is_not_page_locked_is_refused():
    model = gpu_model.Model()
    pageable = HostStore({"w": torch.zeros(4, 4096, dtype=torch.uint8)}, HostMemoryOptions())
    with pytest.raises(RuntimeError, match="not mapped into device 0"):
        model.caches.add(gpu_model.NUM_LAYERS, pageable, model.layers[0].tensors, 2, 1, "lru")


def test_ghost_caches_take_no_launch_of_their_own():
    model = gpu_model.Model()
    model.caches.add_ghosts([1.5, 2.0])
    model.route()
    shim.library().shim_launches()
    model.run(ahead=False)
    assert list(shim.library().shim_launches()) == [2 * gpu_model.NUM_LAYERS, 0]


@pytest.mark.parametrize("kernel", ["plan_step", "gather_records"])
def test_a_graph_that_freezes_a_kernel_is_found_out(monkeypatch, kernel):
    """Its results would be those of the captured step, in every replay."""
    model = gpu_model.Model()
    model.route()
    when_it_runs = shim.when_it_runs

    def freeze(call):
        is_frozen = shim.Graph.current is not None and call.__closure__ is not None
        name = next((cell.cell_contents for cell in call.__closure__ or () if callable(cell.cell_contents)), None)
        if is_frozen and name is getattr(shim.library(), kernel, None):
            return
        when_it_runs(call)

    monkeypatch.setattr(shim, "when_it_runs", freeze)
    graph = model.capture()
    for _ in range(3):
        model.step(graph, share_real=1)
    with pytest.raises(AssertionError):
        model.finish()
