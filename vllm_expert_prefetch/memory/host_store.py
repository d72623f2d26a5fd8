"""All routed experts of one layer in host memory, one record per expert."""

import ctypes
from collections.abc import Callable, Mapping

import torch

from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions

SEGMENT_ALIGNMENT_BYTES = 256

TakeShared = Callable[
    [str, int, HostMemoryOptions, Callable[[HostMemory], None], Callable[[HostMemory], str | None]],
    HostMemory,
]
"""`SharedStore.take` for one layer: of a layout, bytes, options, what fills memory, and what finds that it differs."""


class HostStore:
    """The host store of one layer.

    A record holds the rows of every expert tensor (w13, w2, biases, ...) of one expert. In memory of the store's own
    each row starts at a multiple of 256 bytes. `views[name]` has shape (E, *row) and the dtype of the tensor.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        options: HostMemoryOptions,
        may_keep: bool = False,
        take_shared: TakeShared | None = None,
    ) -> None:
        """Copy `tensors`: name -> contiguous tensor (E, *row) of any device and dtype, all with the same E.

        `may_keep`: hold these very tensors where they are on the host and nothing is asked of the memory.
        `take_shared`: have memory from a shared store, where other processes may have put the very same records.
        """
        self.num_experts = next(iter(tensors.values())).shape[0]
        self.memory: HostMemory | None = None
        """None where the tensors were kept."""
        if take_shared is None and may_keep and options.ask_nothing and not any(t.is_cuda for t in tensors.values()):
            self.views = dict(tensors)
            self.record_bytes = sum(row_bytes(tensor) for tensor in tensors.values())
        else:
            offsets: dict[str, int] = {}
            self.record_bytes = 0
            for name, tensor in tensors.items():
                offsets[name] = self.record_bytes
                self.record_bytes += _aligned(row_bytes(tensor))

            def views_of(memory: HostMemory) -> dict[str, torch.Tensor]:
                records = memory.bytes.view(self.num_experts, self.record_bytes)
                return {name: _view(records, tensor, offsets[name]) for name, tensor in tensors.items()}

            num_bytes = self.record_bytes * self.num_experts
            if take_shared is None:
                self.memory = HostMemory(num_bytes, options)
                _fill(views_of(self.memory), tensors)
            else:
                layout = str([(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()])
                self.memory = take_shared(
                    layout,
                    num_bytes,
                    options,
                    lambda memory: _fill(views_of(memory), tensors),
                    lambda memory: _first_difference(views_of(memory), tensors),
                )
            self.views = views_of(self.memory)
        self.num_bytes = self.record_bytes * self.num_experts

    @property
    def is_pinned(self) -> bool:
        """Whether the memory is page-locked."""
        return self.memory is not None and self.memory.is_pinned


def _view(records: torch.Tensor, like: torch.Tensor, offset: int) -> torch.Tensor:
    """The rows of an expert tensor `like` (E, *row), which start at byte `offset` of each record (E, bytes)."""
    rows = records[:, offset : offset + row_bytes(like)].view(like.dtype)
    return rows.view(len(records), *like.shape[1:])


def _fill(views: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        for target, row in zip(views[name], tensor, strict=True):  # row by row: a GPU copies without a detour
            target.copy_(row, non_blocking=True)
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.synchronize()


def _first_difference(views: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]) -> str | None:
    """Where `views` are not `tensors`, bit by bit; None where they are."""
    compare = ctypes.CDLL(None).memcmp
    for name, tensor in tensors.items():
        for expert, (there, row) in enumerate(zip(views[name], tensor, strict=True)):
            own = row.cpu().contiguous()
            if compare(ctypes.c_void_p(there.data_ptr()), ctypes.c_void_p(own.data_ptr()), ctypes.c_size_t(own.nbytes)):
                return f"{name} of expert {expert}"
    return None


def row_bytes(tensor: torch.Tensor) -> int:
    """Bytes of one row of a contiguous tensor (E, *row)."""
    return tensor[0].numel() * tensor.element_size()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES
