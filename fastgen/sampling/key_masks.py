"""Pass 2 for what the condition adds to scores (`fastgen.sampling.scores`): masks of a text's padding, say.

Their values come with each batch, and must be the same for all heads: one for each key, or where queries may have their
own, as in a mask that lets each position of a padded text see itself, one for each query and key. Which queries may see
a key at all is taken from the example, and must hold for all conditions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.graph import Condition, LayoutError, Ref, nothing
from fastgen.sampling.orders import Order

if TYPE_CHECKING:
    from fastgen.sampling.scores import Scores
    from fastgen.sampling.trace import Tracer

# A score as low as this is a mask: beside one that is seen its exponential is zero in float32. People write -1e4, and
# add other biases to it, or divide it with the scores.
MASKED = -1e3
# In place of a finite number that scores are filled with: beside it the scores themselves are nothing, so that a query
# all of whose keys are masked sees all of them alike.
_FILLED = -1e30


class UnevenMask(ValueError):
    """What is added to the scores is not the same for all heads, or not what the example lets one expect."""


def of_condition(tracer: Tracer, value: Any) -> bool:
    """Whether it depends on labels or condition, but not on the image."""
    return isinstance(value, Tensor) and tracer.tape.depends(value) and not tracer.depends(value)


def added(tracer: Tracer, known: Scores, tensor: Tensor, value: Tensor, factor: float) -> Scores:
    """Scores, of which there is a tensor, plus a factor times a value of the condition."""

    def made(value: Tensor) -> Tensor:
        return arrange(value).float() * factor

    arrange = _arranging(tracer, known, tensor, value)
    name = "added", tracer.tape.name(value), factor, *_layout(known, tensor)
    return _plus(tracer, known, _once(tracer, name, made, value))


def filled(tracer: Tracer, known: Scores, tensor: Tensor, mask: Tensor, number: float) -> Scores:
    """Scores, of which there is a tensor, with a number where a mask of the condition says."""
    if not number <= MASKED:
        raise LayoutError("of products of queries and keys by a mask of the condition and a number that masks nothing")
    number = number if number == -torch.inf else _FILLED

    def made(mask: Tensor) -> Tensor:
        return torch.where(arrange(mask).bool(), number, 0.0)

    arrange = _arranging(tracer, known, tensor, mask)
    name = "filled", tracer.tape.name(mask), number, *_layout(known, tensor)
    return _plus(tracer, known, _once(tracer, name, made, mask))


def scaled(tracer: Tracer, known: Scores, factor: Tensor) -> Scores:
    """Scores with what was added to them times a number."""
    if known.given is None:
        return known
    if factor.numel() > 1 or not factor > 0:
        known.check_not_given()
    number = float(factor)
    return replace(known, given=_once(tracer, ("times", id(known.given), number), torch.mul, known.given, number))


def _plus(tracer: Tracer, known: Scores, value: Tensor) -> Scores:
    if known.given is not None:
        value = _once(tracer, ("sum", id(known.given), id(value)), torch.add, known.given, value)
    return replace(known, given=value)


def _once(tracer: Tracer, name: Hashable, func: Callable[..., Tensor], *arguments: Tensor | float) -> Tensor:
    """The result of a function, the one that there is where other layers had the same mask: it is evaluated for every
    sample.
    """
    if name not in tracer.masks:
        try:
            tracer.masks[name] = tracer.tape.call(func, *arguments)
        except UnevenMask as error:
            raise LayoutError(f"with {error}") from None
    return tracer.masks[name]


def _layout(known: Scores, tensor: Tensor) -> tuple[Hashable, ...]:
    """What tells tensors of scores apart."""
    return tensor.shape, tuple(known.axes(tensor)), known.by_sample, known.query.shape[:2]


def _arranging(tracer: Tracer, known: Scores, tensor: Tensor, value: Tensor) -> Callable[[Tensor], Tensor]:
    """What makes of a value beside a tensor of scores [samples, 1, queries or 1, keys]."""
    if known.swapped or known.softmax:
        raise LayoutError("of products of keys and queries, or their softmax, and what depends on the condition")
    if np.broadcast_shapes(value.shape, tensor.shape) != tensor.shape:
        raise LayoutError("that repeats products of queries and keys")
    shape, axes, names = tuple(tensor.shape), known.axes(tensor), tracer.tape.names
    each_head = known.by_sample and [shape[d] for d in axes[:-2]] == list(known.query.shape[:2])

    def arrange(value: Tensor) -> Tensor:
        value = value.expand(shape).permute(axes)
        if not value.stride(-2):
            value = value[..., :1, :]
        if not each_head:
            value = known.split(value.reshape(known.shape[0], *value.shape[-2:]))
        if value.stride(1) and not torch.equal(value, value[:, :1].expand_as(value)):
            raise UnevenMask(f"a mask that depends on {names} and hides a key from some heads alone")
        return value[:, :1]

    return arrange


def of_keys(tracer: Tracer, known: Scores, queries: Order, keys: Order) -> tuple[Scores, Ref]:
    """What of `known.given` differs between samples, a plane of the keys in an order with one channel, or with one for
    each query in its order; the scores with a bias that says which keys each query can see whatever the condition.
    """
    given = known.given
    if given is None:
        return known, nothing()
    rows, places, each_query = queries.index[0].flatten(), keys.index[0], given.shape[2] > 1
    hidden = torch.zeros(known.shape[1:], dtype=torch.bool)
    if each_query:
        asked = torch.zeros(known.shape[1], 1, dtype=torch.bool)
        asked[rows[rows >= 0]] = True
        seen = _ever_seen(tracer, given)
        hidden = ((known.bias > MASKED) & (known.weight != 0)).any(0) & asked & ~seen
        known = replace(known, bias=torch.where(seen, known.bias, -torch.inf))

    def grid(value: Tensor) -> Tensor:
        """[samples, 1, queries or 1, keys] -> [samples, positions of queries or 1, height, width]"""
        if ((value > MASKED) & hidden).any():
            raise UnevenMask(
                f"a mask that depends on {tracer.tape.names} lets positions see what the Sampler's example lets none "
                "see: make the Sampler with an example that masks as little as possible"
            )
        each = value[:, 0, rows.clamp(min=0)] if each_query else value[:, 0]
        return torch.where(places >= 0, each[:, :, places.clamp(min=0)], -torch.inf)

    name = "grid", id(given), *(hashlib.sha256(t.numpy().tobytes()).digest() for t in (hidden, rows, places))
    plane = _once(tracer, name, grid, given)
    made = [n for n in tracer.graph.nodes if isinstance(n, Condition) and n.tensor is plane]
    if not made:
        _, channels, height, width = plane.shape
        made.append(Condition(tracer.module, channels, height, width, tensor=plane))
        tracer.graph.add(made[0])
    return known, tracer.graph.whole(made[0])


def _ever_seen(tracer: Tracer, given: Tensor) -> Tensor:
    """bool [queries, keys]: what some condition shows of [samples, 1, queries, keys]."""
    name = "seen", id(given)
    if name not in tracer.masks:
        seen = torch.zeros(given.shape[2:], dtype=torch.bool)
        for value in tracer.tape.variants(given):
            seen |= (value > MASKED).any(0).any(0)
        tracer.masks[name] = seen
    return tracer.masks[name]
