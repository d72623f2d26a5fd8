"""The proof at start, on this very machine: what a layer's kernel is given is what the host store holds, and the kernel
gives the same bits whichever rows the experts are in.

* Copies: steps of random routing go through the layer's own planner and copies, with guesses that are right and wrong
  in between; every row that a step names must hold every byte of its expert. On a GPU the same in a CUDA graph,
  replayed with other routing than it was captured with.
* Kernel: all experts are laid into the row space in their own order, as plain vLLM has them, and then in another one;
  for both the kernel computes the same tokens. A tensor that was not found, a kernel whose rows depend on each other,
  or blocks in another order show as other bits.

One layer of each kind is tried. Nothing has been served yet: its cache is made anew afterwards, so that nothing of this
is resident or counted.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from vllm_expert_prefetch.cache.base import LayerCache, Rows
from vllm_expert_prefetch.config import CONFIG_KEY
from vllm_expert_prefetch.serving.compat import gives_padding_no_expert, kernel_name
from vllm_expert_prefetch.serving.expert_tensors import TakeoverError

if TYPE_CHECKING:
    from vllm_expert_prefetch.serving.layer import CachedRoutedExperts

NUM_TOKENS = (1, 2, 3, 8, 33)
NUM_TOKENS_ON_GPU = (*NUM_TOKENS, 512)
"""Of the steps that are compared: kernels take other tiles, and divide their work in other ways, for other sizes."""
NUM_ROUNDS = 2
"""Of steps of all widths whose copies are compared."""


def prove(layers: "Sequence[CachedRoutedExperts]", renew: "Callable[[CachedRoutedExperts], None]") -> None:
    """Prove one layer of each kind: same kernel, same shapes. `layers`: those with a cache; `renew` gives one another.

    Raises TakeoverError, naming the layer, its kernel, and what helps.
    """
    kinds = {_kind(layer): layer for layer in reversed(layers)}
    for layer in kinds.values():
        _prove_copies(layer)
        renew(layer)
        _prove_kernel(layer)


def _kind(layer: "CachedRoutedExperts") -> tuple[object, ...]:
    assert layer.cache is not None
    shapes = [(name, view.shape, view.dtype) for name, view in layer.cache.store.views.items()]
    return kernel_name(layer.quant_method), type(layer.quant_method), layer.top_k, layer.activation, *shapes


def _prove_copies(layer: "CachedRoutedExperts") -> None:
    cache, generator = layer.cache, torch.Generator().manual_seed(0)
    assert cache is not None
    for width in NUM_TOKENS * NUM_ROUNDS:
        step = Step(cache, layer.accelerator, width)
        step.route(generator)
        step.run()
        compare(cache, layer.layer_name, step, "a step")
        if not cache.on_device:
            continue
        graph = step.capture()
        for _ in range(2):
            step.route(generator)
            graph.replay()
            compare(cache, layer.layer_name, step, "a replayed CUDA graph")
    cache.join()


class Step:
    """One step of a layer alone: a guess, then the routing. Its tensors stay where they are, for replays."""

    def __init__(self, cache: LayerCache, device: torch.device, width: int) -> None:
        self._cache = cache
        self.ids = torch.zeros(width, cache.top_k, dtype=torch.int32, device=device)
        self._guesses = torch.zeros(width, cache.top_k, dtype=torch.int64, device=device)
        self.num_real = width if width == 1 else width - 1
        self._rows: Rows = self.num_real
        if cache.on_device:
            self._rows = torch.arange(width, device=device).masked_fill_(
                torch.arange(width, device=device) >= self.num_real, -1
            )
        self.row_ids = torch.zeros_like(self.ids)

    def route(self, generator: torch.Generator) -> None:
        """Other experts; half of the guesses are right."""
        ids, guesses = (
            torch.rand((len(self.ids), self._cache.num_experts), generator=generator).topk(self._cache.top_k).indices
            for _ in range(2)
        )
        guesses[:, ::2] = ids[:, ::2]
        self.ids.copy_(ids)
        self._guesses.copy_(guesses)

    def run(self) -> None:
        """A row for each id, into `row_ids`."""
        if len(self.ids) > 1:  # of many tokens: what finds no slot comes to overflow rows
            self._cache.preload(self._guesses, self._rows)
        else:
            self._cache.prefetch(self._guesses[0], self._rows)
        self.row_ids.copy_(self._cache.serve(self.ids, self._rows))

    def capture(self) -> torch.cuda.CUDAGraph:
        """The same in a CUDA graph. Joins what was begun outside, and what is begun inside."""
        self._cache.join()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.run()
            self._cache.join()
        return graph


def compare(cache: LayerCache, layer_name: str, step: Step, what: str) -> None:
    """Raise TakeoverError unless every byte of the experts of a step's tokens is in the rows that it names."""
    placed = dict(zip(step.ids[: step.num_real].flatten().tolist(), step.row_ids.flatten().tolist(), strict=False))
    for name, view in cache.store.views.items():
        rows = cache.tensors[name]
        differing = [
            _differs(rows[row], view[expert].to(rows.device, non_blocking=True)) for expert, row in placed.items()
        ]
        if torch.stack(differing).any():
            expert, row = next(pair for pair, differs in zip(placed.items(), differing, strict=True) if differs)
            raise TakeoverError(
                f"{CONFIG_KEY}: {layer_name}: in {what} of {len(step.ids)} tokens, row {row} of {name} does not "
                f"hold expert {expert}, which was copied there. Set prefetch to off, or serve without the plugin; "
                "please report it"
            )


