"""Pass 2 for products with matrices: `Linear` nodes, 1x1 convolutions in another layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.graph import Linear, Ref, taps_of
from fastgen.sampling.lowering import spatial, vector
from fastgen.sampling.mixing import mixed
from fastgen.sampling.orders import feature_maps
from fastgen.sampling.rules import find, rule

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


@rule("mm", "addmm", "linear", "bmm")
def _product(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """A product with a parameter matrix over the last dimension: a 1x1 convolution in another layout."""
    name = func._schema.name
    if name == "aten::linear":
        x, weight, bias = args[0], args[1].t(), args[2] if len(args) > 2 else None
    elif name == "aten::addmm":
        bias, x, weight = args[:3]
    else:
        x, weight, bias = args[0], args[1], None
    left = name == "aten::bmm" and not tracer.depends(x)
    if left:  # a matrix times vectors in columns
        x, weight = weight.transpose(1, 2), x.transpose(1, 2)
    if name == "aten::bmm" and _one_matrix(weight):  # what einsum and matmul make of it
        weight = weight[0]
    if not tracer.varies(weight) and (bias is None or not tracer.varies(bias)) and not kwargs:
        found = mixed(tracer, tracer.codes(x), weight, bias)
        if found is not None:
            return tracer.set_codes(outputs[0], found.mT if left else found)
    if tracer.varies(weight) or weight.dim() != 2 or kwargs:
        raise tracer.unsupported("a product with a matrix that is no parameter")
    if bias is not None and (tracer.varies(bias) or bias.dim() != 1):
        raise tracer.unsupported("a product plus a matrix that is no bias")
    out = product(tracer, tracer.codes(x).reshape(-1, x.shape[-1]), weight, bias)
    shape = outputs[0].mT.shape if left else outputs[0].shape
    tracer.set_codes(outputs[0], out.view(shape).mT if left else out.view(shape))


_convolution_2d = find(torch.ops.aten.convolution.default)


@rule("convolution")
def _convolution(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """Of one position in one dimension: a product over channels, or over positions in their place."""
    x, weight, bias, stride, padding, _, transposed, _, groups = args
    plain = x.dim() == 3 and weight.shape[2] == 1 and groups == 1 and not transposed and (stride, padding) == ([1], [0])
    if not plain or any(p is not None and tracer.varies(p) for p in (weight, bias)):
        assert _convolution_2d is not None
        return _convolution_2d(tracer, func, args, kwargs, outputs)
    codes, matrix = tracer.codes(x).mT, weight[..., 0].t()
    found = mixed(tracer, codes, matrix, bias)
    if found is None:
        found = product(tracer, codes.reshape(-1, x.shape[1]), matrix, bias).view(*codes.shape[:2], -1)
    tracer.set_codes(outputs[0], found.mT)


def _one_matrix(batch: Tensor) -> bool:
    return batch.shape[0] == 1 or batch.stride(0) == 0


def product(tracer: Tracer, rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Codes [N*h*w, M] of codes [N*h*w, K], positions in any order, times weight [K, M]."""
    out = torch.empty(len(rows), weight.shape[1], dtype=torch.int64)
    weight = weight.detach().to("cpu", torch.float32).contiguous()
    for order, grid, found in feature_maps(tracer, rows):
        node = _linear(tracer, grid, found, weight, bias)
        order.restore(tracer.add(node).permute(0, 2, 3, 1), out)
    return out


def _linear(tracer: Tracer, grid: Tensor, found: Ref, weight: Tensor, bias: Tensor | None = None) -> Linear:
    """Of codes [N, K, h, w] that were found there."""
    ref, rows_of_weight = _by_window(spatial(tracer, found, grid), weight)
    height, width = grid.shape[2:]
    taps = taps_of(ref, rows_of_weight)
    return Linear(tracer.module, weight.shape[1], height, width, stride=ref.stride, taps=taps, bias=vector(bias))


def sums(tracer: Tracer, rows: Tensor, copies: int) -> Tensor:
    """Codes [N*h*w, copies] of the sum of each of the codes [N*h*w, K], that many times.

    Where positions have several rows, as those of heads, their sums are one product, and the copies a second one: both
    are small, as one for all copies would not be, and what reads them is one program for all heads.
    """
    found = feature_maps(tracer, rows)
    count = len(found)
    frames = {(ref.stride, grid.shape) for _, grid, ref in found}
    if count == 1 or len(frames) > 1:
        return product(tracer, rows, torch.ones(rows.shape[1], copies))
    grid, one = torch.cat([g for _, g, _ in found], 1), torch.eye(count)
    each = tracer.add(
        _linear(tracer, grid, _joined([ref for *_, ref in found]), one.repeat_interleave(rows.shape[1], 0))
    )
    all_copies = _linear(tracer, each, tracer.graph.recognise(each), one.repeat_interleave(copies, 1))
    out = torch.empty(len(rows), copies, dtype=torch.int64)
    for (order, *_), codes in zip(found, tracer.add(all_copies).split(copies, 1), strict=True):
        order.restore(codes.permute(0, 2, 3, 1), out)
    return out


def _joined(refs: list[Ref]) -> Ref:
    """The channels of frames of one stride, one after the other."""
    plane, channel, dy, dx = (
        np.concatenate([getattr(ref, n) for ref in refs]) for n in ("plane", "channel", "dy", "dx")
    )
    return Ref(plane, channel, dy, dx, refs[0].stride)


def _by_window(ref: Ref, weight: Tensor) -> tuple[Ref, Tensor]:
    """The factors of a product with the channels of a window next to each other, where that makes fewer taps: what
    F.unfold gives has the windows of a channel next to each other.
    """
    order = np.lexsort((ref.channel, ref.dx, ref.dy, ref.plane))
    ordered = ref.take(order)
    if ordered.breaks().sum() >= ref.breaks().sum():
        return ref, weight
    return ordered, weight[torch.from_numpy(order)]
