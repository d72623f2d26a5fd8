"""The residual's scale, observed while the model serves: the recorded one, and not a bit of the tokens changes."""

import pytest
import torch
from engines import TINY_MODEL, greedy, open_engine, prompts

from vllm_expert_prefetch.serving.lookahead_sources import find_sources
from vllm_expert_prefetch.serving.recording import RecordingEngine

pytestmark = pytest.mark.engine


def install(monkeypatch, found):
    """Observe as serving would: when the model is loaded, before anything is compiled or run."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    from vllm_expert_prefetch.serving.residual_scale import observe_scales

    load = BaseModelLoader.load_model

    def load_and_observe(self, *args, **kwargs):
        model = load(self, *args, **kwargs)
        found["sources"] = find_sources(model)
        found["scales"] = observe_scales(found["sources"], 512)
        return model

    monkeypatch.setattr(BaseModelLoader, "load_model", load_and_observe)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_scale_is_observed_and_the_tokens_stay(compiled, monkeypatch):
    texts, options = prompts(6), {"enforce_eager": not compiled}
    with open_engine(TINY_MODEL, {"cache_fraction": 0.5}, **options) as llm:
        expected = greedy(llm, texts, 12)
    found = {}
    install(monkeypatch, found)
    with open_engine(TINY_MODEL, {"cache_fraction": 0.5}, **options) as llm:
        assert greedy(llm, texts, 12) == expected
        tokens = llm.get_tokenizer().encode(texts[0])
        if compiled:
            return_scales = [scale.clone() for scale in found["scales"]]
            llm.generate({"prompt_token_ids": tokens}, use_tqdm=False)
            assert any(not torch.equal(a, b) for a, b in zip(return_scales, found["scales"], strict=True))
            return
        signals = RecordingEngine(llm, found["sources"], 512).record(tokens)
        for own, scale in zip(signals, found["scales"], strict=True):
            torch.testing.assert_close(scale[: len(tokens)], own.scale)
