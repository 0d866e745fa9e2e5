"""Pass 2 for operators that work element by element: they become `Pointwise` nodes over the primitives of
`fastgen.sampling.plan.PRIMITIVES`.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.sampling.graph import Condition, Constant, LayoutError, Pointwise, Ref, Stride
from fastgen.sampling.rules import find, rule

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


def pointwise(tracer: Tracer, op: str, operands: Sequence[Tensor | float], shape: Sequence[int]) -> Tensor:
    """Codes of op(operands), which have codes broadcastable to `shape` or are numbers."""
    codes = [_expanded(o, tuple(shape)) if isinstance(o, Tensor) else float(o) for o in operands]
    tensors = [c for c in codes if isinstance(c, Tensor)]
    for pieces in (False, True):  # a layout in which all are views of planes is the right one, another may be none
        if len(shape) == 4 and shape[0] == tracer.graph.batch and not _are_tokens(tracer, tensors, pieces):
            with contextlib.suppress(LayoutError):
                return pointwise_4d(tracer, op, codes, pieces=pieces)
        for order in _orders(tracer, tensors, shape, pieces):
            with contextlib.suppress(LayoutError):
                return _pointwise_in(tracer, order, op, codes, shape, pieces)
    raise LayoutError


def _are_tokens(tracer: Tracer, tensors: Sequence[Tensor], pieces: bool) -> bool:
    """Whether tensors of four dimensions look like feature maps [N, C, h, w] and are none: what would be a channel
    holds several channels of one plane, or, being a single number, the channels are positions.
    """
    single = tensors[0].shape[2:] == (1, 1)
    if not pieces and not single:
        return False
    given = np.array([True, *(n.given for n in tracer.graph.nodes)])  # from plane -1 on
    for codes in tensors:
        plane, _, channel, y, x = tracer.graph.decode(codes[0].numpy())
        if single and len(np.unique(np.stack([y, x])[:, ~given[1 + plane]], axis=1).T) > 1:
            return True
        where = np.broadcast_to(np.arange(len(plane))[:, None, None], plane.shape)
        found = np.stack([where, plane, channel])[:, ~given[1 + plane]]
        if np.unique(found[:2], axis=1).shape != np.unique(found, axis=1)[:2].shape:
            return True
    return False


def _expanded(codes: Tensor, shape: tuple[int, ...]) -> Tensor:
    return codes if codes.shape == shape else codes.expand(shape)


def _pointwise_in(
    tracer: Tracer, order: Order, op: str, codes: Sequence[Tensor | float], shape: Sequence[int], pieces: bool
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


def _orders(tracer: Tracer, tensors: Sequence[Tensor], shape: Sequence[int], pieces: bool) -> Iterator[Order]:
    """Ways of seeing tensors of a shape as feature maps: indices [N, C, h, w] of their elements."""
    if tuple(shape) in tracer.orders:  # most layers have that of the layer before
        yield tracer.orders[tuple(shape)]
    for tensor in tensors:  # in the order of one operand's planes
        with contextlib.suppress(LayoutError):
            yield Order(_plane_order(tracer, tensor.reshape(-1)))
    yield from map(Order, arrangements(tracer, tensors, shape, pieces))


class Order:
    """An order of the elements, or rows, of tensors: indices, -1 in places whose elements nobody asks for.

    Most are strided views, which are much faster to read and write than single elements.
    """

    def __init__(self, index: Tensor):
        self.index = index
        self._asked = index >= 0
        self._complete = bool(self._asked.all())
        self._strides = self._find_strides() if self._complete and index.numel() else None

    def _find_strides(self) -> list[int] | None:
        index, first = self.index, int(self.index.flatten()[0])
        sizes = index.shape
        strides = [int(index.select(d, 1).flatten()[0]) - first if n > 1 else 0 for d, n in enumerate(sizes)]
        last = sum((n - 1) * stride for n, stride in zip(sizes, strides, strict=True))
        if first or min(strides) < 0 or last != index.numel() - 1:
            return None
        return strides if torch.equal(index, torch.arange(index.numel()).as_strided(sizes, strides)) else None

    def of(self, codes: Tensor) -> Tensor:
        """Elements or rows of codes [count, ...] in this order."""
        if self._strides is not None:
            return self._view(codes.contiguous())
        if self._complete:
            return codes[self.index]
        asked = self._asked.view(*self.index.shape, *[1] * (codes.dim() - 1))
        return torch.where(asked, codes[self.index], -1)

    def restored(self, codes: Tensor, count: int) -> Tensor:
        """The `count` elements or rows of which `codes` are those in this order."""
        result = torch.empty(count, *codes.shape[self.index.dim() :], dtype=torch.int64)
        self.restore(codes, result)
        return result

    def restore(self, codes: Tensor, result: Tensor) -> None:
        """Put codes that are in this order into a contiguous tensor where they come from."""
        if self._strides is not None:
            self._view(result).copy_(codes)
        elif self._complete:
            result[self.index] = codes
        else:
            result[self.index[self._asked]] = codes[self._asked]

    def among(self, rows: Tensor) -> Order:
        """The order in a tensor of which rows, by their indices, are in this one."""
        return Order(torch.where(self._asked, rows[self.index], -1))

    def _view(self, codes: Tensor) -> Tensor:
        row = codes[0].numel()
        assert self._strides is not None
        strides = [*(row * s for s in self._strides), *codes.stride()[1:]]
        return codes.as_strided((*self.index.shape, *codes.shape[1:]), strides)


def arrangements(tracer: Tracer, tensors: Sequence[Tensor], shape: Sequence[int], pieces: bool) -> Iterator[Tensor]:
    """Indices [N, C, h, w] of the elements of tensors of a shape in the layouts that feature maps are kept in: channels
    last, positions in one dimension, or together with the samples in one. The likeliest come first.
    """
    index, batch = torch.arange(math.prod(shape)), tracer.graph.batch
    layouts: list[Tensor] = []
    if len(shape) == 4 and shape[0] == batch:
        whole = index.view(*shape)
        yield whole.permute(0, 3, 1, 2)
        if pieces:  # tokens behind heads, before heads, or last
            layouts += [whole.transpose(2, 3).flatten(1, 2), whole.flatten(2).transpose(1, 2), whole.flatten(1, 2)]
    elif len(shape) in (2, 3) and index.numel() % (batch * shape[-1]) == 0:
        layouts.append(index.view(batch, -1, shape[-1]).transpose(1, 2))  # channels last
        if len(shape) == 3 and shape[0] == batch and shape[2] > 1:
            layouts.append(index.view(*shape))
        if len(shape) == 3 and shape[1] == batch:
            layouts.append(index.view(*shape).permute(1, 2, 0))
    for tokens in layouts:
        codes = [t.reshape(-1)[tokens] for t in tensors]
        if len(shape) == 4:  # keys, as likely as not
            last = appended(tracer, codes)
            tokens, codes = tokens.roll(last, 2), [c.roll(last, 2) for c in codes]
        for width, before in rasters(tracer, codes, pieces):
            yield in_rows(tokens, width, before)


def depends(tracer: Tracer, codes: Tensor) -> bool:
    """Whether elements depend on the image."""
    return not all(p < 0 or tracer.graph.nodes[p].given for p in np.unique(tracer.graph.planes(codes.numpy())))


def appended(tracer: Tracer, tensors: Sequence[Tensor]) -> int:
    """How many of the last tokens [N, C, tokens] depend on the image in no channel, where others do."""
    given = np.array([True, *(n.given for n in tracer.graph.nodes)])  # from plane -1 on
    later = np.any([~given[1 + tracer.graph.planes(t.numpy())].all((0, 1)) for t in tensors], axis=0)
    return int(np.argmax(later[::-1]))


def in_rows(tokens: Tensor, width: int, before: int) -> Tensor:
    """[..., tokens] -> [..., h, width], -1 in `before` places in front of the first, and behind the last."""
    after = -(before + tokens.shape[-1]) % width
    return F.pad(tokens, (before, after), value=-1).unflatten(-1, (-1, width))


def rasters(tracer: Tracer, tensors: Sequence[Tensor], pieces: bool) -> Iterator[tuple[int, int]]:
    """Ways of seeing tokens [N, C, count] as rows of pixels: the width, and how many pixels go before the first token.

    Planes among them tell the width and, where tokens lie in front of the image's, the place in the row: that of the
    token, or the next one, where tokens are shifted. Then come squares: where zeros leave a choice, they are the
    likelier.
    """
    count = tensors[0].shape[2]
    found = []
    for tokens in tensors:
        plane, _, _, _, x = tracer.graph.decode(tokens[0].numpy())
        for p in np.unique(plane[plane >= 0]):
            node = tracer.graph.nodes[p]
            if node.given:
                continue
            if node.height == 1:  # which more tokens may continue; but zeros around it are rows, too
                found += [(count, 0)] * pieces
                continue
            first = (x - np.arange(count))[plane == p] % node.width
            if (first != first[0]).any():
                found += [(node.width, 0)] * (count % node.width == 0)
            else:
                before = [int(first[0]), (int(first[0]) + 1) % node.width]
                found += [(node.width, b) for b in sorted(before, key=lambda b: (b + count) % node.width != 0)]
    squares = sorted((w for w in range(1, count + 1) if count % w == 0), key=lambda w: abs(w - count // w))
    yield from dict.fromkeys([*found, *((w, 0) for w in squares)])


def pointwise_4d(
    tracer: Tracer,
    op: str,
    operands: Sequence[Tensor | Ref | float],
    multiple: Stride = (1, 1),
    pieces: bool = True,
    size: Sequence[int] = (),
) -> Tensor:
    """Codes of op(operands), which are codes [N, C, h, w], frames of that size, or numbers; without codes, `size` is
    (C, h, w).

    The stride along an axis with one position is anybody's guess; it is made a multiple of `multiple`. pieces: see
    `Tracer.recognise`.
    """
    refs = [tracer.recognise(o, pieces) if isinstance(o, Tensor) else o for o in operands]
    channels, height, width = size or next(o.shape[1:] for o in operands if isinstance(o, Tensor))
    frames = [r for r in refs if isinstance(r, Ref) and _depends_on_image(tracer, r)]
    sy, sx = (max((f.stride[axis] for f in frames), default=1) for axis in (0, 1))
    stride = (math.lcm(sy, multiple[0]) if height == 1 else sy, math.lcm(sx, multiple[1]) if width == 1 else sx)
    at_stride = [tracer.graph.at_stride(r, stride, (height, width)) if isinstance(r, Ref) else r for r in refs]
    return tracer.add(Pointwise(tracer.module, channels, height, width, stride=stride, op=op, operands=at_stride))


def _depends_on_image(tracer: Tracer, ref: Ref) -> bool:
    return not all(tracer.graph.nodes[p].given for p in np.unique(ref.plane[ref.plane >= 0]))


def _plane_order(tracer: Tracer, flat: Tensor) -> Tensor:
    """The indices [N, C, h, w] that put flat codes into the order (sample, channel, y, x) of their planes."""
    plane, sample, channel, y, x = tracer.graph.decode(flat.numpy())
    if (plane < 0).any() or all(tracer.graph.nodes[p].given for p in np.unique(plane)):
        raise LayoutError
    order = np.lexsort((x, y, channel, plane, sample))
    codes = flat.numpy()[order]
    if (codes[1:] == codes[:-1]).any():  # repeated channels: a key for several heads
        order = np.lexsort((x, y, channel, plane, occurrence(flat.numpy()), sample))
    rows, columns = at_places(y[order], x[order], tracer.graph.batch)
    each = torch.from_numpy(order).view(tracer.graph.batch, -1, len(rows))
    result = torch.full((*each.shape[:2], int(rows.max()) + 1, int(columns.max()) + 1), -1)
    result[:, :, rows, columns] = each
    return result


def at_places(y: np.ndarray, x: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a grid for elements whose places repeat themselves, at least once for each sample."""
    width = int(x.max()) + 1
    places = y * width + x
    again = np.flatnonzero(places == places[0])
    count = int(again[1]) if len(again) > 1 else len(places)
    if len(places) % (batch * count) or (places.reshape(-1, count) != places[:count]).any():
        raise LayoutError
    rows, columns = (np.unique(v[:count], return_inverse=True)[1] for v in (y, x))
    if (rows.max() + 1) * (columns.max() + 1) > 2 * count + width:  # no rows of pixels
        raise LayoutError
    return rows, columns


