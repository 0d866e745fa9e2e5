"""Feature maps [N, C, H, W] as native functions take and give them: dense, channels last; some also take planes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastgen import backends


def channels_last(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Uninitialised."""
    return torch.empty(tuple(shape), dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def to_channels_last(maps: Tensor) -> Tensor:
    return maps.contiguous(memory_format=torch.channels_last)


def planar(*maps: Tensor) -> bool:
    """Whether all are contiguous, and some of them not channels-last as well."""
    return all(x.is_contiguous() for x in maps) and not all(
        x.is_contiguous(memory_format=torch.channels_last) for x in maps
    )


def arranged(maps: Tensor, planar: bool) -> Tensor:
    return maps.contiguous() if planar else to_channels_last(maps)


def empty(like: Tensor, shape: Sequence[int], planar: bool) -> Tensor:
    return like.new_empty(tuple(shape)) if planar else channels_last(like, shape)


def dense_strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    """Of [N, C, H, W], channels last."""
    _, channels, height, width = shape
    return height * width * channels, 1, width * channels, channels


def dense(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.is_contiguous() else tensor.contiguous()


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def native(function: str, dtype: torch.dtype) -> Any:
    """The native function for elements of this type."""
    return getattr(backends.native_cpu(), f"{function}_{str(dtype).removeprefix('torch.')}")
