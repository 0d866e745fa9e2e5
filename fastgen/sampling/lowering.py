"""Pass 2, planes and taps: what each ATen operator does to planes.

A rule is called after the operator ran, with the values and their codes at hand.  Layout operators run again on the
codes. Convolutions and matrix products become `Linear` nodes, element by element operators become `Pointwise` nodes
over the primitives of `fastgen.sampling.plan.PRIMITIVES`.  View operators need no rule: a view shares its storage,
hence its codes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from fastgen.sampling.graph import Constant, LayoutError, Linear, Pointwise, Ref, Tap

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer

Rule = Callable[["Tracer", Any, tuple, dict, list[Tensor]], None]
_RULES: dict[str, Rule] = {}

_LAYOUT = (
    "cat stack clone contiguous _to_copy constant_pad_nd index_select select_scatter slice_scatter roll flip repeat "
    "_unsafe_view _reshape_copy _reshape_alias_copy view_copy permute_copy copy lift_fresh pixel_shuffle "
    "pixel_unshuffle gather"
).split()


def rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return add


def supported() -> list[str]:
    """Names of the ATen operators that have a rule; views are supported besides."""
    return sorted(_RULES)


def find(func: Any) -> Rule | None:
    """The rule of an ATen overload, or None."""
    schema = func._schema
    name = schema.name.removeprefix("aten::")
    if name in _RULES:
        return _RULES[name]
    if func.is_view:
        return _nothing
    return _RULES.get(name.removesuffix("_")) if schema.is_mutable and "out" not in func._overloadname else None


@rule(*"zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided".split())
def _nothing(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """Views share the storage of their base, and so its codes; others take only the shape."""


# Layout.


@rule(*_LAYOUT)
def _layout(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """The same operator on the codes."""
    if func._schema.name == "aten::constant_pad_nd" and len(args) > 2 and args[2] != 0:
        raise tracer.unsupported(f"padding with {args[2]}")
    kwargs = {k: v for k, v in kwargs.items() if k not in ("dtype", "layout", "device", "pin_memory", "non_blocking")}
    codes = tree_map(
        lambda a: tracer.codes(a) if isinstance(a, Tensor) and a.is_floating_point() else a, (args, kwargs)
    )
    if func._schema.name == "aten::_to_copy":
        if not outputs[0].is_floating_point():
            raise tracer.unsupported(f"conversion of the image to {outputs[0].dtype}")
        result = codes[0][0].clone()
    else:
        result = func(*codes[0], **codes[1])
    tracer.set_codes(outputs[0], result)


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
    return tracer.graph.recognise(_pointwise_4d(tracer, "copy", [codes]))


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


# Element by element.


def pointwise(tracer: Tracer, op: str, operands: Sequence[Tensor | float], shape: Sequence[int]) -> Tensor:
    """Codes of op(operands), which have codes broadcastable to `shape` or are numbers."""
    codes = [o.expand(*shape) if isinstance(o, Tensor) else float(o) for o in operands]
    tensors = [c for c in codes if isinstance(c, Tensor)]
    try:
        if len(shape) != 4 or shape[0] != tracer.graph.batch:
            raise LayoutError
        return _pointwise_4d(tracer, op, codes)
    except LayoutError:
        order, size = _plane_order(tracer, tensors[0].reshape(-1))
    sorted_codes = [c.reshape(-1)[order].view(size) if isinstance(c, Tensor) else c for c in codes]
    out = torch.empty(len(order), dtype=torch.int64)
    out[order] = _pointwise_4d(tracer, op, sorted_codes).reshape(-1)
    return out.view(*shape)


def _pointwise_4d(tracer: Tracer, op: str, operands: Sequence[Tensor | float]) -> Tensor:
    refs = [tracer.recognise(o) if isinstance(o, Tensor) else o for o in operands]
    _, channels, height, width = next(o.shape for o in operands if isinstance(o, Tensor))
    return tracer.add(Pointwise(tracer.module, channels, height, width, op=op, operands=refs))


def _plane_order(tracer: Tracer, flat: Tensor) -> tuple[Tensor, tuple[int, int, int, int]]:
    """The permutation that puts flat codes into the order (sample, channel, y, x) of their planes, and that size."""
    plane, sample, channel, y, x = tracer.graph.decode(flat.numpy())
    if (plane < 0).any():
        raise LayoutError
    size = (tracer.graph.batch, -1, len(set(y.tolist())), len(set(x.tolist())))
    area = size[0] * size[2] * size[3]
    if len(flat) % area:
        raise LayoutError
    return torch.from_numpy(np.lexsort((x, y, channel, plane, sample))), (size[0], len(flat) // area, size[2], size[3])


def blanked(tracer: Tracer, codes: Tensor) -> Ref:
    """A plane for codes in which elements inside a plane were replaced by zeros: the plane times a constant of zeros
    and ones.
    """
    keep = codes > 0
    if codes.dim() != 4 or not torch.equal(keep[0], keep[-1]):
        raise LayoutError
    source = _complete(tracer, codes)
    _, channels, height, width = codes.shape
    mask = tracer.add(Constant(tracer.module, channels, height, width, data=keep[0].float()))
    return tracer.graph.recognise(_pointwise_4d(tracer, "mul", [source, mask.expand(codes.shape)]))


def _complete(tracer: Tracer, codes: Tensor) -> Tensor:
    """The shifted window of planes that `codes` shows in part; LayoutError if there is none."""
    _, channels, height, width = codes.shape
    whole = torch.zeros_like(codes)
    for c in range(channels):
        filled = codes[0, c].nonzero()
        if not len(filled):
            continue
        iy, ix = filled[0].tolist()
        plane, _, channel, y, x = (int(v[0]) for v in tracer.graph.decode(codes[0, c, iy, ix].view(1).numpy()))
        node = tracer.graph.nodes[plane]
        own = tracer.graph.codes(node)[:, channel]
        top, left = iy - y, ix - x  # where the plane's origin lies in this tensor
        bottom, right = height - top - node.height, width - left - node.width
        whole[:, c] = F.pad(own, (left, right, top, bottom)).expand(codes.shape[0], -1, -1)
    if not torch.equal(torch.where(codes > 0, whole, 0), codes):
        raise LayoutError
    return whole


def _emit(tracer: Tracer, shape: Sequence[int]) -> Callable[..., Tensor]:
    return lambda op, *operands: pointwise(tracer, op, operands, shape)


def _operand(tracer: Tracer, value: Any) -> Tensor | float:
    """Codes of a tensor operand; a parameter with one element, or a number, as a number."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() == 1 and not tracer.depends(value) and not tracer.tape.depends(value):
        return float(value)
    return tracer.codes(value)


