"""vLLM's Ray executor, as far as it can be had without a GPU: it refuses the CPU platform.

What it copies to its workers must carry the plugin: the environment, the configuration, and the loading of plugins.
"""

import os
import pickle

import pytest
from engines import TINY_MODEL, prompts
from servers import serve
from vllm.engine.arg_utils import EngineArgs
from vllm.ray.ray_env import get_env_vars_to_copy

from vllm_expert_prefetch.config import config_from_additional
from vllm_expert_prefetch.metrics.runtime_dir import ENVIRONMENT_VARIABLE, carry_to_ray_workers, ensure_runtime_dir


@pytest.fixture
def runtime(tmp_path, monkeypatch):
    """This process's runtime directory, with nothing set for Ray yet."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "")
    monkeypatch.delenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", raising=False)
    return ensure_runtime_dir()


def test_the_environment_that_is_copied_names_the_plugins_and_the_directory(runtime, monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "expert_prefetch")
    assert ENVIRONMENT_VARIABLE not in get_env_vars_to_copy()
    carry_to_ray_workers()
    assert {ENVIRONMENT_VARIABLE, "VLLM_PLUGINS"} <= get_env_vars_to_copy()


def test_what_the_user_lets_copy_is_kept(runtime, monkeypatch):
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "MINE")
    carry_to_ray_workers()
    carry_to_ray_workers()
    assert os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] == f"MINE,{ENVIRONMENT_VARIABLE}"


def test_the_configuration_that_is_sent_holds_every_setting(runtime):
    cloudpickle = pytest.importorskip("cloudpickle")
    values = {"cache_fraction": 0.5, "policy": "lfu", "metrics_port": 9400}
    config = EngineArgs(str(TINY_MODEL), additional_config={"expert_prefetch": values}).create_engine_config()
    received = pickle.loads(cloudpickle.dumps(config))
    assert config_from_additional(received.additional_config) == config_from_additional({"expert_prefetch": values})


@pytest.mark.proves("Ray executor", says="refused by vLLM")
@pytest.mark.engine
def test_an_actor_loads_the_plugin_and_finds_the_servers_directory(runtime):
    """A real Ray actor that does what vLLM's worker does first, with the environment that the executor sends it."""
    ray = pytest.importorskip("ray")
    carry_to_ray_workers()
    sent = {name: os.environ[name] for name in get_env_vars_to_copy() if name in os.environ}
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        found = ray.get(ray.remote(actor_class()).remote().look.remote(sent), timeout=120)
    finally:
        ray.shutdown()
    assert found == ("CachedRoutedExperts", str(runtime), True)


def actor_class() -> type:
    """Made here, so that it is sent as it is: a worker cannot import this module."""

    class Actor:
        def look(self, environment):
            from vllm.v1.worker.worker_base import WorkerWrapperBase

            WorkerWrapperBase(rpc_rank=0).update_environment_variables([environment])
            from vllm.model_executor.custom_op import op_registry_oot
            from vllm.plugins import load_general_plugins

            from vllm_expert_prefetch.metrics.runtime_dir import ensure_runtime_dir

            load_general_plugins()
            times_steps = WorkerWrapperBase.init_device.__name__ == "init_device_and_watch"
            return op_registry_oot["RoutedExperts"].__name__, str(ensure_runtime_dir()), times_steps

    return Actor


@pytest.mark.engine
@pytest.mark.gpu
def test_on_a_gpu_the_ray_executor_serves_and_its_workers_are_shown():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    ask = ["--plugin", "expert_prefetch", "--additional-config.expert_prefetch.cache_fraction", "0.5"]
    with serve(*ask, "--distributed-executor-backend", "ray") as server:
        server.wait_ready()
        server.complete(prompts(1)[0], 8)
        metrics = server.metrics()
    assert sum(value for key, value in metrics.items() if "steps_total{" in key) == 8
