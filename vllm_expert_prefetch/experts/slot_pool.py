"""Room for C expert records of one layer on the accelerator."""

import torch


class SlotPool:
    """One tensor (C, *row) per expert tensor, in the layout that the kernel reads, zero-filled before its first use.

    `tensors[name]` has shape (C, *row); `records[slot]` are the rows of one slot, in the order of `tensors`.
    """

    def __init__(self, rows_like: dict[str, torch.Tensor], num_slots: int, device: torch.device) -> None:
        """`rows_like`: name -> tensor (E, *row) whose row shape and dtype the slots take."""
        self.num_slots = num_slots
        self.tensors = {
            name: torch.zeros((num_slots, *like.shape[1:]), dtype=like.dtype, device=device)
            for name, like in rows_like.items()
        }
        # Row views are made once: indexing a tensor costs more than copying a small row.
        self.records = list(zip(*(list(tensor) for tensor in self.tensors.values()), strict=True))

    @property
    def num_bytes(self) -> int:
        """Accelerator bytes of all slots."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