def occurrence(values: np.ndarray) -> np.ndarray:
    """How many equal values come before each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    index = np.arange(len(values))
    result = np.empty_like(index)
    result[order] = index - np.maximum.accumulate(np.where(first, index, 0))
    return result


def rebuilt(tracer: Tracer, codes: Tensor) -> Tensor:
    """The same codes, but for channels that hold elements of constants or of one condition in whatever order: these
    get a plane of their own.
    """
    plane, *_ = tracer.graph.decode(codes.numpy())
    nodes = tracer.graph.nodes
    constant: list[int] = []
    conditional: dict[int, list[int]] = {}
    for c in range(codes.shape[1]):
        sources = [int(p) for p in np.unique(plane[:, c]) if p >= 0]
        if sources and all(isinstance(nodes[p], Constant) for p in sources):
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
    if codes.dim() != 4:
        raise LayoutError
    plane, _, channel, y, x = tracer.graph.decode(codes.numpy())
    nodes = tracer.graph.nodes
    for p in np.unique(plane[plane >= 0]):  # the channels of an image one row high are no rows
        of_each = np.ma.masked_where(plane != p, channel)
        if not nodes[p].given and (np.ma.ptp(of_each, axis=(0, 2, 3)) > 0).any():
            raise LayoutError
    row, column = np.ogrid[: codes.shape[2], : codes.shape[3]]
    given = np.array([n.given for n in nodes])[plane]
    views = np.stack([plane, np.where(given, 0, y - row), np.where(given, 0, x - column)])
    constant = np.array([isinstance(n, Constant) for n in nodes])[plane]
    views[:, constant] = -2
    views[:, plane < 0] = -1
    kinds = np.unique(views.reshape(3, -1), axis=1).T
    kinds = kinds[kinds[:, 0] != -1]
    if not 1 < len(kinds) <= _MOST_PIECES:
        raise LayoutError
    parts = [
        (kind[0], torch.where(torch.from_numpy((views == kind[:, None, None, None, None]).all(0)), codes, 0))
        for kind in kinds
    ]
    for source, part in parts:
        if source >= 0 and not nodes[source].given:
            tracer.graph.recognise(part)  # it raises before anything is made
    total = torch.zeros_like(codes)
    for i, (source, part) in enumerate(parts):
        if source == -2:
            part = _new_constant(tracer, part).expand(codes.shape)
        elif nodes[source].given:
            part = _new_condition(tracer, part, int(source))
        total = part if i == 0 else pointwise_4d(tracer, "add", [total, part])
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
    total, *others = (
        _masked(tracer, torch.where(torch.from_numpy(plane == p), codes, 0)) for p in np.unique(plane[plane >= 0])
    )
    for other in others:
        total = pointwise_4d(tracer, "add", [total, other])
    return tracer.graph.recognise(total)


def _masked(tracer: Tracer, codes: Tensor) -> Tensor:
    """Codes of a plane that holds what `codes` holds: in each channel, elements of one plane and zeros."""
    keep = codes > 0
    if not torch.equal(keep[0], keep[-1]):
        raise LayoutError
    source = tracer.graph.recognise(codes, holes=True)
    _, channels, height, width = codes.shape
    mask = tracer.add(Constant(tracer.module, channels, height, width, data=keep[0].float()))
    return pointwise_4d(tracer, "mul", [source, mask.expand(codes.shape)])


def _emit(tracer: Tracer, shape: Sequence[int]) -> Callable[..., Tensor]:
    return lambda op, *operands: pointwise(tracer, op, operands, shape)


def _operand(tracer: Tracer, value: Any) -> Tensor | float:
    """Codes of a tensor operand; a parameter with one element, or a number, as a number."""
    if not isinstance(value, Tensor):
        return float(value)
    if value.numel() == 1 and not tracer.varies(value):
        return float(value)
    return tracer.codes(value)


def named_arguments(func: Any, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call of an ATen operator by their names in its schema."""
    return dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs


