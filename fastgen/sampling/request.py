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
from fastgen.sampling.guidance import Guidance, check_scale
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
    guidance: Guidance | None

    def params(self, subject: Subject, images: Tensor, samples: slice | Tensor = slice(None)) -> Tensor:
        """Head parameters [n, C*K, H, W] of levels of these samples, by the module itself."""
        each = [subject.params(images, *of_samples(*given, samples)) for given in self.inputs()]
        return each[0] if self.guidance is None else self.guidance.of(*each)

    def inputs(self) -> list[tuple[Tensor | None, Conditions]]:
        """Labels and conditions; with guidance, those of nothing, too."""
        null = [] if self.guidance is None else [(self.guidance.labels, self.guidance.conditions)]
        return [(self.labels, self.conditions), *null]


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
    guidance_scale: float = 1.0,
    null_labels: Tensor | int | None = None,
    null_condition: Condition | None = None,
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
    conditions = _conditions(subject, condition, n, examples)
    guidance = None
    scale = check_scale(guidance_scale, subject.head)
    if scale != 1:
        if null_labels is None and null_condition is None:
            raise ValueError("guidance_scale needs null_labels or a null_condition: what it leads away from")
        of_labels = labels if null_labels is None else check_labels(null_labels, n, subject.num_classes)
        null = conditions
        if null_condition is not None:
            null = _conditions(subject, null_condition, n, examples, "null_condition")
        if set(null) != set(conditions):
            raise ValueError(f"null_condition must be {_form(conditions)}, as condition is, got {_form(null)}")
        guidance = Guidance(scale, of_labels, {key: null[key] for key in conditions})
    if (known is None) != (mask is None):
        raise ValueError("known and mask go together: images, and which of their pixels are given")
    if known is not None and mask is not None:
        known = images_of("known", known, subject, n)
        mask = _mask(mask, n, subject.image_shape)
    return Request(n, seed, start, labels, conditions, float(temperature), truncation, known, mask, guidance)


def _conditions(
    subject: Subject, condition: Condition | None, n: int, examples: Conditions | None, name: str = "condition"
) -> Conditions:
    """For each of n samples, in the order of the examples."""
    parts = check_condition(subject, condition, name)
    if examples is None:
        return {key: _for_each(_name(name, key, parts), value, n, None) for key, value in parts.items()}
    if set(parts) != set(examples):
        raise ValueError(f"{name} must be {_form(examples)}, as the Sampler's example is, got {_form(parts)}")
    return {key: _for_each(_name(name, key, parts), parts[key], n, example) for key, example in examples.items()}


def of_samples(
    labels: Tensor | None, conditions: Conditions, samples: slice | Tensor
) -> tuple[Tensor | None, Conditions]:
    return None if labels is None else labels[samples], {key: t[samples] for key, t in conditions.items()}


def check_condition(subject: Subject, condition: Condition | None, name: str = "condition") -> Conditions:
    """Its tensors on the CPU; floats in the dtype of the module."""
    if condition is None:
        return {}
    parts: Mapping[Any, Any] = condition if isinstance(condition, Mapping) else {0: condition}
    if isinstance(condition, tuple | list):
        parts = dict(enumerate(condition))
    result: Conditions = {}
    for key, value in parts.items():
        own = _name(name, key, parts)
        if not isinstance(value, Tensor):
            raise TypeError(f"{own} must be a tensor, got {type(value).__name__}")
        result[key] = value.detach().to("cpu", subject.like.dtype if value.is_floating_point() else value.dtype)
        if result[key].isnan().any():
            raise ValueError(f"{own} must not hold NaN")
    if isinstance(condition, Mapping) and not all(isinstance(key, str) for key in result):
        raise TypeError(f"{name} must have names of arguments as keys, got {list(result)}")
    return result


def _name(name: str, key: int | str, parts: Mapping[Any, Any]) -> str:
    return name if list(parts) == [0] else f"{name}[{key!r}]"


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
