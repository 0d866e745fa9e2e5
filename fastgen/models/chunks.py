"""Images made a fixed number at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 16  # samples per pass through a generator or decoder


def in_chunks(
    draw: Callable[..., Tensor], *given: Tensor | None, shape: Sequence[int], progress: bool = False
) -> Tensor:
    """The images that ``draw`` makes of tensors with an element for each: uint8 [N, *shape], on the CPU.

    Always `CHUNK` samples at a time, zeros behind the last ones, because a convolution may round differently for
    another batch size.

    Args:
        draw: levels [CHUNK, *shape] of [CHUNK, ...] each, or None where None is given.
        given: [N, ...] each, or None; the first is not None.
        shape: of an image.
        progress: show a progress bar on stderr.
    """
    from tqdm import tqdm

    assert given[0] is not None
    n = len(given[0])
    images = torch.empty(n, *shape, dtype=torch.uint8, device="cpu")
    for i in tqdm(range(0, n, CHUNK), unit=f"x{CHUNK} images", disable=not progress, leave=False):
        part = slice(i, i + CHUNK)
        levels = draw(*(None if value is None else _whole_chunk(value[part]) for value in given))
        images[part] = levels[: n - i].cpu()
    return images


def _whole_chunk(values: Tensor) -> Tensor:
    """[n, ...] with n <= CHUNK -> [CHUNK, ...], zeros behind."""
    return F.pad(values, (0, 0) * (values.dim() - 1) + (0, CHUNK - len(values)))
