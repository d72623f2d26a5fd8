"""How much of an expert tensor is a layer's own, and how much all layers share: arithmetic only."""

from typing import NamedTuple


class Extent(NamedTuple):
    """Bytes of one expert tensor of E rows: its private pages, and the shared ones behind them."""

    private: int
    shared: int

    @classmethod
    def of(cls, row_bytes: int, num_experts: int, num_slots: int, page: int) -> "Extent":
        """The private pages are those up to the end of the last slot.

        `page`: bytes that can be mapped at least. With a slot for every expert nothing is shared.
        """
        total = -(-num_experts * row_bytes // page) * page
        private = min(-(-num_slots * row_bytes // page) * page, total)
        return cls(private, total - private)
