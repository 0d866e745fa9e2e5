"""Pass 2 for rotary position embeddings: queries and keys whose channels are turned in pairs (Su et al. 2021,
"RoFormer", section 3.4.2).

There are many ways to write the turn. They take every second channel, or put beside each other what was computed apart:
programs of one channel, or of half a head. Whatever the way, a channel is the sum of two channels of a product, each
times a constant of its position. So the product is made with its columns in both orders, and all channels of all heads
are one program: first * factor + second * other factor.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.graph import Constant, LayoutError, Linear, Node, Pointwise, Ref
from fastgen.sampling.planes import pointwise_4d

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


def turned(tracer: Tracer, codes: Tensor, heads: int) -> Tensor:
    """Codes [N, heads * depth, h, w] of the same queries or keys; those that are rotated, of one program."""
    each = codes.unflatten(1, (heads, -1))
    apart = [h == 0 or not torch.equal(each[:, h], each[:, h - 1]) for h in range(heads)]  # others share their keys
    try:
        own = tracer.graph.recognise(each[:, torch.tensor(apart)].flatten(1, 2))
        pairs = _pairs(_terms(tracer, own, (codes.shape[2], codes.shape[3])))
        result = _as_program(tracer, *pairs)
    except LayoutError:
        return codes
    index = torch.tensor(apart).cumsum(0) - 1
    return result.unflatten(1, (sum(apart), -1))[:, index].flatten(1, 2)


@dataclass(eq=False)
class _Terms:
    """Channel c of a frame is the sum over t of factor[t, c] * plane[t, c][channel[t, c]], in place. Plane -1: none.

    plane, channel: int64 [T, C]. factor: float32 [T, C, h, w].
    """

    plane: np.ndarray
    channel: np.ndarray
    factor: Tensor


def _terms(tracer: Tracer, ref: Ref, size: tuple[int, int]) -> _Terms:
    """Of a frame of this size."""
    parts = []
    for p in np.unique(ref.plane):
        here = np.flatnonzero(ref.plane == p)
        if p < 0:
            continue
        node = tracer.graph.nodes[p]
        if node.given or (node.height, node.width) != size or node.stride != ref.stride:
            raise LayoutError
        if ref.dy[here].any() or ref.dx[here].any():
            raise LayoutError
        parts.append((here, _terms_of(tracer, node, ref.channel[here])))
    most, count = max((len(part.plane) for _, part in parts), default=0), len(ref.plane)
    result = _Terms(
        np.full((most, count), -1), np.zeros((most, count), dtype=np.int64), torch.zeros(most, count, *size)
    )
    for here, part in parts:
        result.plane[: len(part.plane), here] = part.plane
        result.channel[: len(part.plane), here] = part.channel
        result.factor[: len(part.plane), torch.from_numpy(here)] = part.factor
    return result


_LINEAR = ("copy", "neg", "add", "sub", "mul", "div")


def _terms_of(tracer: Tracer, node: Node, channels: np.ndarray) -> _Terms:
    """Of some channels of a plane."""
    size = (node.height, node.width)
    operands = [o.take(channels) if isinstance(o, Ref) else o for o in getattr(node, "operands", ())]
    if isinstance(node, Pointwise) and node.op in _LINEAR:
        given = [_factor(tracer, o, size) for o in operands]
        dependent = [o for o, g in zip(operands, given, strict=True) if isinstance(o, Ref) and g is None]
        if node.op in ("mul", "div") and len(dependent) == 1 and (node.op == "mul" or given[0] is None):
            found, factor = _terms(tracer, dependent[0], size), next(g for g in given if g is not None)
            return replace(found, factor=found.factor / factor if node.op == "div" else found.factor * factor)
        if node.op not in ("mul", "div") and len(dependent) == len(operands):
            parts = [_terms(tracer, o, size) for o in dependent]
            if node.op == "neg" or node.op == "sub":
                parts[-1] = replace(parts[-1], factor=-parts[-1].factor)
            plane, channel = (np.concatenate([getattr(p, v) for p in parts]) for v in ("plane", "channel"))
            return _Terms(plane, channel, torch.cat([p.factor for p in parts]))
    return _Terms(np.full((1, len(channels)), node.id), channels[None], torch.ones(1, len(channels), *size))


def _factor(tracer: Tracer, operand: Ref | float, size: tuple[int, int]) -> Tensor | None:
    """The values [C, h, w] of an operand that depends on parameters alone."""
    if not isinstance(operand, Ref):
        return torch.full((1, 1, 1), operand)
    nodes = [(p, tracer.graph.nodes[p]) for p in np.unique(operand.plane)]
    if not all(p >= 0 and isinstance(node, Constant) for p, node in nodes) or operand.dy.any() or operand.dx.any():
        return None
    result = torch.empty(len(operand.plane), *size)
    for p, node in nodes:
        here = np.flatnonzero(operand.plane == p)
        if not node.broadcast and (node.height, node.width) != size:
            return None
        result[torch.from_numpy(here)] = node.data[torch.from_numpy(operand.channel[here])]
    return result


_Slots = tuple[int, np.ndarray, Tensor]  # plane; channels and factors of its first and of its second order


def _pairs(terms: _Terms) -> _Slots:
    """The plane whose channels are turned; which ones, int64 [2, C], and their factors [2, C, h, w]. The first ones
    follow each other as far as possible.

    Raises:
        LayoutError: there is nothing of the kind.
    """
    there = (terms.plane >= 0) & (terms.factor != 0).flatten(2).any(2).numpy()
    planes = np.unique(terms.plane[there])
    if len(planes) != 1 or there.sum(0).max(initial=0) != 2 or there.sum(0).min(initial=2) < 1:
        raise LayoutError
    order = np.argsort(~there, axis=0, kind="stable")[:2]
    there = np.take_along_axis(there, order, 0)
    channel = np.take_along_axis(terms.channel, order, 0)
    channel[1] = np.where(there[1], channel[1], channel[0])  # times zero
    before, swap = -1, np.zeros(channel.shape[1], dtype=bool)
    following = np.append(channel[:, 1:], [[-1], [-1]], axis=1)
    for c, (a, b) in enumerate(channel.T.tolist()):
        if before + 1 in (a, b):
            swap[c] = a != before + 1
        else:
            begins = [v + 1 in following[:, c] for v in (a, b)]
            swap[c] = (not begins[0], a) > (not begins[1], b)
        before = b if swap[c] else a
    order[:, swap], channel[:, swap] = order[::-1, swap], channel[::-1, swap]
    index = torch.from_numpy(order)[..., None, None].expand(-1, -1, *terms.factor.shape[2:])
    return int(planes[0]), channel, terms.factor.gather(0, index)


def _as_program(tracer: Tracer, plane: int, channel: np.ndarray, factor: Tensor) -> Tensor:
    """Codes of factor[0] * first + factor[1] * second, of the channels of a plane in two orders."""
    graph, count = tracer.graph, channel.shape[1]
    node = graph.nodes[plane]
    if isinstance(node, Linear):
        both = graph.whole(_in_order(tracer, node, channel.ravel()))
        orders = both.take(np.arange(count)), both.take(np.arange(count, 2 * count))
    else:
        orders = graph.whole(node).take(channel[0]), graph.whole(_in_order(tracer, node, channel[1]))
    size = (count, node.height, node.width)
    parts = []
    for order, values in zip(orders, factor, strict=True):
        pointwise_4d(tracer, "mul", [order, graph.whole(_constant(tracer, values))], size=size)
        parts.append(graph.whole(graph.nodes[-1]))
    return pointwise_4d(tracer, "add", parts, size=size)


def _in_order(tracer: Tracer, node: Node, channels: np.ndarray) -> Node:
    """A plane whose channels are those of another one, in this order, computed like them."""
    if node.sequential or not isinstance(node, Linear | Pointwise | Constant):
        raise LayoutError
    made, index = replace(node, channels=len(channels)), torch.from_numpy(channels)
    if isinstance(made, Constant):
        return _constant(tracer, made.data[index])
    if isinstance(made, Linear) and isinstance(node, Linear):
        made.taps = [replace(tap, weight=tap.weight[:, index].contiguous()) for tap in made.taps]
        made.bias = None if made.bias is None else made.bias[index]
        if _alike(node, made):  # channels that are equal changed places: those of a mean
            return node
    if isinstance(made, Pointwise):
        made.operands = [_operand_in_order(tracer, o, channels) if isinstance(o, Ref) else o for o in made.operands]
    return tracer.graph.add(made)


def _alike(a: Linear, b: Linear) -> bool:
    """Whether products of the same channels are equal."""
    same = all(torch.equal(x.weight, y.weight) for x, y in zip(a.taps, b.taps, strict=True))
    return same and (a.bias is None or b.bias is None or torch.equal(a.bias, b.bias))


def _operand_in_order(tracer: Tracer, operand: Ref, channels: np.ndarray) -> Ref:
    """Channels of an operand; where they follow each other less than before, those of new planes."""
    taken = operand.take(channels)
    if taken.breaks().sum() <= operand.breaks().sum():
        return taken
    result = replace(taken, plane=taken.plane.copy(), channel=taken.channel.copy())
    for p in np.unique(taken.plane[taken.plane >= 0]):
        here = taken.plane == p
        with contextlib.suppress(LayoutError):
            result.plane[here] = _in_order(tracer, tracer.graph.nodes[p], taken.channel[here]).id
            result.channel[here] = np.arange(here.sum())
    return result


def _constant(tracer: Tracer, values: Tensor) -> Node:
    """A plane of numbers [C, h, w], the same one for all layers that turn alike."""
    for node in tracer.turns:
        if torch.equal(node.data, values):
            return node
    channels, height, width = values.shape
    node = Constant(tracer.module, channels, height, width, data=values)
    tracer.turns.append(node)
    return tracer.graph.add(node)