def _differs(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Bits: not a number is as good as any."""
    return (one.reshape(-1).view(torch.uint8) != other.reshape(-1).view(torch.uint8)).any()


@torch.no_grad()
def _prove_kernel(layer: "CachedRoutedExperts") -> None:
    generator = torch.Generator().manual_seed(0)
    num_experts, device = layer.local_num_experts, layer.accelerator
    dtype = layer.quant_method.topk_indices_dtype or torch.int32
    own_order, other_order = torch.arange(num_experts), torch.randperm(num_experts, generator=generator)
    steps = []
    for num_tokens in NUM_TOKENS if device.type == "cpu" else NUM_TOKENS_ON_GPU:
        x = torch.randn((num_tokens, layer.hidden_size), generator=generator)
        scores = torch.rand((num_tokens, num_experts), generator=generator).topk(layer.top_k)
        weights = scores.values / scores.values.sum(-1, keepdim=True)
        if layer.share is not None:
            scores.indices[::2, 0] = -1  # another rank's
        pads = num_tokens > 1 and gives_padding_no_expert()
        if pads:
            scores.indices[-1] = -1
        steps.append((x.to(device, layer.moe_config.in_dtype), weights.to(device), scores.indices, num_tokens - pads))
    outputs = []
    for row_of in (own_order, other_order):
        _lay(layer, row_of.tolist())
        for x, weights, ids, num_real in steps:
            rows = torch.where(ids < 0, ids, row_of[ids]).to(device, dtype)
            # Kernels may write over their input, and give memory that the next call takes again.
            output = layer.compute(x.clone(), weights, ids.to(device, dtype), rows)
            outputs.append(output[:num_real].clone())
    for expected, found in zip(outputs[: len(steps)], outputs[len(steps) :], strict=True):
        differ = expected.view(torch.uint8) != found.view(torch.uint8)
        if differ.any():
            token = int(differ.any(-1).nonzero()[0])
            raise TakeoverError(
                f"{CONFIG_KEY}: {layer.layer_name} with {kernel_name(layer.quant_method)} "
                f"({type(layer.quant_method).__name__}) does not give the same bits when its experts are in other "
                f"rows: {100 * differ.float().mean().item():.2g} % of the bytes of {len(found)} tokens differ, token "
                f"{token} first. Choose another --moe-backend, or serve without the plugin; please report it"
            )


def _lay(layer: "CachedRoutedExperts", row_of: list[int]) -> None:
    """Every expert into the row that `row_of` names, all of them the layer's own or shared."""
    assert layer.cache is not None
    for name, view in layer.cache.store.views.items():
        rows = layer.cache.tensors[name]
        for expert, row in enumerate(row_of):
            rows[row].copy_(view[expert], non_blocking=True)
