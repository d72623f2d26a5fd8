"""Speculative decoding: verification goes through the cache, and what vLLM drafts with is left to it, or cached too."""

import functools
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines import TINY_MODEL, Output, caches, counters, draft_layers, greedy, layers, open_engine, prompts
from families import OTHER_FAMILIES, prompt, random_values, write_checkpoint

from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.serving.steps import count_sequences

pytestmark = pytest.mark.engine

SERVED = {"cache_fraction": 0.5, "prefetch": "on", "emulated_link_gbps": 0.2}
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
DRAFTED = "vllm:spec_decode_num_draft_tokens"
NUM_TOKENS = 32
HIDDEN, COMMA = 128, 14
"""Of the trained model: its hidden size, and its most frequent token."""
LLAMA = {
    "model_type": "llama",
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "torch_dtype": "bfloat16",
}
"""A dense head of its size."""


@dataclass(frozen=True)
class Case:
    """A model, what it is asked, and what drafts for it."""

    model: Path
    prompts: list
    draft: dict
    num_layers: int
    num_seqs: int
    """At a time, so that steps that verify route to no more ids than there are experts."""
    has_tokenizer: bool = True
    is_right: bool = False
    """At times at least: some of its tokens are accepted."""
    draft_layers: int = 0
    """Of the draft's, how many have experts."""

    def run(self, config: dict | None) -> tuple[list[Output], dict[str, float], dict[str, float]]:
        """Outputs, what vLLM counted, what the plugin counted, `draft_misses` in caches of the draft's layers, and
        `fetched_in_verification`."""
        options = {
            "max_num_seqs": self.num_seqs,
            "disable_log_stats": False,
            "skip_tokenizer_init": not self.has_tokenizer,
        }
        with open_engine(self.model, config, speculative_config=self.draft, **options) as llm:
            fetched = fetched_in_verification(llm) if config else []
            outputs = greedy(llm, self.prompts, NUM_TOKENS)
            counted = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
            if config is None:
                return outputs, counted, {}
            assert len(caches(llm)) == len(layers(llm)) == self.num_layers
            ours = counters(llm) | self._of_the_draft(llm, config.get("draft_experts"))
            return outputs, counted, ours | {"fetched_in_verification": sum(fetched)}

    def _of_the_draft(self, llm: object, share: float | None) -> dict[str, float]:
        found = draft_layers(llm) if self.draft_layers else []
        assert len(found) == self.draft_layers
        if share is None:
            assert not any(hasattr(layer, "cache") for layer in found)
            return {}
        for layer in found:
            layer.cache.check_integrity()
            assert layer.cache.num_slots == share * layer.local_num_experts
        return {"draft_misses": sum(layer.cache.words().misses for layer in found)}


