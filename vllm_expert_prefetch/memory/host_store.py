"""All routed experts of one layer in host memory, one record per expert."""

import torch

from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions

SEGMENT_ALIGNMENT_BYTES = 256


class HostStore:
    """The host store of one layer.

    A record holds the rows of every expert tensor (w13, w2, biases, ...) of one expert. In memory of the store's own
    each row starts at a multiple of 256 bytes. `views[name]` has shape (E, *row) and the dtype of the tensor.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], options: HostMemoryOptions, may_keep: bool = False) -> None:
        """Copy `tensors`: name -> contiguous tensor (E, *row) of any device and dtype, all with the same E.

        `may_keep`: hold these very tensors where they are on the host and nothing is asked of the memory.
        """
        self.num_experts = next(iter(tensors.values())).shape[0]
        self.memory: HostMemory | None = None
        """None where the tensors were kept."""
        if may_keep and options.ask_nothing and not any(t.is_cuda for t in tensors.values()):
            self.views = dict(tensors)
            self.record_bytes = sum(row_bytes(tensor) for tensor in tensors.values())
        else:
            offsets: dict[str, int] = {}
            self.record_bytes = 0
            for name, tensor in tensors.items():
                offsets[name] = self.record_bytes
                self.record_bytes += _aligned(row_bytes(tensor))
            self.memory = HostMemory(self.record_bytes * self.num_experts, options)
            self.views = {name: self._view(tensor, offsets[name]) for name, tensor in tensors.items()}
            self._fill(tensors)
        self.num_bytes = self.record_bytes * self.num_experts

    @property
    def is_pinned(self) -> bool:
        """Whether the memory is page-locked."""
        return self.memory is not None and self.memory.is_pinned

    def _fill(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            for target, row in zip(self.views[name], tensor, strict=True):  # row by row: a GPU copies without a detour
                target.copy_(row, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    def _view(self, like: torch.Tensor, offset: int) -> torch.Tensor:
        assert self.memory is not None
        records = self.memory.bytes.view(self.num_experts, self.record_bytes)
        rows = records[:, offset : offset + row_bytes(like)].view(like.dtype)
        return rows.view(self.num_experts, *like.shape[1:])


def row_bytes(tensor: torch.Tensor) -> int:
    """Bytes of one row of a contiguous tensor (E, *row)."""
    return tensor[0].numel() * tensor.element_size()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES
