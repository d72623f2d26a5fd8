"""Expert tensors of mixed dtypes and odd row sizes."""

import torch

NUM_EXPERTS = 6


def expert_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Name -> (E, *row); rows of 760, 308, 4, 3 and 257 bytes, any two of them different."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "w13": torch.randn(NUM_EXPERTS, 20, 19, generator=generator).to(torch.bfloat16),
        "w2": torch.randn(NUM_EXPERTS, 11, 7, generator=generator),
        "scale": torch.randn(NUM_EXPERTS, generator=generator),
        "zeros": torch.randint(-128, 127, (NUM_EXPERTS, 3), generator=generator, dtype=torch.int8),
        "code": torch.randint(-128, 127, (NUM_EXPERTS, 257), generator=generator, dtype=torch.int8),
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of `tensor` in one row, so that comparing knows no tolerance, no NaN and no negative zero."""
    return tensor.contiguous().view(-1).view(torch.uint8)
