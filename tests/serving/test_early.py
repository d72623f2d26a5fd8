"""What does not fit the model or this host is refused before anything is loaded, with the number and the remedy."""

import os
import re
import uuid
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engines import TINY_MODEL
from processes import run_python
from vllm.engine.arg_utils import EngineArgs

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig
from vllm_expert_prefetch.memory import host_limit, host_memory
from vllm_expert_prefetch.memory.host_memory import check_huge_pages
from vllm_expert_prefetch.prediction import Artifact, ArtifactError, Card, save_artifact
from vllm_expert_prefetch.serving import early, sources
from vllm_expert_prefetch.serving.early import check_settings
from vllm_expert_prefetch.serving.sources import NotFound, create_look_ahead_of


def check(executor="mp", top_k=2, num_layers=8, model="an/absent-one", num_stages=1, num_shares=1, **settings):
    """A model of 16 experts, in the process that reads the flags."""
    text = SimpleNamespace(num_experts_per_tok=top_k, num_hidden_layers=num_layers)
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=model, revision=None, quantization=None, get_num_experts=lambda: 16, hf_text_config=text
        ),
        parallel_config=SimpleNamespace(
            distributed_executor_backend=executor,
            tensor_parallel_size=num_shares,
            enable_expert_parallel=num_shares > 1,
            pipeline_parallel_size=num_stages,
            local_world_size=num_stages,
        ),
        load_config=SimpleNamespace(download_dir=None),
    )
    check_settings(config, ExpertPrefetchConfig(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"slots_per_layer": 1}, r"slots_per_layer = 1 gives 1 slots .* needs 2 .* at least slots_per_layer = 2"),
        ({"slots_per_layer": 17}, r"more than the 16 experts of a rank.* at most slots_per_layer = 16"),
        ({"slots_per_layer": 6, "num_shares": 3}, r"more than the 5 experts of a rank.* at most slots_per_layer = 5"),
        ({"cache_fraction": 0.3, "num_shares": 3}, r"gives 1 slots .* needs 2 .* of 5 experts"),
        ({"cache_fraction": 0.1}, r"cache_fraction = 0.1 gives 1 slots"),
        ({"lookahead_layers": 3, "num_layers": 3}, r"lookahead_layers is 3 and the model has 3 layers: set it to 2"),
        (
            {"lookahead_layers": 3, "num_layers": 7, "num_stages": 2},
            r"lookahead_layers is 3 and the model has 3 layers in a stage of its pipeline: set it to 2",
        ),
        ({"predictor": "estimator"}, r"predictor estimator needs an artifact"),
        ({"predictor": "hybrid", "prefetch": "off"}, r"predictor hybrid needs an artifact"),
        ({"artifact": "/nowhere"}, r"no artifact at /nowhere.*calibrate"),
        ({"artifact": "/nowhere", "prefetch": "off"}, r"no artifact at /nowhere"),
        ({"draft_experts": 0.5}, r"draft_experts is 0\.5, and no draft with weights of its own is asked for: leave"),
        ({"numa_node": 99}, r"numa_node is 99, and this host has 0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused(settings, message, tmp_path, monkeypatch):
    monkeypatch.setattr(early, "_NODES", tmp_path)
    (tmp_path / "node0").mkdir()
    with pytest.raises(ConfigError, match=message):
        check(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"slots_per_layer": 2},
        {"slots_per_layer": 16},
        {"slots_per_layer": 5, "num_shares": 3},
        {"slots_per_layer": 1, "num_shares": 16},  # all that a rank has
        {"cache_fraction": 0.125},
        {"lookahead_layers": 3, "num_layers": 4},
        {"lookahead_layers": 3, "num_layers": 3, "prefetch": "off"},
        {"lookahead_layers": 3, "num_layers": 8, "num_stages": 2},
        {"predictor": "previous"},
        {"executor": "ray", "artifact": "/on/the/workers", "numa_node": 99},
        {"cache_gb": 0.0001},  # not downloaded yet
        {"cache_gb": 0.0001, "model": "s3://bucket/model"},
        {"top_k": [1, 4, 2], "slots_per_layer": 1},  # layers differ: checked when they are loaded
    ],
)
def test_what_may_work_is_let_through(settings):
    check(**settings)


def test_an_artifact_without_a_hybrid_is_refused_where_one_is_asked_for(tmp_path):
    card = Card("toy", "0", ["0"], 1, {}, {}, 2, {})
    save_artifact(Artifact(card, None, torch.zeros(1, 2), torch.zeros(1, 2, 2)), tmp_path)
    check(artifact=str(tmp_path))
    with pytest.raises(ConfigError, match=rf"artifact {tmp_path} holds no hybrid: calibrate again"):
        check(artifact=str(tmp_path), predictor="hybrid")


