"""The proof at start passes kernels that read an expert's rows and nothing else, and copies that are whole; it names
the others. Each fault is planted alone."""

from types import SimpleNamespace

import pytest
import torch

from vllm_expert_prefetch.cache.create import create_caches, create_shared_rows
from vllm_expert_prefetch.memory.host_memory import HostMemoryOptions
from vllm_expert_prefetch.memory.host_store import HostStore
from vllm_expert_prefetch.memory.link import EmulatedLink
from vllm_expert_prefetch.native.library import host_library, why_not_host
from vllm_expert_prefetch.serving import compat, proof
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError
from vllm_expert_prefetch.serving.proof import NUM_TOKENS, prove

pytestmark = pytest.mark.skipif(host_library() is None, reason=str(why_not_host()))

E, H, TOP_K, SLOTS = 8, 32, 2, 3
CPU = torch.device("cpu")


class TidyExperts:
    """Stands for a kernel of vLLM's."""


class Layer:
    """Computes with rows as a kernel does; `fault` says what its kernel reads beside them."""

    layer_name, local_num_experts, hidden_size, top_k, activation = "model.layers.3.mlp.experts", E, H, TOP_K, "silu"
    accelerator = CPU
    moe_config = SimpleNamespace(in_dtype=torch.float32)
    share = None

    def __init__(self, fault=None, kernel=TidyExperts, link=None):
        generator = torch.Generator().manual_seed(1)
        tensors = {"w": torch.randn((E, H, H), generator=generator), "scale": torch.rand(E, generator=generator)}
        self.store = HostStore(tensors, HostMemoryOptions())
        self.caches = create_caches(1, link, CPU)
        self.space = create_shared_rows(self.store.views, SLOTS, 1, CPU).row_space(0)
        self.quant_method = SimpleNamespace(
            moe_kernel=SimpleNamespace(fused_experts=kernel()), topk_indices_dtype=torch.int64
        )
        self.fault, self.num_calls, self.num_caches = fault, 0, 0
        self.padded: set[int] = set()
        self.renew()

    def renew(self):
        self.cache = self.caches.add(0, self.store, self.space, SLOTS, TOP_K, "lru")
        self.num_caches += 1

    def compute(self, x, topk_weights, topk_ids, row_ids):
        self.num_calls += 1
        self.padded |= {len(x)} if (row_ids[-1] == -1).all() and (topk_ids[-1] == -1).all() else set()
        rows = self.cache.tensors
        scales = self.cache.store.views["scale"] if self.fault == "a scale left behind" else rows["scale"]
        weights = rows["w"]
        out = torch.zeros_like(x)
        for place in range(TOP_K):
            row = row_ids[:, place]
            read = topk_ids[:, place] if self.fault == "by the experts' numbers" else row
            product = torch.einsum("tij,tj->ti", weights[read], x) * scales[row, None]
            out += topk_weights[:, place, None] * product
        if self.fault == "padding":
            out[-1] += 0 if (row_ids[-1] == -1).all() else row_ids[-1, 0]
        if self.fault == "wide steps by the order of rows" and len(x) > 1:
            out += 1e-3 * row_ids.argmin()
        return out


def prove_all(layers):
    prove(layers, lambda layer: layer.renew())


def test_a_kernel_that_reads_rows_passes_and_leaves_nothing_resident_or_counted():
    layer = Layer(link=EmulatedLink(0.01, 0.0))
    prove_all([layer])
    words = layer.cache.words()
    assert (words.num_free, words.steps, words.demanded, words.issued) == (SLOTS, 0, 0, 0)
    assert layer.num_caches == 2
    views, rows = layer.store.views["w"], layer.cache.tensors["w"]
    assert not torch.equal(rows, views), "the experts end in another order"
    assert torch.equal(rows.flatten(1).sort(0).values, views.flatten(1).sort(0).values)


def test_what_is_compared_went_through_demands_and_prefetches_of_all_kinds(monkeypatch):
    layer = Layer(link=EmulatedLink(0.002, 0.0))
    seen = []
    monkeypatch.setattr(Layer, "renew", lambda layer: seen.append(layer.cache.words()))
    prove_all([layer])
    words = seen[0]
    assert min(words.hits, words.misses, words.used, words.wide_steps, words.overflow) > 0
    assert words.late + words.claimed + words.cancelled > 0


@pytest.mark.parametrize("fault", ["a scale left behind", "wide steps by the order of rows", "by the experts' numbers"])
def test_a_kernel_that_reads_anything_else_is_named(fault):
    with pytest.raises(TakeoverError, match=r"layers\.3\.mlp\.experts with TidyExperts .* not give the same bits"):
        prove_all([Layer(fault), Layer()])


def stale(cache, ids, row_ids):
    """A record that was never copied."""
    cache.tensors["w"][row_ids[0, 0]] = 0


def shifted(cache, ids, row_ids):
    """A copy of the neighbour's record."""
    cache.tensors["scale"][row_ids[0, 0]] = cache.store.views["scale"][(ids[0, 0] + 1) % E]


def elsewhere(cache, ids, row_ids):
    """A plan that names another row."""
    row_ids[0, 0] = (row_ids[0, 0] + 1) % E


def late(cache, ids, row_ids):
    """A record whose last byte is still on its way."""
    cache.tensors["w"][row_ids[0, 0]].view(torch.uint8).view(-1)[-1] ^= 1


@pytest.mark.parametrize("fault", [stale, shifted, elsewhere, late])
def test_copies_that_are_not_whole_are_named(monkeypatch, fault):
    layer = Layer()
    serve = type(layer.cache).serve

    def serve_with_a_fault(self, topk_ids, rows, speculated=False):
        row_ids = serve(self, topk_ids, rows, speculated)
        fault(self, topk_ids, row_ids)
        return row_ids

    monkeypatch.setattr(type(layer.cache), "serve", serve_with_a_fault)
    name = "scale" if fault is shifted else "w"
    with pytest.raises(TakeoverError, match=rf"layers\.3.*a step of 1 tokens, row \d of {name} does not hold expert"):
        prove_all([layer])


@pytest.mark.parametrize("pads", [False, True])
def test_kernels_are_given_padding_where_plain_vllm_gives_it(monkeypatch, pads):
    monkeypatch.setattr(proof, "gives_padding_no_expert", lambda: pads)
    layer = Layer()
    prove_all([layer])
    assert layer.padded == (set(NUM_TOKENS) - {1} if pads else set())
    with pytest.raises(TakeoverError, match="of 1 tokens differ"):
        prove_all([Layer("padding")])


@pytest.mark.parametrize(
    ("on_gpu", "version", "pads"), [(True, "0.26.0", False), (True, "0.30.1", True), (False, "0.33.0", False)]
)
def test_plain_vllm_gives_padding_no_expert_on_gpus_since_0_30(monkeypatch, on_gpu, version, pads):
    monkeypatch.setattr(compat, "on_cuda_platform", lambda: on_gpu)
    monkeypatch.setattr(compat, "vllm_version", lambda: version)
    assert compat.gives_padding_no_expert() == pads


def test_one_layer_of_each_kind_computes():
    class OtherExperts:
        """Another kernel: another kind."""

    layers = [Layer(), Layer(), Layer(kernel=OtherExperts)]
    prove_all(layers)
    assert [layer.num_calls for layer in layers] == [2 * len(NUM_TOKENS), 0, 2 * len(NUM_TOKENS)]


def test_bits_are_compared_so_that_what_is_not_a_number_may_come_out():
    layer = Layer()
    layer.store.views["scale"][:] = torch.nan
    prove_all([layer])
