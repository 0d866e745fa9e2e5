"""Images scaled to another size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

AT_ONCE = 1024  # images in floating point


def cover(images: Tensor, levels: int, size: tuple[int, int]) -> Tensor:
    """Scales images so that they cover a size, and cuts out the centre, as image folders are read.

    Bicubic, in 256 levels whatever the images have: a scaled image has shades between theirs.

    Args:
        images: uint8 levels [N, C, H, W].
        levels: number of levels; ``levels - 1`` becomes 255.
        size: (height, width).

    Returns:
        uint8 [N, C, *size], 256 levels.
    """
    old_height, old_width = images.shape[2:]
    height, width = size
    scale = max(height / old_height, width / old_width)
    scaled = max(height, round(old_height * scale)), max(width, round(old_width * scale))
    top, left = (scaled[0] - height) // 2, (scaled[1] - width) // 2
    result = torch.empty(len(images), images.shape[1], height, width, dtype=torch.uint8)
    for i in range(0, len(images), AT_ONCE):
        part = images[i : i + AT_ONCE].float() * (255 / (levels - 1))
        part = F.interpolate(part, scaled, mode="bicubic", antialias=True, align_corners=False)
        part = part[:, :, top : top + height, left : left + width]
        result[i : i + AT_ONCE] = part.round().clamp(0, 255).to(torch.uint8)
    return result
