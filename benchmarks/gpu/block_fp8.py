"""Matrices in FP8 with one scale per 128 x 128 block, as published checkpoints keep them (`weight_scale_inv`)."""

import torch

BLOCK = 128
CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def quantise(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn like `matrix`, whose sides are multiples of 128, and the float32 factor of each block."""
    blocks = _blocks(matrix.float())
    scales = blocks.abs().amax((1, 3)) / torch.finfo(torch.float8_e4m3fn).max
    scaled = blocks / scales[:, None, :, None]
    return scaled.reshape(matrix.shape).to(torch.float8_e4m3fn), scales


def dequantise(matrix: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """float32."""
    return (_blocks(matrix.float()) * scales[:, None, :, None]).reshape(matrix.shape)


def _blocks(matrix: torch.Tensor) -> torch.Tensor:
    rows, columns = matrix.shape
    return matrix.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
