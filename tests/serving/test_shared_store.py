"""Engines of one host that share a store: tokens, memory, and what is left when they are killed."""

import ast
import signal
import uuid
from pathlib import Path

import pytest
from engines import TINY_MODEL
from families import write_checkpoint
from processes import start_python
from vllm.engine.arg_utils import EngineArgs

from vllm_expert_prefetch.config import ConfigError
from vllm_expert_prefetch.memory.shared_store import SharedStore
from vllm_expert_prefetch.serving.places import checkpoint_of

HERE = Path(__file__).resolve().parent
ENGINE = f"""
import json, sys
sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]
import conftest
from engines import greedy, layers, open_engine
options = dict(skip_tokenizer_init=True, max_model_len=128, kv_cache_memory_bytes=1 << 24)
prompts = [{{{{"prompt_token_ids": list(range(3 + i, 40 + 5 * i))}}}} for i in range(4)]
with open_engine({{model!r}}, {{config!r}}, **options) as llm:
    lines = layers(llm)[0].worker.describe() if {{config!r}} else [""]
    print("=>", lines[0], flush=True)
    for _ in sys.stdin:
        print("=>", [output.tokens for output in greedy(llm, prompts, 12)], flush=True)
"""
RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
"""glibc gives freed tensors back: the holes it otherwise keeps between them are no copy of anything."""
LAYERS, EXPERTS, HIDDEN, INTERMEDIATE = 12, 16, 512, 768
EXPERT_BYTES = LAYERS * EXPERTS * 3 * HIDDEN * INTERMEDIATE * 2
CACHE_BYTES = EXPERT_BYTES // 4 + EXPERT_BYTES // LAYERS * 3 // 4


def start(model, config):
    return start_python(ENGINE.format(model=str(model), config=config), RETURN_AT_ONCE)


def line_of(process):
    """The next one that is not vLLM's log."""
    for line in process.stdout:
        if line.startswith("=> "):
            return line.removeprefix("=> ")
    raise AssertionError(process.stderr.read()[-3000:])


def tokens_of(process):
    process.stdin.write("\n")
    process.stdin.flush()
    return ast.literal_eval(line_of(process))


def memory_of(*processes):
    """Anonymous and shared pages, each once."""
    lines = [line for p in processes for line in Path(f"/proc/{p.pid}/smaps_rollup").read_text().splitlines()]
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.proves("one host store for several servers (`shared_store`)")
@pytest.mark.engine
@pytest.mark.long
def test_two_engines_give_the_tokens_of_plain_vllm_from_one_copy_of_the_experts(tmp_path):
    sizes = {"num_hidden_layers": LAYERS, "num_experts": EXPERTS}
    model = write_checkpoint(
        "qwen3-moe", tmp_path / "wide", **sizes, hidden_size=HIDDEN, moe_intermediate_size=INTERMEDIATE
    )
    name = uuid.uuid4().hex
    config = {"cache_fraction": 0.25, "shared_store": name}
    with start(model, None) as stock:
        line_of(stock)
        expected = tokens_of(stock)
        stock_bytes = memory_of(stock)
        kill(stock)
    with start(model, config) as one:
        assert f"in the shared store {name}: 0 layers found there, {LAYERS} added" in line_of(one)
        assert tokens_of(one) == expected
        assert memory_of(one) - stock_bytes <= CACHE_BYTES + 0.1 * EXPERT_BYTES
        with start(model, config) as other:
            assert f"in the shared store {name}: {LAYERS} layers found there, 0 added" in line_of(other)
            assert tokens_of(other) == tokens_of(one) == expected
            # Twice what plain vLLM has beside its experts, twice the caches, and 1.1 times the experts.
            beside = stock_bytes - EXPERT_BYTES
            assert memory_of(one, other) <= 2 * (beside + CACHE_BYTES) + 1.1 * EXPERT_BYTES
            kill(one)
            assert tokens_of(other) == expected, "who put the records there is gone"
            other.stdin.close()
            assert other.wait(60) == 0
    assert not list(Path("/dev/shm").glob(f"expert-prefetch-store-*-{name}"))


@pytest.mark.engine
def test_another_checkpoint_is_refused_by_name_before_anything_is_loaded(tmp_path):
    name = uuid.uuid4().hex

    def configured(model):
        additional = {"expert_prefetch": {"shared_store": name}}
        arguments = EngineArgs(str(model), additional_config=additional, max_model_len=128, skip_tokenizer_init=True)
        return arguments.create_engine_config()

    member = SharedStore(name, checkpoint_of(configured(TINY_MODEL)), "rank0of1")
    assert configured(TINY_MODEL)
    other = write_checkpoint("mixtral", tmp_path / "other")
    with pytest.raises(
        ConfigError, match=rf"shared_store {name} holds the experts of model .*tiny-moe.*name of its own"
    ):
        configured(other)
    del member
    assert configured(other)
