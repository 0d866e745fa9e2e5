"""The arguments that samplers share, checked once."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from numbers import Real
from typing import SupportsIndex

import torch
from torch import Tensor

from fastgen._arguments import check_labels
from fastgen.sampling.heads import Head
from fastgen.sampling.subject import Subject


@dataclass(frozen=True)
class Request:
    """Checked arguments of a call to `sample`; tensors have a leading dimension of `n`, on the CPU."""

    n: int
    seed: int
    start: int
    labels: Tensor | None
    condition: Tensor | None
    temperature: float
    known: Tensor | None
    mask: Tensor | None


def make_request(
    subject: Subject,
    n: int,
    *,
    seed: int = 0,
    start: int = 0,
    labels: Tensor | int | None = None,
    condition: Tensor | None = None,
    example: Tensor | None = None,
    temperature: float = 1.0,
    known: Tensor | None = None,
    mask: Tensor | None = None,
) -> Request:
    """Check and normalise. example: what the condition of one sample must look like, if that is known.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    n = _integer("n", n, 0, 2**31 - 1)
    seed = _integer("seed", seed, 0, 2**64 - 1)
    start = _integer("start", start, 0, 2**62 - 1)
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    labels = check_labels(labels, n, subject.num_classes)
    if condition is not None:
        condition = _condition(check_condition(subject, condition), n, example)
    if (known is None) != (mask is None):
        raise ValueError("known and mask go together: images, and which of their pixels are given")
    if known is not None and mask is not None:
        known = check_images("known", known, subject.image_shape, subject.head, n)
        mask = _mask(mask, n, subject.image_shape)
    return Request(n, seed, start, labels, condition, float(temperature), known, mask)


def check_condition(subject: Subject, condition: Tensor) -> Tensor:
    """On the CPU; floats in the dtype of the module."""
    if not isinstance(condition, Tensor):
        raise TypeError(f"condition must be a tensor, got {type(condition).__name__}")
    condition = condition.detach().to("cpu", subject.like.dtype if condition.is_floating_point() else condition.dtype)
    if condition.isnan().any():
        raise ValueError("condition must not hold NaN")
    return condition


def _condition(condition: Tensor, n: int, example: Tensor | None) -> Tensor:
    """For each of n samples."""
    got = tuple(condition.shape)
    if example is None:
        if got[:1] not in ((n,), (1,)):
            raise ValueError(f"condition must have shape ({n}, ...), or (1, ...) for all samples, got {got}")
        return condition.expand(n, *got[1:])
    if condition.dtype != example.dtype:
        expected = "of floats" if example.is_floating_point() else f"of {example.dtype}"
        raise TypeError(f"condition must be a tensor {expected}, as the Sampler's example is, got {condition.dtype}")
    shape = tuple(example.shape)
    if got not in (shape, (1, *shape), (n, *shape)):
        raise ValueError(f"condition must have shape {(n, *shape)}, or {shape} for all samples, got {got}")
    return condition.expand(n, *shape)


def _integer(name: str, value: SupportsIndex, low: int, high: int) -> int:
    """As an int: NumPy's integers pass, too."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if not low <= number <= high:
        raise ValueError(f"{name} must be in {low}..{high}, got {value}")
    return number


def check_images(
    name: str, images: Tensor, image_shape: tuple[int, int, int], head: Head, n: int | None = None
) -> Tensor:
    """Levels [N, C, H, W] on the CPU; [C, H, W] is expanded to n images."""
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(images).__name__}")
    if images.dtype != head.dtype:
        raise TypeError(f"{name} must be {str(head.dtype).removeprefix('torch.')} levels, got {images.dtype}")
    images = images.cpu()
    if images.dim() == 3 and n is not None:
        images = images.expand(n, *images.shape)
    if images.dim() != 4 or tuple(images.shape[1:]) != tuple(image_shape) or (n is not None and images.shape[0] != n):
        raise ValueError(
            f"{name} must have shape ({', '.join(map(str, ('N' if n is None else n, *image_shape)))}), "
            f"got {tuple(images.shape)}"
        )
    if images.numel() and not 0 <= int(images.min()) <= int(images.max()) < head.levels:
        worst = int(images.max()) if images.min() >= 0 else int(images.min())
        raise ValueError(f"{name} must hold levels in 0..{head.levels - 1}, got {worst}")
    return images


def _mask(mask: Tensor, n: int, image_shape: tuple[int, int, int]) -> Tensor:
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be a bool tensor, got {mask.dtype if isinstance(mask, Tensor) else type(mask).__name__}"
        )
    size = tuple(image_shape[1:])
    if tuple(mask.shape) not in (size, (n, *size)):
        raise ValueError(f"mask must have shape {size} or {(n, *size)}, got {tuple(mask.shape)}")
    return mask.cpu().expand(n, *size)