def fetched_in_verification(llm: Any) -> list[int]:
    """From now on, what was fetched ahead in each step that verifies: every sequence is beyond its prompt, and one has
    several tokens."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    execute, found = runner.execute_model, [layer.cache for layer in layers(llm)]
    fetched: list[int] = []

    def num_issued() -> int:
        return sum(cache.words().issued for cache in found)

    def execute_and_count(scheduled: Any, *args: Any, **kwargs: Any) -> Any:
        before = num_issued()
        output = execute(scheduled, *args, **kwargs)
        num_prefilling, num_decoding, _ = count_sequences(scheduled)
        if not num_prefilling and scheduled.total_num_scheduled_tokens > num_decoding:
            fetched.append(num_issued() - before)
        return output

    runner.execute_model = execute_and_count
    return fetched


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("drafts")


def with_tokenizer(draft: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_MODEL / name, draft)
    return draft


def dense(folder: Path) -> Case:
    """A random draft that is right by chance."""
    draft = with_tokenizer(write_checkpoint("llama", folder / "dense", vocab_size=4096, num_hidden_layers=2))
    given = {"model": str(draft), "method": "draft_model", "num_speculative_tokens": 2}
    return Case(TINY_MODEL, prompts(16), given, 8, num_seqs=2)


def experts(folder: Path) -> Case:
    """A draft with experts of its own: the model itself, which is always right."""
    draft = {"model": str(TINY_MODEL), "method": "draft_model", "num_speculative_tokens": 3}
    return Case(TINY_MODEL, prompts(16), draft, 8, num_seqs=2, is_right=True, draft_layers=8)


def ngram(folder: Path) -> Case:
    """What the prompt or the text repeats."""
    draft = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    return Case(TINY_MODEL, prompts(16), draft, 8, num_seqs=2, is_right=True)


def mtp(folder: Path) -> Case:
    """A head with experts: the last of a checkpoint's layers, and what an MTP head has beside one."""
    import torch
    from safetensors.torch import load_file, save_file

    model = write_checkpoint("glm4-moe", folder / "mtp", num_hidden_layers=4)
    tensors, config = load_file(model / "model.safetensors"), json.loads((model / "config.json").read_text())
    hidden, generator = config["hidden_size"], torch.Generator().manual_seed(1)
    shapes = {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden), "shared_head.norm": (hidden,)}
    for name, shape in shapes.items():
        full = f"model.layers.3.{name}.weight"
        tensors[full] = random_values(full, torch.empty(shape), generator).to(torch.bfloat16)
    tensors["model.layers.3.shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config |= {"num_hidden_layers": 3, "num_nextn_predict_layers": 1}
    (model / "config.json").write_text(json.dumps(config))
    given = [prompt(5 + number, number) for number in range(16)]
    draft = {"method": "mtp", "num_speculative_tokens": 1}
    num_layers = OTHER_FAMILIES["glm4-moe"][2]
    return Case(model, given, draft, num_layers, num_seqs=4, has_tokenizer=False, draft_layers=1)


def head(folder: Path, method: str, config: dict, shapes: Mapping[str, tuple[int, ...]]) -> Case:
    """A head that drafts a comma where the trained model thinks it likely, which at times is right. What it has beside
    that is random and small."""
    import torch
    from safetensors.torch import load_file, save_file

    target, generator = load_file(TINY_MODEL / "model.safetensors"), torch.Generator().manual_seed(1)
    embedding = target["model.embed_tokens.weight"].float()
    likely = embedding[COMMA] - embedding.mean(0)
    tensors = {name: torch.ones(shape) for name, shape in shapes.items() if len(shape) == 1}
    tensors |= {name: torch.rand(shape, generator=generator) / 50 - 0.01 for name, shape in shapes.items() if shape[1:]}
    if "fc.weight" in shapes:  # reads the last of the hidden states that it is given
        tensors["fc.weight"][:] = 0
        tensors["fc.weight"][:, -HIDDEN:] = torch.outer(embedding[COMMA], likely)
    if "lm_head.weight" in shapes:
        tensors["lm_head.weight"] = embedding
    if "lm_heads.0.weight" in shapes:
        tensors["lm_heads.0.weight"][COMMA] = likely
    draft = folder / method
    draft.mkdir()
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, draft / "model.safetensors", {"format": "pt"})
    (draft / "config.json").write_text(json.dumps({"vocab_size": 4096, "hidden_size": HIDDEN} | config))
    given = {"model": str(with_tokenizer(draft)), "method": method, "num_speculative_tokens": 1}
    return Case(TINY_MODEL, prompts(16), given, 8, num_seqs=4, is_right=True)


