"""Pass 2, planes and taps: what each ATen operator does to planes.

Layout operators run again on the codes. Convolutions and matrix products become `Linear` nodes. Element by element
operators are in `fastgen.sampling.elementwise`, the registry in `fastgen.sampling.rules`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from fastgen.sampling import elementwise
from fastgen.sampling.graph import LayoutError, Linear, Ref, Tap
from fastgen.sampling.rules import nothing, rule

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer

# Layout.

_LAYOUT = (
    "cat stack clone contiguous _to_copy constant_pad_nd select_scatter slice_scatter roll flip repeat "
    "_unsafe_view _reshape_copy _reshape_alias_copy view_copy permute_copy copy lift_fresh pixel_shuffle "
    "pixel_unshuffle"
).split()
_INDEXING = ("gather", "index", "index_select")  # layout operators with tensors of indices


rule(*"zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided".split())(
    nothing  # they take only the shape
)


@rule(*_LAYOUT, *_INDEXING)
def _layout(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """The same operator on the codes."""
    if func._schema.name == "aten::constant_pad_nd" and len(args) > 2 and args[2] != 0:
        raise tracer.unsupported(f"padding with {args[2]}")
    kwargs = {k: v for k, v in kwargs.items() if k not in ("dtype", "layout", "device", "pin_memory", "non_blocking")}
    by_index = func._schema.name.removeprefix("aten::") in _INDEXING
    codes = tree_map(
        lambda a: tracer.codes(a) if isinstance(a, Tensor) and (tracer.depends(a) or not by_index) else a,
        (args, kwargs),
    )
    if func._schema.name == "aten::_to_copy":
        if not outputs[0].is_floating_point():
            raise tracer.unsupported(f"conversion of the image to {outputs[0].dtype}")
        result = codes[0][0].clone()
    else:
        result = func(*codes[0], **codes[1])
    tracer.set_codes(outputs[0], result)


@rule("zero_", "fill_")
def _fill_in_place(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    value = float(args[1]) if len(args) > 1 else 0.0
    size = args[0].shape[-2:]  # height and width, where a whole channel is filled
    tracer.set_codes(args[0], tracer.codes(torch.full((1, 1, *size), value)).view(size).expand(args[0].shape))


@rule("copy_")
def _copy_in_place(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    tracer.set_codes(args[0], tracer.codes(args[1]).expand(args[0].shape))


# Convolutions and products.


@rule("convolution")
def _convolution(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    if transposed or any(s != 1 for s in stride) or x.dim() != 4:
        raise tracer.unsupported("a transposed, strided or not two-dimensional convolution")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (tracer.depends(parameter) or tracer.tape.depends(parameter)):
            raise tracer.unsupported(f"a convolution whose {name} depends on the image or the labels")
    pad_y, pad_x = padding
    codes = F.pad(tracer.codes(x), (pad_x, pad_x, pad_y, pad_y))
    height, width = outputs[0].shape[2:]
    dense = dense_weight(weight, groups)
    offsets = [
        (ky, kx, ky * dilation[0], kx * dilation[1])
        for ky in range(weight.shape[2])
        for kx in range(weight.shape[3])
        if dense[ky, kx].any()
    ]
    try:
        ref = _spatial(tracer, tracer.graph.recognise(codes), codes)
        windows = {(ky, kx): (ref, oy, ox) for ky, kx, oy, ox in offsets}
    except LayoutError:  # a crop that is padded again is still a plain window as seen by most taps
        windows = {
            (ky, kx): (tracer.recognise(codes[:, :, oy : oy + height, ox : ox + width]), 0, 0)
            for ky, kx, oy, ox in offsets
        }
    taps = []
    for (ky, kx), (ref, oy, ox) in windows.items():
        taps += taps_of(ref, oy, ox, dense[ky, kx])
    node = Linear(tracer.module, weight.shape[0], height, width, taps=taps, bias=_vector(bias))
    tracer.set_codes(outputs[0], tracer.add(node))


def _spatial(tracer: Tracer, ref: Ref, codes: Tensor) -> Ref:
    """The source of a product: a plane that is read at every position alike (an expanded label embedding) is written
    out.
    """
    if not any(tracer.graph.nodes[p].broadcast for p in ref.plane[ref.plane >= 0]):
        return ref
    return tracer.graph.recognise(elementwise.pointwise_4d(tracer, "copy", [codes]))


def dense_weight(weight: Tensor, groups: int) -> Tensor:
    """[M, K/groups, kh, kw] -> float32 [kh, kw, K, M], zero between different groups."""
    m, k, kh, kw = weight.shape
    dense = torch.zeros(kh, kw, k * groups, m)
    for g in range(groups):
        rows, columns = slice(g * k, (g + 1) * k), slice(g * m // groups, (g + 1) * m // groups)
        dense[:, :, rows, columns] = weight.detach()[columns].permute(2, 3, 1, 0).to("cpu", torch.float32)
    return dense


def taps_of(ref: Ref, dy: int, dx: int, weight: Tensor) -> list[Tap]:
    """Taps that multiply the channels of `ref`, shifted by (dy, dx), with weight [K, M]; zero rows at its ends go."""
    taps = []
    for start, stop in ref.segments():
        rows = np.flatnonzero(weight[start:stop].any(1).numpy())
        if ref.plane[start] < 0 or not len(rows):
            continue
        a, b = start + int(rows[0]), start + int(rows[-1]) + 1
        taps.append(
            Tap(
                int(ref.plane[a]),
                dy + int(ref.dy[a]),
                dx + int(ref.dx[a]),
                int(ref.channel[a]),
                weight[a:b].contiguous(),
            )
        )
    return taps


def _vector(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to("cpu", torch.float32).clone()


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
    if name == "aten::bmm" and weight.shape[0] == 1:  # what einsum makes of it
        weight = weight[0]
    if tracer.depends(weight) or tracer.tape.depends(weight) or weight.dim() != 2 or kwargs:
        raise tracer.unsupported("a product with a matrix that is no parameter")
    if bias is not None and (tracer.depends(bias) or bias.dim() != 1):
        raise tracer.unsupported("a product plus a matrix that is no bias")
    rows = tracer.codes(x).reshape(-1, x.shape[-1])  # [N*h*w, K]
    order, size = _raster_order(tracer, rows[:, :1])
    grid = rows[order].view(*size, -1).permute(0, 3, 1, 2).contiguous()
    taps = taps_of(
        _spatial(tracer, tracer.recognise(grid), grid), 0, 0, weight.detach().to("cpu", torch.float32).contiguous()
    )
    node = Linear(tracer.module, weight.shape[1], *size[1:], taps=taps, bias=_vector(bias))
    out = torch.empty(len(rows), weight.shape[1], dtype=torch.int64)
    out[order] = tracer.add(node).permute(0, 2, 3, 1).reshape(out.shape)
    tracer.set_codes(outputs[0], out.view(outputs[0].shape))


def _raster_order(tracer: Tracer, rows: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """The permutation that puts codes [R, 1] of one channel into the order (sample, y, x), and (N, h, w)."""
    plane, sample, _, y, x = tracer.graph.decode(rows[:, 0].numpy())
    if (plane < 0).any() or len(set(plane.tolist())) != 1:
        raise LayoutError
    size = (len(set(sample.tolist())), len(set(y.tolist())), len(set(x.tolist())))
    if math.prod(size) != len(rows) or size[0] != tracer.graph.batch:
        raise LayoutError
    return torch.from_numpy(np.lexsort((x, y, sample))), size