@pytest.mark.parametrize(("store", "name", "write"), [("off", "enabled", "madvise"), ("a", "shmem_enabled", "advise")])
def test_huge_pages_that_the_kernel_gives_nobody_are_refused_with_its_file(monkeypatch, tmp_path, store, name, write):
    monkeypatch.setattr(early, "check_huge_pages", partial(check_huge_pages, settings=tmp_path))
    for untouched in ("check_store", "checkpoint_of", "remove_dead_stores"):
        monkeypatch.setattr(early, untouched, lambda *_: None)
    for setting in ("enabled", "shmem_enabled"):
        (tmp_path / setting).write_text("always [never]" if setting == name else "[always] never")
    check(huge_pages="auto", shared_store=store)
    with pytest.raises(ConfigError, match=rf"huge_pages: {tmp_path}/{name} is set to never: .* Write {write} into it"):
        check(huge_pages="on", shared_store=store)
    (tmp_path / name).write_text(f"always [{write}] never")
    check(huge_pages="on", shared_store=store)


def test_vllms_own_path_ends_with_the_message():
    additional = {"expert_prefetch": {"slots_per_layer": 1}}
    with pytest.raises(ConfigError, match="at least slots_per_layer = 2"):
        EngineArgs(str(TINY_MODEL), additional_config=additional, max_model_len=512).create_engine_config()


@pytest.mark.parametrize(
    ("given", "message"), [(0.0001, r"0 slots .* cache_gb = ([0-9.]+)"), (9, r"more than all .* \(([0-9.]+) GB")]
)
def test_a_size_in_bytes_is_held_against_the_checkpoint_before_it_is_loaded(given, message):
    def start(gigabytes):
        settings = {"expert_prefetch": {"cache_gb": gigabytes}}
        EngineArgs(str(TINY_MODEL), additional_config=settings, max_model_len=512).create_engine_config()

    with pytest.raises(ConfigError, match=message) as error:
        start(given)
    start(float(re.search(message, str(error.value))[1]))


def create_tiny(**settings):
    additional = {"expert_prefetch": settings}
    return EngineArgs(str(TINY_MODEL), additional_config=additional, max_model_len=512).create_engine_config()


def test_a_start_with_a_store_removes_what_killed_servers_have_left_of_any():
    left = Path(f"/dev/shm/expert-prefetch-store-{os.getuid()}-{uuid.uuid4().hex}")
    left.mkdir(mode=0o700)
    create_tiny()
    assert left.exists()
    create_tiny(shared_store="test-early")
    assert not left.exists()


def test_what_members_leave_that_end_with_the_server_is_removed_after_them():
    """A child, as vLLM's engine is one, ends half a second after what the server waits for."""
    left = Path(f"/dev/shm/expert-prefetch-store-{os.getuid()}-{uuid.uuid4().hex}")
    run_python(f"""
        import multiprocessing, time
        from pathlib import Path
        from vllm.engine.arg_utils import EngineArgs
        def leave():
            time.sleep(0.5)
            Path({str(left)!r}).mkdir(mode=0o700)
        settings = {{"expert_prefetch": {{"shared_store": "test-early"}}}}
        EngineArgs({str(TINY_MODEL)!r}, additional_config=settings).create_engine_config()
        multiprocessing.get_context("fork").Process(target=leave).start()
    """)
    assert not left.exists()


EXPERT_BYTES = 8 * 16 * 3 * 128 * 64 * 2


@pytest.mark.parametrize("limit", [EXPERT_BYTES - 1, EXPERT_BYTES])
def test_experts_that_this_host_cannot_hold_are_refused_before_they_are_loaded(monkeypatch, limit):
    monkeypatch.setattr(host_limit, "host_limit", lambda: host_limit.HostLimit(limit, "the memory of this host"))
    if limit < EXPERT_BYTES:
        with pytest.raises(ConfigError, match=r"all experts take 0.00629 GB of host memory, and the memory of"):
            create_tiny()
    else:
        create_tiny()


def test_experts_that_may_not_be_locked_are_refused_before_they_are_loaded(monkeypatch):
    monkeypatch.setattr(host_memory, "memlock_limit_bytes", lambda: EXPERT_BYTES - 1)
    monkeypatch.setattr(host_memory, "_may_exceed_memlock_limit", lambda: False)
    create_tiny()
    create_tiny(pin_memory="auto")
    with pytest.raises(ConfigError, match=r"cannot page-lock 6.3 MB .*ulimit -l unlimited"):
        create_tiny(pin_memory="on")


@pytest.mark.parametrize("error", [NotFound("no gate"), ArtifactError("another model")], ids=["model", "artifact"])
@pytest.mark.parametrize(
    "asked",
    [{"prefetch": "on"}, {"artifact": "folder"}, {"predictor": "previous"}, {"areas": 2}],
    ids=lambda asked: "".join(asked),
)
def test_look_ahead_that_was_asked_for_by_name_is_had_or_refused(monkeypatch, asked, error):
    with pytest.raises(ConfigError, match=f"{error}.*prefetch to auto"):
        look_ahead(monkeypatch, error, **asked)


def test_look_ahead_that_nobody_asked_for_is_left_out_and_said(monkeypatch):
    assert look_ahead(monkeypatch, NotFound("no gate")) == (None, "off: no gate")


def look_ahead(monkeypatch, error, **settings):
    """Of a model over a link that turns out not to allow it."""

    def refuse(*given):
        raise error

    monkeypatch.setattr(sources, "_sources_of", refuse)
    caches = SimpleNamespace(on_device=False, link="a link")
    return create_look_ahead_of(None, [None] * 8, ExpertPrefetchConfig(**settings), caches, 1e9)
