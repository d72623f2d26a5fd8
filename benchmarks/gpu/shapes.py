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
    vocab: int = 151_936
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


RESIDENCIES = (0.5, 0.25, 1.0, 0.75, 0.125)
"""Shares of the experts with a slot, the most telling first."""


@dataclass(frozen=True)
class ServingPlan:
    """What is served by vLLM, and how it is measured. `emulated_gbps`: what the plugin emulates where there is no GPU.
    `variants`: names of variants.py; all of them where empty."""

    shape: MoeShape
    batches: tuple[int, ...]
    rounds: int
    num_tokens: int
    exact_prompts: int
    emulated_gbps: float | None = None
    residencies: tuple[float, ...] = RESIDENCIES
    variants: tuple[str, ...] = ()
    num_prompt_tokens: int = 32

    @staticmethod
    def of(on_gpu: bool, quick: bool) -> "ServingPlan":
        """On a GPU a quarter of the layers of Qwen3-30B-A3B: six engines then fit side by side into 128 GiB of host
        memory, and start within the time of a lease. Without one a tiny model of the same architecture."""
        if on_gpu:
            plan = ServingPlan(MoeShape(num_layers=12), (1, 4, 8, 16, 32), rounds=2, num_tokens=40, exact_prompts=33)
            few = replace(plan.shape, num_layers=4)
            return replace(plan, shape=few, batches=(1, 8), exact_prompts=8) if quick else plan
        shape = MoeShape(4, 32, 4, hidden=256, intermediate=64, num_heads=4, num_kv_heads=1, head_size=64, vocab=2048)
        plan = ServingPlan(shape, (1, 4), rounds=4, num_tokens=48, exact_prompts=16, emulated_gbps=0.1)
        pair = ("all resident", "cache + look-ahead")
        return replace(plan, batches=(1,), exact_prompts=4, residencies=(0.5,), variants=pair) if quick else plan
