"""Pass 2, planes and taps: what each ATen operator does to planes.

Layout operators run again on the codes. Convolutions become `Linear` nodes, embeddings of the image `Embedding` nodes.
The registry is in `fastgen.sampling.rules`, and other operators have files of their own, which CONTRIBUTING.md lists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fastgen.sampling.graph import (
    Condition,
    Constant,
    Embedding,
    Image,
    LayoutError,
    Linear,
    Pointwise,
    Ref,
    Stride,
    Tap,
    taps_of,
)
from fastgen.sampling.planes import pointwise_4d
from fastgen.sampling.rules import nothing, rule
from fastgen.sampling.tape import tensors_in

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer

# Layout.

_LAYOUT = (
    "cat stack clone contiguous _to_copy select_scatter slice_scatter roll flip repeat "
    "_unsafe_view _reshape_copy _reshape_alias_copy view_copy permute_copy copy lift_fresh pixel_shuffle "
    "pixel_unshuffle unsafe_split unsafe_split_with_sizes"
).split()


rule(*"zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided".split())(
    nothing  # they take only the shape
)


@rule(*_LAYOUT)
def _layout(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """The same operator on the codes."""
    kwargs = {k: v for k, v in kwargs.items() if k not in ("dtype", "layout", "device", "pin_memory", "non_blocking")}
    codes = tree_map(lambda a: tracer.codes(a) if isinstance(a, Tensor) else a, (args, kwargs))
    if func._schema.name == "aten::_to_copy":
        if _loses_values(args[0].dtype, outputs[0].dtype):
            raise tracer.unsupported(f"conversion of the image from {args[0].dtype} to {outputs[0].dtype}")
        result = codes[0][0].clone()
    else:
        result = func(*codes[0], **codes[1])
    for output, its_codes in zip(outputs, tensors_in(result), strict=True):
        tracer.set_codes(output, its_codes)


def _loses_values(source: torch.dtype, result: torch.dtype) -> bool:
    """Whether a conversion does more than to round floating point numbers."""
    if result.is_floating_point or source in (torch.bool, result):
        return False
    return source.is_floating_point or result == torch.bool or torch.iinfo(result).max < torch.iinfo(source).max


@rule("gather", "index", "index_select")
def _indexed(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """The same operator on the codes; rows of a table by levels of the image are looked up."""
    indices = [a for a in tree_leaves(args[1:]) if isinstance(a, Tensor)]
    if not any(tracer.varies(i) for i in indices):
        where = tree_map(lambda a: a.cpu() if isinstance(a, Tensor) else a, args[1:])
        tracer.set_codes(outputs[0], func(tracer.codes(args[0]), *where))
        return
    of_rows = {"aten::index": len(tree_leaves(args[1:])) == 1, "aten::index_select": args[1] == 0}
    if not of_rows.get(func._schema.name) or not tracer.depends(indices[0]):
        raise LayoutError("with an index that depends on the image, the labels or the condition")
    tracer.set_codes(outputs[0], _rows_of(tracer, args[0], indices[0]).view(outputs[0].shape))


@rule("im2col")
def _unfold(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """[N, channels * kernel, positions]: shifted windows, those of a channel next to each other."""
    x, kernel, dilation, padding, stride = args
    if x.dim() != 4:
        raise LayoutError("(F.unfold) of a single image")
    codes = F.pad(tracer.codes(x), (padding[1], padding[1], padding[0], padding[0]))
    reach = [(k - 1) * d for k, d in zip(kernel, dilation, strict=True)]
    size = ((codes.shape[2] - reach[0] - 1) // stride[0] + 1, (codes.shape[3] - reach[1] - 1) // stride[1] + 1)
    offsets = [(ky * dilation[0], kx * dilation[1]) for ky in range(kernel[0]) for kx in range(kernel[1])]
    windows = [_window(codes, offset, tuple(stride), size) for offset in offsets]
    outputs[0].untyped_storage().resize_(outputs[0].nbytes)  # it was as large as the input, if that is larger
    tracer.set_codes(outputs[0], torch.stack(windows, 2).reshape(outputs[0].shape))


@rule("col2im")
def _fold(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    x, _, kernel, _, padding, stride = args
    if any(k != 1 for k in (*kernel, *stride)) or any(padding):
        raise LayoutError("(F.fold) of windows larger than a pixel")
    tracer.set_codes(outputs[0], tracer.codes(x).reshape(outputs[0].shape))


@rule("zero_", "fill_")
def _fill_in_place(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    if len(args) > 1 and isinstance(args[1], Tensor) and tracer.varies(args[1]):
        raise LayoutError("with a number that depends on the image, the labels or the condition")
    value = float(args[1]) if len(args) > 1 else 0.0
    size = args[0].shape[-2:]  # height and width, where a whole channel is filled
    tracer.set_codes(args[0], tracer.codes(torch.full((1, 1, *size), value)).view(size).expand(args[0].shape))


@rule("copy_")
def _copy_in_place(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    tracer.set_codes(args[0], tracer.codes(args[1]).expand(args[0].shape))


# Convolutions.


@rule("convolution")
def _convolution(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    if x.dim() != 4:
        raise tracer.unsupported("a convolution that is not two-dimensional")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and tracer.varies(parameter):
            raise tracer.unsupported(f"a convolution whose {name} depends on the image, the labels or the condition")
    height, width = outputs[0].shape[2:]
    lower = _transposed_taps if transposed else _convolution_taps
    dense = dense_weight(weight, groups, transposed)
    frame, taps = lower(tracer, tracer.codes(x), dense, tuple(stride), tuple(padding), tuple(dilation), (height, width))
    node = Linear(tracer.module, dense.shape[3], height, width, stride=frame, taps=taps, bias=vector(bias))
    if transposed:
        node.period = tuple(stride)
    tracer.set_codes(outputs[0], tracer.add(node))


Pair = tuple[int, int]


def _convolution_taps(
    tracer: Tracer, codes: Tensor, dense: Tensor, stride: Pair, padding: Pair, dilation: Pair, size: Pair
) -> tuple[Stride, list[Tap]]:
    """Stride of the output, and its taps."""
    if any(padding):
        codes = F.pad(codes, (padding[1], padding[1], padding[0], padding[0]))
    kernel = [(ky, kx) for ky in range(dense.shape[0]) for kx in range(dense.shape[1]) if dense[ky, kx].any()]
    windows = _windows(tracer, codes, [(ky * dilation[0], kx * dilation[1]) for ky, kx in kernel], stride, size)
    frame = (max((w.stride[0] for w in windows), default=1), max((w.stride[1] for w in windows), default=1))
    taps = []
    for (ky, kx), ref in zip(kernel, windows, strict=True):
        taps += taps_of(tracer.graph.at_stride(ref, frame, size), dense[ky, kx])
    return frame, taps


def _windows(tracer: Tracer, codes: Tensor, offsets: list[Pair], stride: Pair, size: Pair) -> list[Ref]:
    """What each tap sees."""
    graph = tracer.graph

    def of_whole(recognise: Callable[[Tensor], Ref]) -> list[Ref]:
        whole = spatial(tracer, recognise(codes), codes)
        return [graph.every(graph.moved(whole, *offset), stride) for offset in offsets]

    def each(recognise: Callable[[Tensor], Ref]) -> list[Ref]:
        return [recognise(_window(codes, offset, stride, size)) for offset in offsets]

    # A crop that is padded again is still a plain window as seen by most taps.
    for attempt, recognise in ((of_whole, graph.recognise), (each, graph.recognise), (of_whole, tracer.recognise)):
        with contextlib.suppress(LayoutError):
            return attempt(recognise)
    return each(tracer.recognise)


def _window(codes: Tensor, offset: Pair, stride: Pair, size: Pair) -> Tensor:
    """What one tap sees."""
    (y, x), (sy, sx), (height, width) = offset, stride, size
    return codes[:, :, y : y + (height - 1) * sy + 1 : sy, x : x + (width - 1) * sx + 1 : sx]


def _transposed_taps(
    tracer: Tracer, codes: Tensor, dense: Tensor, stride: Pair, padding: Pair, dilation: Pair, size: Pair
) -> tuple[Stride, list[Tap]]:
    """Input row Y and kernel row k meet in output row y = Y * stride - padding + k * dilation."""
    graph = tracer.graph
    # Outside a crop are zeros, whatever the plane holds there: recognise all that the kernel reaches.
    top, left = (-(-(k - 1) * d // s) for k, d, s in zip(dense.shape[:2], dilation, stride, strict=True))
    rows, columns = ((n - 1 + p) // s + 1 for n, p, s in zip(size, padding, stride, strict=True))
    padded = F.pad(codes, (left, max(0, columns - codes.shape[3]), top, max(0, rows - codes.shape[2])))
    try:
        whole = graph.finer(graph.moved(spatial(tracer, graph.recognise(padded), padded), top, left), stride)
    except LayoutError:
        copy = pointwise_4d(tracer, "copy", [codes], multiple=stride)
        whole = graph.finer(graph.recognise(copy), stride)
    taps = []
    for ky in range(dense.shape[0]):
        for kx in range(dense.shape[1]):
            dy, dx = padding[0] - ky * dilation[0], padding[1] - kx * dilation[1]
            phase = None if stride == (1, 1) else (-dy % stride[0], -dx % stride[1])
            # y + dy is a multiple of the stride in this phase: (y + dy) / stride is the row of the input
            ref = replace(whole, dy=whole.dy + dy, dx=whole.dx + dx)
            taps += taps_of(ref, dense[ky, kx], phase)
    return whole.stride, taps


@rule("upsample_nearest2d", "_upsample_nearest_exact2d")
def _upsample(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    codes = tracer.codes(args[0])
    factor = (outputs[0].shape[2] // codes.shape[2], outputs[0].shape[3] // codes.shape[3])
    if outputs[0].shape[2:] != (codes.shape[2] * factor[0], codes.shape[3] * factor[1]):
        raise tracer.unsupported("upsampling by a factor that is no integer")
    places = torch.arange(float(codes.shape[2] * codes.shape[3])).view(1, 1, *codes.shape[2:])
    if not torch.equal(func(places, *args[1:], **kwargs), _repeated(places, factor)):
        raise tracer.unsupported("upsampling by a scale factor that the sizes do not have")
    if not _can_be_finer(tracer, codes, factor):
        codes = pointwise_4d(tracer, "copy", [codes], multiple=factor)
        tracer.graph.finer(tracer.recognise(codes), factor)  # or say why not
    tracer.set_codes(outputs[0], _repeated(codes, factor))


def _repeated(values: Tensor, factor: Stride) -> Tensor:
    return values.repeat_interleave(factor[0], 2).repeat_interleave(factor[1], 3)


def _can_be_finer(tracer: Tracer, codes: Tensor, factor: Stride) -> bool:
    try:
        tracer.graph.finer(tracer.graph.recognise(codes), factor)
    except LayoutError:
        return False
    return True


def spatial(tracer: Tracer, ref: Ref, codes: Tensor) -> Ref:
    """The source of a product: a plane that is read at every position alike (an expanded label embedding) is written
    out.
    """
    if not any(tracer.graph.nodes[p].broadcast for p in ref.plane[ref.plane >= 0]):
        return ref
    return tracer.graph.recognise(pointwise_4d(tracer, "copy", [codes]))


def dense_weight(weight: Tensor, groups: int, transposed: bool = False) -> Tensor:
    """[M, K/groups, kh, kw] (transposed: [K, M/groups, kh, kw]) -> float32 [kh, kw, K, M], zero between groups."""
    if transposed:
        weight = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    m, k, kh, kw = weight.shape
    dense = torch.zeros(kh, kw, k * groups, m)
    for g in range(groups):
        rows, columns = slice(g * k, (g + 1) * k), slice(g * m // groups, (g + 1) * m // groups)
        dense[:, :, rows, columns] = weight.detach()[columns].permute(2, 3, 1, 0).to("cpu", torch.float32)
    return dense


def vector(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().to("cpu", torch.float32).clone()


@rule("embedding")
def _embedding(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    tracer.set_codes(outputs[0], _rows_of(tracer, args[0], args[1]))


@rule("scatter")
def _one_hot(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """A number that is written into zeros where the image says: a row of a scaled identity."""
    into, dim, index, value = args[:4]
    along = list(into.shape)
    along[dim] = 1
    zeros = not tracer.codes(into).any()
    if isinstance(value, Tensor) or kwargs or not zeros or list(index.shape) != along or not tracer.depends(index):
        raise LayoutError("of anything but a number into zeros at levels of the image")
    rows = _rows_of(tracer, torch.eye(into.shape[dim]) * value, index.squeeze(dim))
    tracer.set_codes(outputs[0], rows.movedim(-1, dim))


def _rows_of(tracer: Tracer, table: Tensor, indices: Tensor) -> Tensor:
    """Codes [*indices.shape, columns] of the rows of a table [rows, ...]. Indices are levels of the image, one plane
    for each colour, or elements of a condition, times a number plus a number, where other tokens have the first
    numbers; or constants.
    """
    if tracer.varies(table):
        raise LayoutError("of a table that depends on the image, the labels or the condition")
    table = table.detach().to("cpu", torch.float32).reshape(len(table), -1).clone()
    origin, factor, offset = (v.reshape(indices.shape) for v in _affine(tracer, tracer.codes(indices).reshape(-1)))
    origin[factor == 0] = 0
    plane, sample, colour, y, x = tracer.graph.decode(origin)
    kinds = np.stack([plane, colour, factor, offset])
    kinds[1, (plane < 0) | ~np.isin(plane, [n.id for n in tracer.graph.nodes if isinstance(n, Image)])] = 0
    result = torch.empty(*indices.shape, table.shape[1], dtype=torch.int64)
    for kind in np.unique(kinds.reshape(4, -1), axis=1).T:
        where = (kinds == kind.reshape(4, *[1] * origin.ndim)).all(0)
        here = torch.from_numpy(where)
        source, c, scale, shift = (int(v) for v in kind)
        if (scale, shift) != tuple(kind[2:]):
            raise LayoutError("of anything but integers")
        if source < 0:
            result[here] = tracer.codes(table[shift : shift + 1])
            continue
        node = tracer.graph.nodes[source]
        if isinstance(node, Condition):
            result[here] = _rows_of_condition(tracer, table, node, origin[where], scale, shift)
            continue
        size = (table.shape[1], node.height, node.width)
        rows = scale * torch.arange(len(table)) + shift  # of levels: those that have rows, at least
        valid = (rows >= 0) & (rows < len(table))
        rows = rows[: int(valid.int().cummin(0).values.sum())]
        codes = tracer.add(Embedding(tracer.module, *size, colour=c, table=table[rows])).permute(0, 2, 3, 1)
        result[here] = codes[sample[where], y[where], x[where]]
    return result


def _rows_of_condition(
    tracer: Tracer, table: Tensor, node: Condition, origin: np.ndarray, scale: int, shift: int
) -> Tensor:
    """Codes [n, columns] of rows of a table by n elements of a condition."""
    size = node.channels * node.height * node.width
    sample, element = np.divmod(origin - node.start, size)
    elements, index = np.unique(element, return_inverse=True)
    rows = tracer.tape.rows(table, node.tensor, torch.from_numpy(elements), scale, shift)
    return tracer.codes(rows)[sample, index]


_Affine = tuple[np.ndarray, np.ndarray, np.ndarray]  # code, factor, offset


def _affine(tracer: Tracer, codes: Tensor) -> _Affine:
    """Flat codes as code * factor + offset: codes of the image or of conditions; 0 where there is only the offset."""
    graph = tracer.graph
    origin, factor, offset = codes.numpy().copy(), np.ones(len(codes)), np.zeros(len(codes))
    plane, sample, channel, y, x = graph.decode(origin)
    factor[plane < 0] = 0
    for p in np.unique(plane[plane >= 0]):
        node, here = graph.nodes[p], np.flatnonzero(plane == p)
        if isinstance(node, Image | Condition):
            continue
        if isinstance(node, Constant):
            origin[here], factor[here] = 0, 0
            offset[here] = node.data[channel[here], y[here], x[here]]
        elif isinstance(node, Pointwise) and node.op in ("add", "sub", "mul", "copy"):
            places = (sample[here], channel[here], y[here], x[here])
            operands = [_affine_operand(tracer, o, places) for o in node.operands]
            for values, found in zip((origin, factor, offset), _combined(node.op, *operands), strict=True):
                values[here] = found
        else:
            raise LayoutError("of anything but the levels of the image")
    return origin, factor, offset


def _affine_operand(tracer: Tracer, operand: Ref | float, places: tuple[np.ndarray, ...]) -> _Affine:
    """Of an operand of a node, at some elements (sample, channel, y, x)."""
    sample, channel, y, x = places
    if not isinstance(operand, Ref):
        return np.zeros_like(sample), np.zeros(len(sample)), np.full(len(sample), operand)
    codes = tracer.graph.elements(operand, sample, channel, y, x)
    return _affine(tracer, torch.from_numpy(codes))


def _combined(op: str, a: _Affine, b: _Affine | None = None) -> _Affine:
    if op == "copy" or b is None:
        return a
    if op == "mul":
        a, b = (b, a) if a[0].any() else (a, b)
        if a[0].any():
            raise LayoutError("of anything but the levels of the image")
        return b[0], b[1] * a[2], b[2] * a[2]
    if ((a[0] > 0) & (b[0] > 0)).any():
        raise LayoutError("of anything but the levels of the image")
    sign = -1 if op == "sub" else 1
    return np.maximum(a[0], b[0]), a[1] + sign * b[1], a[2] + sign * b[2]