def decoder_layer(name: str, inputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a dense layer of Llama."""
    attention = {"q_proj": (HIDDEN, inputs), "k_proj": (64, inputs), "v_proj": (64, inputs), "o_proj": (HIDDEN, HIDDEN)}
    shapes: dict[str, tuple[int, ...]] = {f"self_attn.{part}": shape for part, shape in attention.items()}
    shapes |= {f"mlp.{part}_proj": (HIDDEN, HIDDEN) for part in ("gate", "up", "down")}
    shapes["post_attention_layernorm"] = (HIDDEN,)
    return {f"{name}.{part}.weight": shape for part, shape in shapes.items()}


def eagle(folder: Path) -> Case:
    """EAGLE: a layer on a token's embedding and the target's hidden state."""
    shapes = decoder_layer("layers.0", HIDDEN) | {"fc.weight": (HIDDEN, 2 * HIDDEN)}
    return head(folder, "eagle", LLAMA | {"architectures": ["LlamaForCausalLM"]}, shapes)


def eagle3(folder: Path) -> Case:
    """EAGLE-3: a layer on the hidden states behind three of the target's layers, with an output of its own."""
    norms = {f"midlayer.{norm}.weight": (HIDDEN,) for norm in ("hidden_norm", "input_layernorm")}
    shapes = decoder_layer("midlayer", 2 * HIDDEN) | norms | {"norm.weight": (HIDDEN,)}
    shapes |= {"lm_head.weight": (4096, HIDDEN), "fc.weight": (HIDDEN, 3 * HIDDEN)}
    return head(folder, "eagle3", LLAMA | {"architectures": ["LlamaForCausalLMEagle3"]}, shapes)


def medusa(folder: Path) -> Case:
    """Medusa: a block and an output for each token ahead."""
    shapes = {"blocks.0.layers.0.weight": (HIDDEN, HIDDEN), "lm_heads.0.weight": (4096, HIDDEN)}
    config = {"architectures": ["MedusaModel"], "model_type": "medusa", "num_heads": 1, "num_hidden_layers": 1}
    return head(folder, "medusa", config, shapes)


@pytest.fixture(scope="module")
def in_stock(folder):
    """For what makes a case: the case, and the outputs and acceptance of plain vLLM."""

    @functools.cache
    def run(make: Callable[[Path], Case]) -> tuple[Case, list[Output], list[float]]:
        case = make(folder)
        outputs, counted, _ = case.run(None)
        return case, outputs, acceptance(counted)

    return run


def acceptance(counted: dict[str, float]) -> list[float]:
    """Tokens that were drafted, and that were accepted."""
    return [counted[name] for name in (DRAFTED, ACCEPTED)]


@pytest.fixture(autouse=True, scope="module")
def not_compiled():
    """The ngram method in Python, as vLLM wrote it: Numba, which must not be imported before vLLM has looked through
    all modules, compiles it for a minute."""
    imported = sys.modules.get("vllm.v1.spec_decode.ngram_proposer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_DISABLE_JIT", "1")
        for name in ("batch_propose_numba", "_find_longest_matched_ngram_and_propose_tokens") if imported else ():
            function = getattr(imported, name)
            patch.setattr(imported, name, getattr(function, "py_func", function))
        yield


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(ngram, marks=pytest.mark.proves("speculative decoding: ngram")),
        pytest.param(dense, marks=pytest.mark.proves("speculative decoding: a dense draft model")),
        pytest.param(experts, marks=pytest.mark.proves("speculative decoding: a draft model with experts")),
        pytest.param(mtp, marks=pytest.mark.proves("speculative decoding: an MTP head with experts")),
        pytest.param(eagle, marks=pytest.mark.proves("speculative decoding: EAGLE")),
        pytest.param(eagle3, marks=pytest.mark.proves("speculative decoding: EAGLE-3")),
        pytest.param(medusa, marks=pytest.mark.proves("speculative decoding: Medusa")),
    ],
)
def test_tokens_and_acceptance_are_those_of_plain_vllm_and_only_the_targets_layers_count(make, in_stock):
    case, expected, accepted = in_stock(make)
    outputs, counted, ours = case.run(SERVED)
    assert [one.tokens for one in outputs] == [one.tokens for one in expected]
    assert outputs == expected
    assert acceptance(counted) == accepted
    assert counted[DRAFTED] > 0
    assert counted[ACCEPTED] > 0 or not case.is_right
    assert min(ours["lookups_total/miss"], ours["predictions_total/used"], ours["fetched_in_verification"]) > 0
    assert ours["moe_layers"] == case.num_layers
    steps = sum(ours[f"steps_total/{phase}"] for phase in ("decode", "prefill", "mixed"))
    assert ours["moe_steps_total/narrow"] + ours["moe_steps_total/wide"] == case.num_layers * steps


@pytest.mark.proves("speculative decoding: a draft's experts in a cache of their own (`draft_experts`)")
@pytest.mark.parametrize("make", [experts, mtp])
def test_a_drafts_experts_in_a_cache_of_their_own(make, in_stock):
    case, expected, accepted = in_stock(make)
    outputs, counted, ours = case.run(SERVED | {"draft_experts": 0.5})
    assert outputs == expected
    assert acceptance(counted) == accepted
    assert min(ours["draft_misses"], ours["lookups_total/miss"]) > 0
    assert ours["moe_layers"] == case.num_layers
    steps = sum(ours[f"steps_total/{phase}"] for phase in ("decode", "prefill", "mixed"))
    assert ours["moe_steps_total/narrow"] + ours["moe_steps_total/wide"] == case.num_layers * steps


@pytest.mark.parametrize(
    ("make", "share", "message"),
    [
        (mtp, 0.1, r"draft_experts = 0.1 gives the draft's .* slots, and one token needs \d.*: give a larger share"),
        (eagle, 0.5, "draft_experts is 0.5, and the draft has no MoE layer: leave the key out"),
        (ngram, 0.5, "draft_experts is 0.5, and no draft with weights of its own is asked for: leave the key out"),
    ],
)
def test_a_share_of_the_drafts_experts_that_cannot_be_is_refused(make, share, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        make(tmp_path).run(SERVED | {"draft_experts": share})
