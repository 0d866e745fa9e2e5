"""New planes: those of one primitive (`fastgen.sampling.plan.PRIMITIVES`), and for tensors that are no views of planes,
but made of their elements.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.graph import Condition, Constant, LayoutError, Pointwise, Ref, Stride
from fastgen.sampling.orders import PIECES, Order, orders

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


def pointwise(tracer: Tracer, op: str, operands: Sequence[Tensor | float], shape: Sequence[int]) -> Tensor:
    """Codes of op(operands), which have codes broadcastable to `shape` or are numbers."""
    codes = [_expanded(o, tuple(shape)) if isinstance(o, Tensor) else float(o) for o in operands]
    tensors = [c for c in codes if isinstance(c, Tensor)]
    for pieces in PIECES:  # a layout in which all are views of planes is the right one, another may be none
        if len(shape) == 4 and shape[0] == tracer.graph.batch and not _are_tokens(tracer, tensors, pieces):
            with contextlib.suppress(LayoutError):
                return pointwise_4d(tracer, op, codes, pieces=pieces)
        for order in orders(tracer, tensors, shape, pieces):
            with contextlib.suppress(LayoutError):
                return _pointwise_in(tracer, order, op, codes, shape, pieces)
    raise LayoutError


def _are_tokens(tracer: Tracer, tensors: Sequence[Tensor], pieces: int) -> bool:
    """Whether tensors of four dimensions look like feature maps [N, C, h, w] and are none: what would be a channel
    holds several channels of one plane, or, being a single number, the channels are positions.
    """
    single = tensors[0].shape[2:] == (1, 1)
    if not pieces and not single:
        return False
    for codes in tensors:
        plane, _, channel, y, x = tracer.graph.decode(codes[0].numpy())
        dependent = ~tracer.graph.given(plane)
        if single and len(np.unique(np.stack([y, x])[:, dependent], axis=1).T) > 1:
            return True
        where = np.broadcast_to(np.arange(len(plane))[:, None, None], plane.shape)
        found = np.stack([where, plane, channel])[:, dependent]
        if np.unique(found[:2], axis=1).shape != np.unique(found, axis=1)[:2].shape:
            return True
    return False


def _expanded(codes: Tensor, shape: tuple[int, ...]) -> Tensor:
    return codes if codes.shape == shape else codes.expand(shape)


def _pointwise_in(
    tracer: Tracer, order: Order, op: str, codes: Sequence[Tensor | float], shape: Sequence[int], pieces: int
) -> Tensor:
    """Codes of op(operands) in a layout. The planes of results are remembered: formulas go on with them."""
    operands: list[Tensor | Ref | float] = []
    for operand in codes:
        made = tracer.made.get(id(operand))
        if made is not None and made[0]() is operand and made[1] is order:
            operands.append(made[2])
        else:
            operands.append(order.of(operand.reshape(-1)) if isinstance(operand, Tensor) else operand)
    found = pointwise_4d(tracer, op, operands, pieces=pieces, size=order.index.shape[1:])
    tracer.orders[tuple(shape)] = order
    result = order.restored(found, math.prod(shape)).view(*shape)
    tracer.made = {k: m for k, m in tracer.made.items() if m[0]() is not None}
    tracer.made[id(result)] = (weakref.ref(result), order, tracer.graph.whole(tracer.graph.nodes[-1]))
    return result


def pointwise_4d(
    tracer: Tracer,
    op: str,
    operands: Sequence[Tensor | Ref | float],
    multiple: Stride = (1, 1),
    pieces: int = 1,
    size: Sequence[int] = (),
) -> Tensor:
    """Codes of op(operands), which are codes [N, C, h, w], frames of that size, or numbers; without codes, `size` is
    (C, h, w).

    The stride along an axis with one position is anybody's guess; it is made a multiple of `multiple`. pieces: see
    `Tracer.recognise`.
    """
    refs = [tracer.recognise(o, pieces) if isinstance(o, Tensor) else o for o in operands]
    refs = [_in_a_row(tracer, r) if isinstance(r, Ref) else r for r in refs]
    channels, height, width = size or next(o.shape[1:] for o in operands if isinstance(o, Tensor))
    frames = [r for r in refs if isinstance(r, Ref) and not tracer.graph.given(r.plane).all()]
    sy, sx = (max((f.stride[axis] for f in frames), default=1) for axis in (0, 1))
    stride = (math.lcm(sy, multiple[0]) if height == 1 else sy, math.lcm(sx, multiple[1]) if width == 1 else sx)
    at_stride = [tracer.graph.at_stride(r, stride, (height, width)) if isinstance(r, Ref) else r for r in refs]
    return tracer.add(Pointwise(tracer.module, channels, height, width, stride=stride, op=op, operands=at_stride))


def _in_a_row(tracer: Tracer, ref: Ref) -> Ref:
    """A frame whose channels are numbers again and again, as the weight of a norm of each head is: of a constant that
    has them as often.
    """
    breaks = np.flatnonzero(ref.breaks())
    node = tracer.graph.nodes[ref.plane[0]]
    if not len(breaks) or not breaks[0] or ref.plane[0] < 0 or not isinstance(node, Constant) or not node.broadcast:
        return ref
    times, rest = divmod(len(ref.plane), breaks[0] + 1)
    once = ref.take(np.arange(breaks[0] + 1))
    if rest or not all(np.array_equal(np.tile(getattr(once, n), times), getattr(ref, n)) for n in ("plane", "channel")):
        return ref
    kind = (node.id, int(once.channel[0]), int(breaks[0]), times)
    if kind not in tracer.repeated:
        data = node.data[torch.from_numpy(ref.channel)]
        tracer.repeated[kind] = tracer.graph.add(Constant(tracer.module, len(data), 1, 1, data=data))
    return replace(tracer.graph.whole(tracer.repeated[kind]), stride=ref.stride)


def rebuilt(tracer: Tracer, codes: Tensor) -> Tensor:
    """The same codes, but for channels that hold elements of constants or of one condition in whatever order: these
    get a plane of their own.
    """
    plane = tracer.graph.planes(codes.numpy())
    nodes = tracer.graph.nodes
    constant: list[int] = []
    conditional: dict[int, list[int]] = {}
    first = np.where(plane < 0, len(nodes), plane).min((0, 2, 3))  # of each channel, where it has any
    last = plane.max((0, 2, 3))
    for c in np.flatnonzero(tracer.graph.given(np.where(last < 0, -1, first)) & (last >= 0)).tolist():
        sources = [int(last[c])] if first[c] == last[c] else [int(p) for p in np.unique(plane[:, c]) if p >= 0]
        if all(isinstance(nodes[p], Constant) for p in sources):
            constant.append(c)
        elif len(sources) == 1 and isinstance(nodes[sources[0]], Condition):
            conditional.setdefault(sources[0], []).append(c)
    result = codes.clone()
    if constant:
        result[:, constant] = _new_constant(tracer, codes[:, constant])
    for source, channels in conditional.items():
        result[:, channels] = _new_condition(tracer, codes[:, channels], source)
    return result


def _new_constant(tracer: Tracer, codes: Tensor) -> Tensor:
    """Codes of a constant that holds the elements of constants that `codes` [N, C, h, w] names."""
    data = _values(tracer, codes[0])
    for other in codes[1:]:
        if not torch.equal(other, codes[0]) and not torch.equal(_values(tracer, other), data):
            raise LayoutError
    channels, height, width = data.shape
    return tracer.add(Constant(tracer.module, channels, height, width, data=data))


def _values(tracer: Tracer, codes: Tensor) -> Tensor:
    """Of elements of constants, by their codes."""
    result = torch.zeros(codes.shape)
    for p in np.unique(tracer.graph.planes(codes.numpy())):
        node = tracer.graph.nodes[p]
        if p >= 0 and isinstance(node, Constant):
            here = (codes >= node.start) & (codes < node.start + node.data.numel())
            result[here] = node.data.flatten()[codes[here] - node.start]
    return result


def _new_condition(tracer: Tracer, codes: Tensor, source: int) -> Tensor:
    """Codes of a condition that holds the elements of a condition that `codes` [N, C, h, w] names; the gathering goes
    to the tape.
    """
    node = tracer.graph.nodes[source]
    assert isinstance(node, Condition)
    keep = codes > 0
    sample = torch.arange(len(codes)).view(-1, 1, 1, 1)
    index = torch.where(keep, codes - node.start - sample * node.tensor[0].numel(), 0)
    if not torch.equal(index[0], index[-1]):
        raise LayoutError
    channels, height, width = index.shape[1:]
    gathered = tracer.tape.gather(node.tensor, index[0])
    made = tracer.add(Condition(tracer.module, channels, height, width, tensor=gathered))
    return torch.where(codes != 0, made, 0)


_MOST_PIECES = 8


def pieced(tracer: Tracer, codes: Tensor) -> Ref:
    """A plane for codes in which views of planes that do not overlap lie in each other's zeros: their sum.

    Pixels shifted by one in raster order are such: a row's first comes from the end of the row above.
    """
    parts = _views(tracer, codes)
    for source, part in parts:
        if _depends(tracer, source):
            tracer.graph.recognise(part)  # it raises before anything is made
    return _summed(tracer, [_given(tracer, *part) for part in parts])


def overlaid(tracer: Tracer, codes: Tensor) -> Ref:
    """A plane for codes in which views of planes have elements of others in places: the sum of the views, each times a
    constant of zeros and ones.

    Tokens of a text and an image, shifted by one and by a row, are such.
    """
    parts = _views(tracer, codes)
    for source, part in parts:
        if _depends(tracer, source):
            tracer.graph.recognise(part, holes=True)
    return _summed(tracer, [_masked(tracer, p[1]) if _depends(tracer, p[0]) else _given(tracer, *p) for p in parts])


def _depends(tracer: Tracer, source: int) -> bool:
    return source >= 0 and not tracer.graph.nodes[source].given


def _views(tracer: Tracer, codes: Tensor) -> list[tuple[int, Tensor]]:
    """The views of planes that codes are made of, each with its plane, and zeros in place of the others; -2 and not a
    plane for all constants. They come in no more than a few.
    """
    if codes.dim() != 4:
        raise LayoutError
    plane, _, channel, y, x = tracer.graph.decode(codes.numpy())
    nodes = tracer.graph.nodes
    for p in np.unique(plane[plane >= 0]):  # the channels of an image one row high are no rows
        of_each = np.ma.masked_where(plane != p, channel)
        if not nodes[p].given and (np.ma.ptp(of_each, axis=(0, 2, 3)) > 0).any():
            raise LayoutError
    row, column = np.ogrid[: codes.shape[2], : codes.shape[3]]
    given = tracer.graph.given(plane)
    # Views have numbers by plane and shift; all constants are one, which comes first.
    down, right = (np.where(given, 0, v).astype(np.int64) for v in (y - row, x - column))
    most = 1 + int(max(np.abs(down).max(), np.abs(right).max()))
    views = ((plane + 1) * 2 * most + down + most) * 2 * most + right + most
    views[np.array([isinstance(n, Constant) for n in nodes])[plane]] = 0
    views[plane < 0] = -1
    kinds = np.unique(views)
    kinds = kinds[kinds >= 0]
    if not 1 < len(kinds) <= _MOST_PIECES:
        raise LayoutError
    return [
        (int(kind) // (4 * most * most) - 1 if kind else -2, torch.where(torch.from_numpy(views == kind), codes, 0))
        for kind in kinds
    ]


def _given(tracer: Tracer, source: int, part: Tensor) -> Tensor:
    """Codes of a view, of a plane of its own where it is one of constants or of a condition."""
    if source == -2:
        return _new_constant(tracer, part).expand(part.shape)
    return _new_condition(tracer, part, source) if tracer.graph.nodes[source].given else part


def _summed(tracer: Tracer, parts: list[Tensor]) -> Ref:
    total, *others = parts
    for part in others:
        total = pointwise_4d(tracer, "add", [total, part])
    return tracer.graph.recognise(total)


def blanked(tracer: Tracer, codes: Tensor) -> Ref:
    """A plane for codes in which elements inside a plane were replaced, by zeros or by elements of other planes, as
    in-place writes into overlapping views do: the sum of the planes, each times a constant of zeros and ones.
    """
    if codes.dim() != 4:
        raise LayoutError
    with contextlib.suppress(LayoutError):  # at best each channel holds elements of one plane
        return tracer.graph.recognise(_masked(tracer, codes))
    plane, *_ = tracer.graph.decode(codes.numpy())
    planes = np.unique(plane[plane >= 0])
    return _summed(tracer, [_masked(tracer, torch.where(torch.from_numpy(plane == p), codes, 0)) for p in planes])


def _masked(tracer: Tracer, codes: Tensor) -> Tensor:
    """Codes of a plane that holds what `codes` holds: in each channel, elements of one plane and zeros."""
    keep = codes > 0
    if not torch.equal(keep[0], keep[-1]):
        raise LayoutError
    source = tracer.graph.recognise(codes, holes=True)
    _, channels, height, width = codes.shape
    mask = tracer.add(Constant(tracer.module, channels, height, width, data=keep[0].float()))
    return pointwise_4d(tracer, "mul", [source, mask.expand(codes.shape)])