Formula = Callable[..., "Tensor | float"]


def elementwise(*names: str) -> Callable[[Formula], Formula]:
    """Register formula(emit, *operands, **rest) for ATen operators whose tensor arguments come first."""

    def add(formula: Formula) -> Formula:
        def apply(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
            emit = _emit(tracer, outputs[0].shape)
            schema = [a.name for a in func._schema.arguments]
            named = dict(zip(schema, args, strict=False)) | kwargs
            tensors = [_operand(tracer, v) for k, v in named.items() if k in ("self", "other")]
            rest = {k: v for k, v in named.items() if k not in ("self", "other")}
            result = formula(emit, *tensors, **rest)
            assert isinstance(result, Tensor)
            tracer.set_codes(outputs[0], result)

        rule(*names)(apply)
        return formula

    return add


for _name in ("tanh", "sigmoid", "relu", "exp", "abs", "neg", "sqrt", "log"):
    elementwise(_name)(lambda emit, x, op=_name: emit(op, x))
for _name, _op in (("maximum", "max"), ("minimum", "min")):
    elementwise(_name)(lambda emit, x, y, op=_op: emit(op, x, y))


@elementwise("add")
def _add(emit: Formula, x: Any, y: Any, alpha: float = 1) -> Any:
    return emit("add", x, y if alpha == 1 else emit("mul", y, alpha) if isinstance(y, Tensor) else y * alpha)


@elementwise("sub")
def _sub(emit: Formula, x: Any, y: Any, alpha: float = 1) -> Any:
    return emit("sub", x, y if alpha == 1 else emit("mul", y, alpha) if isinstance(y, Tensor) else y * alpha)


@elementwise("rsub")
def _rsub(emit: Formula, x: Any, y: Any, alpha: float = 1) -> Any:
    return emit("sub", y, x if alpha == 1 else emit("mul", x, alpha))


@elementwise("mul")
def _mul(emit: Formula, x: Any, y: Any) -> Any:
    return emit("mul", x, y)


@elementwise("div")
def _div(emit: Formula, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise LayoutError
    return emit("div", x, y)


@elementwise("reciprocal")
def _reciprocal(emit: Formula, x: Any) -> Any:
    return emit("div", 1.0, x)


@elementwise("elu")
def _elu(emit: Formula, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    """scale * (max(0, x) + alpha * (exp(min(0, input_scale * x)) - 1))."""
    scaled = x if input_scale == 1 else emit("mul", x, input_scale)
    low = emit("expm1", emit("min", scaled, 0.0))
    out = emit("add", emit("relu", x), low if alpha == 1 else emit("mul", low, alpha))
    return out if scale == 1 else emit("mul", out, scale)


@elementwise("leaky_relu")
def _leaky_relu(emit: Formula, x: Any, negative_slope: float = 0.01) -> Any:
    return emit("add", emit("relu", x), emit("mul", emit("min", x, 0.0), negative_slope))


@elementwise("silu")
def _silu(emit: Formula, x: Any) -> Any:
    return emit("mul", x, emit("sigmoid", x))


@elementwise("clamp", "hardtanh")
def _clamp(emit: Formula, x: Any, min: float | None = None, max: float | None = None, **bounds: float) -> Any:
    low, high = bounds.get("min_val", min), bounds.get("max_val", max)
    out = x if low is None else emit("max", x, low)
    return out if high is None else emit("min", out, high)


@elementwise("pow")
def _pow(emit: Formula, x: Any, exponent: float) -> Any:
    if exponent != 2:
        raise LayoutError
    return emit("mul", x, x)


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm")
def _batch_norm(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """(x - mean) / sqrt(var + eps) * weight + bias with running statistics: one scale and one shift per channel."""
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    if named.get("training"):
        raise tracer.unsupported("BatchNorm on batch statistics")
    scale = torch.rsqrt(named["running_var"].double() + named["eps"])
    scale = scale * named["weight"].double() if named["weight"] is not None else scale
    shift = -named["running_mean"].double() * scale
    shift = shift + named["bias"].double() if named["bias"] is not None else shift
    emit = _emit(tracer, outputs[0].shape)
    scale, shift = (tracer.codes(v.float().view(1, -1, 1, 1)) for v in (scale, shift))
    tracer.set_codes(outputs[0], emit("add", emit("mul", tracer.codes(args[0]), scale), shift))
