"""What of speculative decoding is for the draft: its configurations, its layers, and no expert of the target's."""

from types import SimpleNamespace

import pytest
import torch

from vllm_expert_prefetch.config import ConfigError, ExpertPrefetchConfig, config_of_draft, draft_model_of
from vllm_expert_prefetch.serving import activation, backends, compat, drafts


class Config(SimpleNamespace):
    """As vLLM's: compared by value, and it can be watched."""


def configured(speculative=None):
    """A configuration that asks for the plugin, of a model that is refused as soon as anyone looks."""
    model = SimpleNamespace(get_num_experts=lambda: 0)
    return Config(additional_config={"expert_prefetch": True}, model_config=model, speculative_config=speculative)


def test_configurations_of_a_draft_are_not_checked_and_those_of_another_target_are():
    speculative = Config(draft_model_config=object(), target_model_config=object())
    with pytest.raises(ConfigError, match="a dense model"):
        activation.check_config(configured(speculative))
    drafts.worker_begins(configured(speculative))
    activation.check_config(configured(speculative))
    with pytest.raises(ConfigError, match="a dense model"):
        activation.check_config(configured(Config(draft_model_config=object(), target_model_config=object())))
    with pytest.raises(ConfigError, match="a dense model"):
        activation.check_config(configured())


def test_nothing_is_checked_while_a_draft_is_built():
    with drafts.building(True):
        activation.check_config(configured())
        with drafts.building(False):
            assert not drafts.is_being_built()
        assert drafts.is_being_built()
    assert not drafts.is_being_built()


def layer(w13, cached=True):
    return SimpleNamespace(layer_name="some.layer", w13_weight=w13, cache=object() if cached else None)


@pytest.mark.parametrize("holder", ["drafter", "speculator"])
def test_a_draft_with_the_experts_of_its_target_is_refused_by_name(monkeypatch, holder):
    monkeypatch.setattr(compat, "moe_layers_of", lambda model: model)
    rows = torch.zeros(4, 8)

    def check(draft, target=None):
        runner = SimpleNamespace(get_model=lambda: [target or layer(rows)], **{holder: SimpleNamespace(model=draft)})
        drafts.check_shares_no_experts(runner)

    with pytest.raises(ConfigError, match=r"the draft's some\.layer has the experts of the target.*drop --spec"):
        check([layer(torch.zeros(4, 8)), layer(rows[1:])])
    check([layer(torch.zeros(4, 8))])
    check([layer(rows)], target=layer(rows, cached=False))
    check([])
    drafts.check_shares_no_experts(SimpleNamespace())


def test_a_backend_that_is_chosen_for_the_target_is_not_its_drafts(monkeypatch):
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: True)
    monkeypatch.setattr(compat, "compute_capability", lambda: 90)
    model = SimpleNamespace(hf_text_config=None, hf_config=None, quantization=None, quantization_config=None)

    def chosen(target, draft, leaves_drafts=True):
        own = SimpleNamespace(hf_text_config=None, hf_config=None, quantization="auto_gptq", quantization_config=None)
        config = SimpleNamespace(
            model_config=model,
            kernel_config=SimpleNamespace(moe_backend=target),
            speculative_config=SimpleNamespace(moe_backend=draft, draft_model_config=own, target_model_config=model),
        )
        backends.choose_backend(config, leaves_drafts)
        return config.kernel_config.moe_backend, config.speculative_config.moe_backend

    assert chosen("auto", None) == ("triton", "auto")
    assert chosen("auto", "marlin") == ("triton", "marlin")
    assert chosen("marlin", None) == ("marlin", None)
    assert chosen("auto", None, leaves_drafts=False) == ("triton", "marlin")


def test_a_draft_with_weights_is_told_from_a_method_without():
    target = object()

    def has(draft):
        speculative = draft and SimpleNamespace(draft_model_config=draft, target_model_config=target)
        return draft_model_of(SimpleNamespace(speculative_config=speculative)) is not None

    assert has(object())
    assert not has(target)
    assert not has(None)


def drafted(settings):
    speculative = Config(draft_model_config=object(), target_model_config=object())
    return Config(
        additional_config=settings, model_config=speculative.target_model_config, speculative_config=speculative
    )


def test_a_draft_is_served_with_what_the_target_says_of_memory_link_and_proof():
    asked = {"cache_gb": 3, "policy": "lru", "emulated_link_gbps": 2, "self_check": "off", "trace": "somewhere"}

    def found(model, **more):
        vllm_config = drafted({"expert_prefetch": asked | more})
        return config_of_draft(vllm_config, getattr(vllm_config.speculative_config, f"{model}_model_config"))

    assert found("target", draft_experts=0.25) is None
    assert found("draft").draft_experts == "resident"
    assert found("draft", draft_experts="25 %") == ExpertPrefetchConfig(
        cache_fraction=0.25,
        draft_experts=0.25,
        policy="lru",
        prefetch="off",
        emulated_link_gbps=2,
        self_check="off",
    )


@pytest.mark.parametrize(
    ("is_asked_for", "error", "message"),
    [
        (True, ConfigError, r"no memory left for the draft: 3 GB.*set draft_experts to the share"),
        (False, torch.OutOfMemoryError, "^3 GB$"),
    ],
)
def test_a_draft_of_ours_that_does_not_fit_is_told_what_helps(is_asked_for, error, message):
    vllm_config = drafted({"expert_prefetch": is_asked_for})
    draft = vllm_config.speculative_config.draft_model_config
    with pytest.raises(error, match=message), drafts.naming_the_remedy(vllm_config, draft):
        raise torch.OutOfMemoryError("3 GB")


class Joined:
    """Caches that note when they are joined."""

    def __init__(self, name, noted):
        self.name, self.noted = name, noted

    def join(self):
        self.noted.append(self.name)


def test_cuda_graphs_wait_for_the_copies_of_target_and_draft_for_as_long_as_these_live():
    from vllm.model_executor.offloader.base import NoopOffloader, get_offloader, set_offloader

    joined = []
    earlier, target, draft = (Joined(name, joined) for name in ("an earlier engine's", "target", "draft"))
    compat.install_offloader(earlier)
    compat.install_offloader(target)
    compat.install_offloader(draft, beside_others=True)
    try:
        get_offloader().sync_prev_onload()
        get_offloader().join_after_forward()
        del target
        get_offloader().sync_prev_onload()
    finally:
        set_offloader(NoopOffloader())
    assert joined == ["target", "draft"] * 2 + ["draft"]
