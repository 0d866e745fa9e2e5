"""Pass 2 for what the condition adds to scores (`fastgen.sampling.scores`): masks of a text's padding, say.

Their values come with each batch. What they are for a key must be the same for all heads and queries that see it; which
queries may see it at all is taken from the example, and must hold for all conditions.
"""

from __future__ import annotations

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
    """What is added to the scores of a key is not the same for all that see it."""


def of_condition(tracer: Tracer, value: Any) -> bool:
    """Whether it depends on labels or condition, but not on the image."""
    return isinstance(value, Tensor) and tracer.tape.depends(value) and not tracer.depends(value)


def added(tracer: Tracer, known: Scores, tensor: Tensor, value: Tensor, factor: float) -> Scores:
    """Scores, of which there is a tensor, plus a factor times a value of the condition."""

    def arranged(value: Tensor) -> Tensor:
        return arrange(value.float() * factor)

    arrange = _arranging(known, tensor, value)
    return _plus(tracer, known, tracer.tape.call(arranged, value))


def filled(tracer: Tracer, known: Scores, tensor: Tensor, mask: Tensor, number: float) -> Scores:
    """Scores, of which there is a tensor, with a number where a mask of the condition says."""
    if not number <= MASKED:
        raise LayoutError("of products of queries and keys by a mask of the condition and a number that masks nothing")
    number = number if number == -torch.inf else _FILLED

    def arranged(mask: Tensor) -> Tensor:
        return arrange(torch.where(mask.bool(), number, 0.0))

    arrange = _arranging(known, tensor, mask)
    return _plus(tracer, known, tracer.tape.call(arranged, mask))


def _plus(tracer: Tracer, known: Scores, value: Tensor) -> Scores:
    return replace(known, given=value if known.given is None else tracer.tape.call(torch.add, known.given, value))


def _arranging(known: Scores, tensor: Tensor, value: Tensor) -> Any:
    """What makes of a value beside a tensor of scores [samples, heads or 1, queries or 1, keys]."""
    if known.swapped or known.softmax:
        raise LayoutError("of products of keys and queries, or their softmax, and what depends on the condition")
    if np.broadcast_shapes(value.shape, tensor.shape) != tensor.shape:
        raise LayoutError("that repeats products of queries and keys")
    shape, axes = tuple(tensor.shape), known.axes(tensor)
    each_head = known.by_sample and [shape[d] for d in axes[:-2]] == list(known.query.shape[:2])

    def arrange(value: Tensor) -> Tensor:
        value = value.expand(shape).permute(axes)
        if not value.stride(-2):
            value = value[..., :1, :]
        if each_head:
            return value if value.stride(1) else value[:, :1]
        return known.split(value.reshape(known.shape[0], *value.shape[-2:]))

    return arrange


def of_keys(tracer: Tracer, known: Scores, queries: Order, keys: Order) -> tuple[Scores, Ref]:
    """What of `known.given` differs between samples, a plane of the keys in an order; the scores with a bias that says
    which keys each query can see whatever the condition.
    """
    if known.given is None:
        return known, nothing()
    if known.given.shape[2] > 1:
        seen = torch.zeros(known.given.shape[2:], dtype=torch.bool)
        for value in tracer.tape.variants(known.given):
            seen |= (value > MASKED).any(0).any(0)
        known = replace(known, bias=torch.where(seen, known.bias, -torch.inf))
    visible = ((known.bias > MASKED) & (known.weight != 0)).any(0).expand(known.shape[1:])
    asked = torch.zeros(len(visible), dtype=torch.bool)
    asked[queries.index[0][queries.index[0] >= 0]] = True
    visible, hidden = visible & asked[:, None], ~visible & asked[:, None]
    places = keys.index[0]
    names = tracer.tape.names

    def grid(value: Tensor) -> Tensor:
        """[samples, heads, queries, keys] -> [samples, 1, height, width]"""
        each_query = value.shape[2] > 1
        seen = visible if each_query else visible.any(0, keepdim=True)
        if each_query and ((value > MASKED) & hidden).any():
            raise UnevenMask(
                f"a mask that depends on {names} lets positions see what the Sampler's example lets none see: make the "
                "Sampler with an example that masks as little as possible"
            )
        most = torch.where(seen, value, -torch.inf).amax((1, 2))
        least = torch.where(seen, value, torch.inf).amin((1, 2))
        if not ((most == least) | (most <= MASKED) | ~seen.any(0)).all():
            raise UnevenMask(f"a mask that depends on {names} and masks a key for some queries or heads alone")
        return torch.where(places >= 0, most[:, places.clamp(min=0)], -torch.inf)[:, None]

    try:
        plane = tracer.tape.call(grid, known.given)
    except UnevenMask as error:
        raise LayoutError(f"with {error}") from None
    _, channels, height, width = plane.shape
    node = tracer.graph.add(Condition(tracer.module, channels, height, width, tensor=plane))
    return known, tracer.graph.whole(node)
