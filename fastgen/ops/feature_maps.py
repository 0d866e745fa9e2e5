"""Feature maps [N, C, H, W] as native functions take and give them: dense, channels last.

Those that also take planes arrange them by `fastgen._layouts`.
"""

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
