"""What is measured: the model shape, record sizes, and how long each step may take. Sizes in bytes, 1 MB = 10^6."""

from dataclasses import dataclass, replace

MB = 10**6


@dataclass(frozen=True)
class MoeShape:
    """The routed part of a decoder. The default is Qwen3-30B-A3B in bfloat16."""

    num_layers: int = 48
    num_experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    intermediate: int = 768
    num_heads: int = 32
    num_kv_heads: int = 4
    head_size: int = 128
    dtype_bytes: int = 2

    @property
    def row_bytes(self) -> tuple[int, int]:
        """Bytes of one expert's w13 (2I, H) and w2 (H, I)."""
        w2 = self.hidden * self.intermediate * self.dtype_bytes
        return 2 * w2, w2

    @property
    def record_bytes(self) -> int:
        return sum(self.row_bytes)


@dataclass(frozen=True)
class Plan:
    """What the steps measure. `quick` is for rehearsals: the same code, small numbers."""

    shape: MoeShape
    link_bytes: tuple[int, ...]
    record_bytes: tuple[int, ...]
    num_records: tuple[int, ...]
    num_blocks: tuple[int, ...]
    cache_fractions: tuple[float, ...]
    num_decode_steps: int
    context: int
    repeats: int

    @staticmethod
    def full() -> "Plan":
        return Plan(
            MoeShape(),
            link_bytes=(1 * MB, 4 * MB, 16 * MB, 64 * MB, 256 * MB, 1000 * MB),
            record_bytes=(200_192, 1_000_448, 9_437_184, 50_000_128),
            num_records=(1, 2, 4, 8, 16, 64),
            num_blocks=(4, 8, 13, 16, 24, 32, 48, 64),
            cache_fractions=(0.25, 0.5, 0.75),
            num_decode_steps=96,
            context=1024,
            repeats=9,
        )

    @staticmethod
    def small() -> "Plan":
        shape = replace(MoeShape(), num_layers=4, num_experts=32, hidden=512, intermediate=256)
        return replace(
            Plan.full(),
            shape=shape,
            link_bytes=(1 * MB, 4 * MB),
            record_bytes=(200_192, 1_000_448),
            num_records=(1, 4),
            num_blocks=(4, 16),
            cache_fractions=(0.5,),
            num_decode_steps=24,
            context=64,
            repeats=3,
        )