Formula = Callable[..., "Tensor | float"]


def elementwise(*names: str) -> Callable[[Formula], Formula]:
    """Register formula(emit, *operands, **rest) for ATen operators; operands are the arguments `self` and `other`."""

    def add(formula: Formula) -> Formula:
        def apply(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
            emit = _emit(tracer, outputs[0].shape)
            named = named_arguments(func, args, kwargs)
            tensors = [_operand(tracer, v) for k, v in named.items() if k in ("self", "other")]
            rest = {
                k: _operand(tracer, v) if isinstance(v, Tensor) else v
                for k, v in named.items()
                if k not in ("self", "other")
            }
            result = formula(emit, *tensors, **rest)
            assert isinstance(result, Tensor)
            tracer.set_codes(outputs[0], result)

        rule(*names)(apply)
        return formula

    return add


for _name in ("tanh", "sigmoid", "relu", "exp", "expm1", "abs", "neg", "sqrt", "log", "erf"):
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


_mul_real = find(torch.ops.aten.mul.Tensor)


@rule("mul")
def _mul_any(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """Complex numbers turn queries and keys; their parts lie beside each other."""
    if not outputs[0].is_complex():
        assert _mul_real is not None
        return _mul_real(tracer, func, args, kwargs, outputs)
    if not all(isinstance(a, Tensor) and a.is_complex() and not a.is_conj() for a in args):
        raise LayoutError("on complex numbers and others")
    (a, b), (c, d) = (tracer.codes(torch.view_as_real(v)).unbind(-1) for v in args)
    emit = _emit(tracer, outputs[0].shape)
    real = emit("sub", emit("mul", a, c), emit("mul", b, d))
    imaginary = emit("add", emit("mul", a, d), emit("mul", b, c))
    tracer.set_codes(torch.view_as_real(outputs[0]), torch.stack([real, imaginary], -1))


@elementwise("div")
def _div(emit: Formula, x: Any, y: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise LayoutError(f"with rounding mode {rounding_mode!r}")
    return emit("div", x, y)


@elementwise("reciprocal")
def _reciprocal(emit: Formula, x: Any) -> Any:
    return emit("div", 1.0, x)


@elementwise("elu")
def _elu(emit: Formula, x: Any, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Any:
    """scale * (max(0, x) + alpha * (exp(min(0, input_scale * x)) - 1))."""
    if alpha == scale == input_scale == 1:
        return emit("elu", x)
    scaled = x if input_scale == 1 else emit("mul", x, input_scale)
    low = emit("expm1", emit("min", scaled, 0.0))
    out = emit("add", emit("relu", x), low if alpha == 1 else emit("mul", low, alpha))
    return out if scale == 1 else emit("mul", out, scale)


@elementwise("leaky_relu")
def _leaky_relu(emit: Formula, x: Any, negative_slope: float = 0.01) -> Any:
    return emit("add", emit("relu", x), emit("mul", emit("min", x, 0.0), negative_slope))


@elementwise("celu")
def _celu(emit: Formula, x: Any, alpha: float = 1) -> Any:
    """max(0, x) + alpha * (exp(min(0, x / alpha)) - 1)."""
    return _elu(emit, x, alpha, 1, 1 / alpha)


@elementwise("selu")
def _selu(emit: Formula, x: Any) -> Any:
    """Klambauer et al. 2017, "Self-Normalizing Neural Networks", equation 2."""
    return _elu(emit, x, 1.6732632423543772, 1.0507009873554805, 1)


@elementwise("gelu")
def _gelu(emit: Formula, x: Any, approximate: str = "none") -> Any:
    """Hendrycks and Gimpel 2016: x times the normal distribution function, or its approximation by tanh."""
    if approximate == "tanh":
        cubic = emit("mul", emit("mul", emit("mul", x, x), x), 0.044715)
        inner = emit("tanh", emit("mul", emit("add", x, cubic), math.sqrt(2 / math.pi)))
    else:
        inner = emit("erf", emit("mul", x, math.sqrt(0.5)))
    return emit("mul", emit("mul", x, 0.5), emit("add", inner, 1.0))


@elementwise("softplus")
def _softplus(emit: Formula, x: Any, beta: float = 1, threshold: float = 20) -> Any:
    """log(1 + exp(beta * x)) / beta; beyond the threshold the identity, to float32 rounding."""
    scaled = x if beta == 1 else emit("mul", x, beta)
    tail = emit("log", emit("add", emit("exp", emit("neg", emit("abs", scaled))), 1.0))
    out = emit("add", emit("relu", scaled), tail)
    return out if beta == 1 else emit("div", out, beta)


@elementwise("log_sigmoid", "log_sigmoid_forward")
def _log_sigmoid(emit: Formula, x: Any) -> Any:
    return emit("neg", _softplus(emit, emit("neg", x)))


@elementwise("mish")
def _mish(emit: Formula, x: Any) -> Any:
    return emit("mul", x, emit("tanh", _softplus(emit, x)))


@elementwise("hardsigmoid")
def _hardsigmoid(emit: Formula, x: Any) -> Any:
    return emit("div", emit("min", emit("max", emit("add", x, 3.0), 0.0), 6.0), 6.0)


@elementwise("hardswish")
def _hardswish(emit: Formula, x: Any) -> Any:
    return emit("mul", x, _hardsigmoid(emit, x))


@elementwise("rsqrt")
def _rsqrt(emit: Formula, x: Any) -> Any:
    return emit("div", 1.0, emit("sqrt", x))


@elementwise("lerp")
def _lerp(emit: Formula, x: Any, end: Any, weight: Any) -> Any:
    return emit("add", x, emit("mul", weight, emit("sub", end, x)))


@elementwise("addcmul")
def _addcmul(emit: Formula, x: Any, tensor1: Any, tensor2: Any, value: float = 1) -> Any:
    for factor in (tensor2, value):
        both = isinstance(tensor1, float) and isinstance(factor, int | float)
        tensor1 = tensor1 * factor if both else emit("mul", tensor1, factor)
    return emit("add", x, tensor1)


@rule("_prelu_kernel")
def _prelu(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    emit = _emit(tracer, outputs[0].shape)
    x, slope = (tracer.codes(a) for a in args)
    tracer.set_codes(outputs[0], emit("add", emit("relu", x), emit("mul", emit("min", x, 0.0), slope)))


@elementwise("silu")
def _silu(emit: Formula, x: Any) -> Any:
    return emit("mul", x, emit("sigmoid", x))


@rule("glu")
def _glu(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """The first half of a dimension times the sigmoid of the second."""
    value, gate = tracer.codes(args[0]).chunk(2, dim=args[1] if len(args) > 1 else -1)
    emit = _emit(tracer, outputs[0].shape)
    tracer.set_codes(outputs[0], emit("mul", value, emit("sigmoid", gate)))


@elementwise("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(emit: Formula, x: Any, min: float | None = None, max: float | None = None, **bounds: float) -> Any:
    low, high = bounds.get("min_val", min), bounds.get("max_val", max)
    out = x if low is None else emit("max", x, low)
    return out if high is None else emit("min", out, high)


_MOST_FACTORS = 8  # of a power


@elementwise("pow")
def _pow(emit: Formula, x: Any, exponent: Tensor | float) -> Any:
    if isinstance(exponent, Tensor) or abs(exponent) not in (0.5, *range(1, _MOST_FACTORS + 1)):
        raise LayoutError(f"with an exponent other than 0.5, 1, ..., {_MOST_FACTORS} and their negatives")
    result = emit("sqrt", x) if abs(exponent) == 0.5 else x
    for _ in range(abs(int(exponent)) - 1):
        result = emit("mul", result, x)
    return result if exponent > 0 else emit("div", 1.0, result)


@rule("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "batch_norm")
def _batch_norm(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """(x - mean) / sqrt(var + eps) * weight + bias with running statistics: one scale and one shift per channel."""
    named = named_arguments(func, args, kwargs)
    if named.get("training"):
        raise tracer.unsupported("BatchNorm on batch statistics")
    scale = torch.rsqrt(named["running_var"].double() + named["eps"])
    scale = scale * named["weight"].double() if named["weight"] is not None else scale
    shift = -named["running_mean"].double() * scale
    shift = shift + named["bias"].double() if named["bias"] is not None else shift
    emit = _emit(tracer, outputs[0].shape)
    scale, shift = (tracer.codes(v.float().view(1, -1, 1, 1)) for v in (scale, shift))
    tracer.set_codes(outputs[0], emit("add", emit("mul", tracer.codes(args[0]), scale), shift))
