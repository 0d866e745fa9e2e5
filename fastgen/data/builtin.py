"""The two data sets that need no download: their images ship inside scikit-learn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .source import Source

PATCH_SIZE = 32


def digits() -> Source:
    """1,797 handwritten digits, 8x8, levels 0..16 (E. Alpaydin and C. Kaynak, UCI repository, 1998)."""
    images, labels = _scikit_learn("load_digits")(return_X_y=True)
    return Source(
        torch.from_numpy(images.reshape(-1, 1, 8, 8)).to(torch.uint8),
        torch.from_numpy(labels).long(),
        num_classes=10,
        levels=17,
    )


def patches(size: tuple[int, int] | None = None) -> Source:
    """Square colour patches of the two photographs (427x640) in scikit-learn, at every quarter of a patch.

    The validation patches come from regions that no training patch touches, see `patch_corners`.

    Args:
        size: (side, side) in pixels, 4..64; default 32x32.
    """
    side, width = size or (PATCH_SIZE, PATCH_SIZE)
    if side != width or not 4 <= side <= 64:
        raise ValueError(f"size of 'patches' must be square, 4..64 pixels a side, got {side}x{width}")
    images, validation = [], []
    for photo in _scikit_learn("load_sample_images")().images:
        photo = torch.from_numpy(photo.copy()).permute(2, 0, 1)
        corners, held_out = patch_corners(photo.shape[1], photo.shape[2], side)
        windows = photo.unfold(1, side, 1).unfold(2, side, 1)  # [3, H', W', side, side], a view
        images.append(windows[:, corners[:, 0], corners[:, 1]].transpose(0, 1))
        validation.append(held_out)
    return Source(torch.cat(images).contiguous(), validation=torch.cat(validation))


def patch_corners(height: int, width: int, side: int) -> tuple[Tensor, Tensor]:
    """Where patches are taken from a photograph.

    The photograph is divided into cells of two patches by two. The tenth of the cells with (3*row + column) % 10 == 7
    is held out. Patches that lie inside a held-out cell are for validation, patches that touch none are for training,
    the others are left out.

    Returns:
        Upper left corners int64 [P, 2] as (y, x), and bool [P], True = validation.
    """
    stride, cell = max(1, side // 4), 2 * side
    y, x = torch.meshgrid(
        torch.arange(0, height - side + 1, stride), torch.arange(0, width - side + 1, stride), indexing="ij"
    )
    y, x = y.flatten(), x.flatten()

    def held_out(y: Tensor, x: Tensor) -> Tensor:
        return (3 * (y // cell) + x // cell) % 10 == 7

    # A patch is smaller than a cell, so its four corner pixels name all the cells that it touches.
    ends = [(y + dy, x + dx) for dy in (0, side - 1) for dx in (0, side - 1)]
    touches = torch.stack([held_out(*end) for end in ends])
    one_cell = (y // cell == (y + side - 1) // cell) & (x // cell == (x + side - 1) // cell)
    validation = touches[0] & one_cell
    keep = validation | ~touches.any(0)
    return torch.stack([y, x], 1)[keep], validation[keep]


def _scikit_learn(function: str) -> Callable[..., Any]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise RuntimeError(f"'digits' and 'patches' need scikit-learn: pip install scikit-learn ({error})") from error
    return getattr(datasets, function)
