"""Feature maps [N, C, H, W] in one of two orders: contiguous ones are planes, the others are made channels-last."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def planar(*maps: Tensor) -> bool:
    """Whether all are contiguous, and some of them not channels-last as well."""
    return all(x.is_contiguous() for x in maps) and not all(
        x.is_contiguous(memory_format=torch.channels_last) for x in maps
    )


def arranged(maps: Tensor, planar: bool) -> Tensor:
    return maps.contiguous(memory_format=_memory_format(planar))


def empty(like: Tensor, shape: Sequence[int], planar: bool) -> Tensor:
    """Uninitialised."""
    memory_format = _memory_format(planar)
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=memory_format)


def _memory_format(planar: bool) -> torch.memory_format:
    return torch.contiguous_format if planar else torch.channels_last
