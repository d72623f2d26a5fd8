"""All routed experts of one layer in host memory, one record per expert."""

import torch

from vllm_expert_prefetch.memory.host_memory import HostMemory, HostMemoryOptions

SEGMENT_ALIGNMENT_BYTES = 256


class HostStore:
    """The host store of one layer.

    A record holds the rows of every expert tensor (w13, w2, biases, ...) of one expert, each row starting at a
    multiple of 256 bytes. `views[name]` has shape (E, *row) and the dtype of the tensor it was filled from.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], options: HostMemoryOptions) -> None:
        """Copy `tensors`: name -> contiguous tensor (E, *row) of any device and dtype, all with the same E."""
        self.num_experts = next(iter(tensors.values())).shape[0]
        offsets: dict[str, int] = {}
        self.record_bytes = 0
        for name, tensor in tensors.items():
            offsets[name] = self.record_bytes
            self.record_bytes += _aligned(row_bytes(tensor))
        self.num_bytes = self.record_bytes * self.num_experts
        self.memory = HostMemory(self.num_bytes, options)
        self.views = {name: self._view(tensor, offsets[name]) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            for target, row in zip(self.views[name], tensor, strict=True):  # row by row: a GPU copies without a detour
                target.copy_(row, non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    def _view(self, like: torch.Tensor, offset: int) -> torch.Tensor:
        records = self.memory.bytes.view(self.num_experts, self.record_bytes)
        rows = records[:, offset : offset + row_bytes(like)].view(like.dtype)
        return rows.view(self.num_experts, *like.shape[1:])


def row_bytes(tensor: torch.Tensor) -> int:
    """Bytes of one row of a contiguous tensor (E, *row)."""
    return tensor[0].numel() * tensor.element_size()


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // SEGMENT_ALIGNMENT_BYTES) * SEGMENT_ALIGNMENT_BYTES
