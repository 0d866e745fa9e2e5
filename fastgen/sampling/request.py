"""The arguments that samplers share, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastgen._arguments import check_images, check_labels, integer
from fastgen.sampling.subject import Conditions, Subject
from fastgen.sampling.truncation import Truncation, make_truncation

Condition = Tensor | Sequence[Tensor] | Mapping[str, Tensor]  # as users give it


@dataclass(frozen=True)
class Request:
    """Checked arguments of a call to `sample`; tensors have a leading dimension of `n`, on the CPU."""

    n: int
    seed: int
    start: int
    labels: Tensor | None
    conditions: Conditions
    temperature: float
    truncation: Truncation
    known: Tensor | None
    mask: Tensor | None


def make_request(
    subject: Subject,
    n: int,
    *,
    seed: int = 0,
    start: int = 0,
    labels: Tensor | int | None = None,
    condition: Condition | None = None,
    examples: Conditions | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    known: Tensor | None = None,
    mask: Tensor | None = None,
) -> Request:
    """Check and normalise. examples: what the conditions of one sample must look like, if that is known.

    Raises:
        ValueError, TypeError: naming the argument, what was expected and what came.
    """
    n = integer("n", n, 0, 2**31 - 1)
    seed = integer("seed", seed, 0, 2**64 - 1)
    start = integer("start", start, 0, 2**62 - 1)
    if isinstance(temperature, bool) or not isinstance(temperature, Real):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not (temperature > 0 and math.isfinite(temperature)):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    truncation = make_truncation(top_k, top_p)
    subject.head.keeping(truncation)  # or say why not
    labels = check_labels(labels, n, subject.num_classes)
    conditions = check_condition(subject, condition)
    if examples is not None and list(conditions) != list(examples):
        raise ValueError(f"condition must be {_form(examples)}, as the Sampler's example is, got {_form(conditions)}")
    for key, value in conditions.items():
        conditions[key] = _for_each(_name(key, conditions), value, n, None if examples is None else examples[key])
    if (known is None) != (mask is None):
        raise ValueError("known and mask go together: images, and which of their pixels are given")
    if known is not None and mask is not None:
        known = images_of("known", known, subject, n)
        mask = _mask(mask, n, subject.image_shape)
    return Request(n, seed, start, labels, conditions, float(temperature), truncation, known, mask)


def check_condition(subject: Subject, condition: Condition | None) -> Conditions:
    """Its tensors on the CPU; floats in the dtype of the module."""
    if condition is None:
        return {}
    parts: Mapping[Any, Any] = condition if isinstance(condition, Mapping) else {0: condition}
    if isinstance(condition, tuple | list):
        parts = dict(enumerate(condition))
    result: Conditions = {}
    for key, value in parts.items():
        name = _name(key, parts)
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        result[key] = value.detach().to("cpu", subject.like.dtype if value.is_floating_point() else value.dtype)
        if result[key].isnan().any():
            raise ValueError(f"{name} must not hold NaN")
    if isinstance(condition, Mapping) and not all(isinstance(key, str) for key in result):
        raise TypeError(f"condition must have names of arguments as keys, got {list(result)}")
    return result


def _name(key: int | str, parts: Mapping[Any, Any]) -> str:
    return "condition" if list(parts) == [0] else f"condition[{key!r}]"


def _form(conditions: Conditions) -> str:
    """What holds so many tensors, or those of these names."""
    keys = list(conditions)
    if not keys or keys == [0]:
        return "a tensor" if keys else "nothing"
    return f"a tuple of {len(keys)}" if 0 in keys else f"a dict of {', '.join(map(str, keys))}"


def _for_each(name: str, condition: Tensor, n: int, example: Tensor | None) -> Tensor:
    """For each of n samples."""
    got = tuple(condition.shape)
    if example is None:
        if got[:1] not in ((n,), (1,)):
            raise ValueError(f"{name} must have shape ({n}, ...), or (1, ...) for all samples, got {got}")
        return condition.expand(n, *got[1:])
    if condition.dtype != example.dtype:
        expected = "of floats" if example.is_floating_point() else f"of {example.dtype}"
        raise TypeError(f"{name} must be a tensor {expected}, as the Sampler's example is, got {condition.dtype}")
    shape = tuple(example.shape)
    if got not in (shape, (1, *shape), (n, *shape)):
        raise ValueError(f"{name} must have shape {(n, *shape)}, or {shape} for all samples, got {got}")
    return condition.expand(n, *shape)


def images_of(name: str, images: Tensor, subject: Subject, n: int | None = None) -> Tensor:
    """Levels [N, C, H, W] on the CPU; [C, H, W] is expanded to n images.

    Raises:
        TypeError, ValueError: they are not the subject's, or there are not n.
    """
    if isinstance(images, Tensor):
        images = images.cpu()
        if images.dim() == 3 and n is not None:
            images = images.expand(n, *images.shape)
    check_images(images, subject.image_shape, subject.head.levels, dtype=subject.head.dtype, name=name)
    if n is not None and len(images) != n:
        raise ValueError(f"{name}: expected {n} images, got {len(images)}")
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
