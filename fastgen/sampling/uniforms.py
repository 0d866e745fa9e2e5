"""The uniforms that images are drawn with; which draw uses which is in the table of `fastgen.ops.philox`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.ops import philox


def image_uniforms(seed: int, start: int, count: int, size: tuple[int, int, int]) -> Tensor:
    """float32 [count, *size] in (0, 1) of samples start, start + 1, ...; size: (uniforms of a pixel, height, width)."""
    channels, height, width = size
    sample = torch.arange(start, start + count, device="cpu").view(-1, 1, 1)
    position = torch.arange(height * width, device="cpu").view(1, -1, 1)
    block = torch.arange((channels + 3) // 4, device="cpu")
    lanes = philox.uniform(seed, block, position, sample)  # [count, H*W, blocks, 4]
    return lanes.flatten(2)[:, :, :channels].transpose(1, 2).reshape(count, channels, height, width).contiguous()
