"""Arguments that models and samplers share, checked once."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import SupportsIndex

import torch
from torch import Tensor


def signed(seed: int) -> int:
    """The int64 with the bits of a seed in 0..2^64-1, as operators and kernels take it."""
    return seed - 2**64 if seed >= 2**63 else seed


def integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """The argument as an int, when it is an integer in low..high; NumPy's integers pass, too.

    Raises:
        TypeError, ValueError: it is not of an integer type, or out of range.
    """
    if not isinstance(value, int):  # which torch.compile need not know the value of
        with contextlib.suppress(TypeError):
            value = operator.index(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {value}")
    return value


def positive(name: str, value: int) -> int:
    """The argument itself, when it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    return value


def describe(value: object) -> str:
    """The dtype of a tensor, or the type of what is none, for messages."""
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def check_image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    """(C, H, W), when it is that."""
    if not isinstance(shape, (tuple, list)) or len(shape) != 3:
        raise ValueError(f"image_shape: expected (channels, height, width), got {shape!r}")
    channels, height, width = (positive("image_shape", size) for size in shape)
    return channels, height, width


def check_levels(levels: int, most: int = 256) -> int:
    """The number of levels, when it is in 2..most; the default is what a byte holds."""
    if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= most:
        raise ValueError(f"levels: expected an integer in 2..{most}, got {levels!r}")
    return levels


def check_images(
    images: Tensor, shape: Sequence[int], levels: int, *, dtype: torch.dtype = torch.uint8, name: str = "images"
) -> None:
    """
    Raises:
        TypeError: images is no tensor of this dtype.
        ValueError: they are not [N, *shape], or a level is not in 0..levels-1.
    """
    if not isinstance(images, Tensor) or images.dtype != dtype:
        kind = str(dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected a tensor of {kind} levels, got {describe(images)}")
    if images.dim() != 4 or tuple(images.shape[1:]) != tuple(shape):
        raise ValueError(f"{name}: expected shape [N, {', '.join(map(str, shape))}], got {list(images.shape)}")
    if images.numel() and levels <= torch.iinfo(dtype).max:
        low, high = (int(level) for level in images.aminmax())
        if low < 0 or high >= levels:
            raise ValueError(f"{name}: expected levels in 0..{levels - 1}, got {low}..{high}")


def check_labels(labels: Tensor | int | None, n: int, num_classes: int | None) -> Tensor | None:
    """The labels of n samples, one for all or one for each, as int64 [n] on the CPU; None for a model without classes.

    Raises:
        ValueError, TypeError: what was expected and what came.
    """
    if num_classes is None:
        if labels is not None:
            raise ValueError("labels were given, but the model has no classes")
        return None
    if labels is None:
        raise ValueError(f"the model is conditional: labels [n] in 0..{num_classes - 1} are needed")
    try:
        labels = torch.as_tensor(labels, device=labels.device if isinstance(labels, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"labels must be an integer or a tensor of {n} integers, got {labels!r:.80}") from None
    if labels.dtype.is_floating_point or labels.dtype in (torch.bool, torch.complex64, torch.complex128):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    labels = labels.to("cpu", torch.int64)
    if labels.dim() == 0:
        labels = labels.expand(n)
    if tuple(labels.shape) != (n,):
        raise ValueError(f"labels must have shape ({n},), got {tuple(labels.shape)}")
    if n and not (0 <= int(labels.min()) and int(labels.max()) < num_classes):
        raise ValueError(f"labels must be in 0..{num_classes - 1}, got {int(labels.min())}..{int(labels.max())}")
    return labels
