"""Pass 2 for attention: queries times keys, scaled, masked and normalised, times values, become one `Attention` node.

The scores of all positions and keys are no feature map, and too many to have codes. What is known of them is kept by
storage, in place of a shadow: where queries and keys come from, and the factors, biases and masks so far. Their values
are never computed. What else is made of them (their mean over heads, say, which nobody uses) is an error when a feature
map is made of it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgen.sampling import elementwise
from fastgen.sampling.graph import Attention, Constant, Graph, LayoutError, Ref
from fastgen.sampling.lowering import feature_map

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer

# A score as low as this is a mask: beside one that is seen its exponential is zero in float32.
MASKED = -1e4
_ALIASES = ("_unsafe_view", "_reshape_alias")  # not marked as views, but views


@dataclass(eq=False)
class Scores:
    """gain * query . key + bias, of which softmax may have been taken, times weight.

    Tensors of scores have the elements [samples * heads, queries, keys], in this order of memory or, as views, in
    another.

    query, keys: codes [N, heads, positions, depth]. gain, bias, weight: float64, broadcastable to [heads, queries,
    keys]. by_sample: a sample's heads lie side by side, not a head's samples. softmax: None, "plain", or "safe", which
    makes zeros of rows without a key.
    """

    query: Tensor
    keys: Tensor
    by_sample: bool
    gain: Tensor
    bias: Tensor
    weight: Tensor
    softmax: str | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        samples, heads, queries = self.query.shape[:3]
        return samples * heads, queries, self.keys.shape[2]

    def split(self, tensor: Tensor) -> Tensor:
        """[samples * heads, ...] -> [samples, heads, ...]"""
        samples, heads = self.query.shape[:2]
        if self.by_sample:
            return tensor.unflatten(0, (samples, heads))
        return tensor.unflatten(0, (heads, samples)).transpose(0, 1)

    def join(self, tensor: Tensor) -> Tensor:
        """[samples, heads, ...] -> [samples * heads, ...]"""
        return (tensor if self.by_sample else tensor.transpose(0, 1)).flatten(0, 1)

    def axes(self, tensor: Tensor) -> list[int]:
        """The dimensions of a tensor of scores in the order (samples and heads ..., queries, keys)."""
        batch, queries, keys = self.shape
        if tensor.numel() != batch * queries * keys or tensor.storage_offset():
            raise LayoutError("on some of the products of queries and keys")
        size, stride = tensor.shape, tensor.stride()
        of_keys = [d for d in range(tensor.dim()) if size[d] == keys and (stride[d] == 1 or keys == 1)]
        of_queries = [
            d
            for d in range(tensor.dim())
            if size[d] == queries and d not in of_keys[-1:] and (stride[d] == keys or queries == 1)
        ]
        if not of_keys or not of_queries:
            raise LayoutError("on products of queries and keys in another layout")
        last = [of_queries[-1], of_keys[-1]]
        return [*(d for d in range(tensor.dim()) if d not in last), *last]


class Unusable(str):
    """In place of scores: the operator that made something else of them."""


@contextlib.contextmanager
def undisguised() -> Iterator[None]:
    """PyTorch's attention comes as products and softmax, not as one of its fused operators."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def of(tracer: Tracer, *tensors: Any) -> Scores | Unusable | None:
    """What is known of the first of the tensors that has scores."""
    found = (tracer.scores_of(t) for t in tensors if isinstance(t, Tensor))
    return next((f for f in found if f is not None), None)


def lower(tracer: Tracer, func: Any, args: tuple, kwargs: dict) -> Any:
    """Run a call with scores among its arguments, or one that makes some; NotImplemented for others."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    known = of(tracer, *tensors)
    if known is None:
        if name in ("bmm", "baddbmm") and all(tracer.depends(t) for t in tensors[-2:]):
            return _begin(tracer, *elementwise.named_arguments(func, args, kwargs).values())
        return NotImplemented
    if func.is_view or name in _ALIASES:
        return func(*args, **kwargs)
    rule = _RULES.get(name) or (_RULES.get(name.removesuffix("_")) if func._schema.is_mutable else None)
    if rule is None or isinstance(known, Unusable):
        result = func(*args, **kwargs)
        for tensor in result if isinstance(result, tuple | list) else [result]:
            tracer.set_scores(tensor, known if isinstance(known, Unusable) else Unusable(func))
        return result
    return rule(tracer, func, elementwise.named_arguments(func, args, kwargs))


# Queries times keys.


def _begin(tracer: Tracer, *operands: Any) -> Tensor:
    """Of bmm(query, keys^T), or baddbmm(bias, query, keys^T, beta, alpha)."""
    rest = operands[2:]
    left, right = operands[:2]
    bias = None
    if rest:
        bias, left, right, beta, alpha = (*operands, 1, 1)[:5]
    query, keys = tracer.codes(left), tracer.codes(right).transpose(1, 2)
    samples = tracer.graph.batch
    if len(query) % samples:
        raise LayoutError("of matrices that do not belong to samples")
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    known = Scores(query[None], keys[None], _by_sample(tracer, query, keys), one, 0 * one, one)
    known = replace(known, query=torch.empty(samples, len(query) // samples, *query.shape[1:], device="meta"))
    known = replace(known, query=known.split(query), keys=known.split(keys))
    result = torch.empty(known.shape, dtype=left.dtype, device=left.device)
    if bias is not None:
        known = replace(known, gain=one * alpha, bias=_constant(tracer, known, result, bias) * beta)
    tracer.set_scores(result, known)
    return result


def _by_sample(tracer: Tracer, query: Tensor, keys: Tensor) -> bool:
    """Whether the heads of a sample lie side by side in codes [samples * heads, ...]."""
    samples = tracer.graph.batch
    heads = len(query) // samples
    for codes in (query, keys):
        flat = codes.flatten(1).numpy()
        first = flat[np.arange(len(flat)), np.argmax(flat > 0, axis=1)]
        plane, sample, *_ = tracer.graph.decode(first)
        if (first > 0).all() and all(tracer.graph.nodes[p].samples == samples for p in np.unique(plane)):
            expected = np.arange(samples)
            if np.array_equal(sample, np.repeat(expected, heads)):
                return True
            if np.array_equal(sample, np.tile(expected, heads)):
                return False
    raise LayoutError("of matrices that do not belong to samples")


# Scores made of scores.

Rule = Callable[["Tracer", Any, dict[str, Any]], Any]
_RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(names, function))
        return function

    return add


def _known(tracer: Tracer, tensor: Tensor) -> Scores:
    known = tracer.scores_of(tensor)
    if not isinstance(known, Scores):
        raise LayoutError("on products of queries and keys and something else")
    return known


def _result(tracer: Tracer, func: Any, tensor: Tensor, known: Scores, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor like a tensor of scores that has other ones; the same one where the call works in place."""
    result = tensor if func._schema.is_mutable else torch.empty_like(tensor, dtype=dtype)
    known.axes(result)
    tracer.set_scores(result, known)
    return result


def _constant(tracer: Tracer, known: Scores, tensor: Tensor, value: Any) -> Tensor:
    """What is combined with a tensor of scores, as float64 broadcastable to [heads, queries, keys]."""
    if not isinstance(value, Tensor):
        return torch.full((1, 1, 1), float(value), dtype=torch.float64)
    if tracer.varies(value):
        raise LayoutError("on products of queries and keys and what depends on the image, the labels or the condition")
    value = value.detach().to("cpu", torch.float64)
    if torch.broadcast_shapes(value.shape, tensor.shape) != tensor.shape:
        raise LayoutError("that repeats products of queries and keys")
    value = value.expand(tensor.shape).permute(known.axes(tensor))
    batch, queries, keys = known.shape
    for d in range(value.dim()):
        if value.stride(d) == 0:
            value = value.narrow(d, 0, 1)
    if math.prod(value.shape[:-2]) == 1:
        return value.reshape(1, *value.shape[-2:])
    sizes = [tensor.shape[d] for d in known.axes(tensor)[:-2]]
    each = known.split(value.expand(*sizes, *value.shape[-2:]).reshape(batch, *value.shape[-2:]))
    if not (each == each[:1]).all():
        raise LayoutError("on products of queries and keys and what differs between samples")
    return each[0]


def _operands(tracer: Tracer, named: dict[str, Any]) -> tuple[Tensor, Scores, Tensor, bool]:
    """(scores, what is known of them, the other operand, whether the scores come first)."""
    x, y = named["self"], named["other"]
    first = isinstance(x, Tensor) and tracer.scores_of(x) is not None
    scores, other = (x, y) if first else (y, x)
    known = _known(tracer, scores)
    return scores, known, _constant(tracer, known, scores, other), first


@_rule("mul", "div")
def _scale(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    scores, known, value, first = _operands(tracer, named)
    if func._schema.name.removeprefix("aten::").startswith("div"):
        if not first or named.get("rounding_mode") is not None:
            raise LayoutError("by products of queries and keys")
        value = 1 / value
    if known.softmax:
        known = replace(known, weight=known.weight * value)
    else:
        known = replace(known, gain=known.gain * value, bias=known.bias * value)
    return _result(tracer, func, scores, known)


@_rule("add", "sub", "rsub")
def _add(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    scores, known, value, first = _operands(tracer, named)
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    own, others = {"add": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}[name]
    if known.softmax:
        raise LayoutError("to probabilities of attention")
    factor = named.get("alpha", 1)  # of the second operand; of rsub, of the first
    own, others = (own, others * factor) if first == (name != "rsub") else (others * factor, own)
    known = replace(known, gain=known.gain * own, bias=known.bias * own + value * others)
    return _result(tracer, func, scores, known)


@_rule("masked_fill")
def _masked_fill(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    scores, known = named["self"], _known(tracer, named["self"])
    return _fill(tracer, func, scores, known, named["mask"], named["value"])


@_rule("where")
def _where(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    mask, x, y = named["condition"], named["self"], named["other"]
    if isinstance(x, Tensor) and tracer.scores_of(x) is not None:
        return _fill(tracer, func, x, _known(tracer, x), ~mask, y)
    return _fill(tracer, func, y, _known(tracer, y), mask, x)


def _fill(tracer: Tracer, func: Any, scores: Tensor, known: Scores, mask: Tensor, value: Any) -> Tensor:
    filled = _constant(tracer, known, scores, mask) != 0
    number = _constant(tracer, known, scores, value)
    zero = torch.zeros(1, 1, 1, dtype=torch.float64)
    if not known.softmax:
        gain, bias = torch.where(filled, zero, known.gain), torch.where(filled, number, known.bias)
        known = replace(known, gain=gain, bias=bias)
    elif (number == 0).all():
        known = replace(known, weight=torch.where(filled, zero, known.weight))
    else:
        raise LayoutError("of probabilities of attention by numbers")
    return _result(tracer, func, scores, known)


@_rule("_softmax", "_safe_softmax")
def _softmax(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    scores, known = named["self"], _known(tracer, named["self"])
    if named["dim"] % scores.dim() != known.axes(scores)[-1] or known.softmax:
        raise LayoutError("over anything but the keys")
    known = replace(known, softmax="safe" if "safe" in func._schema.name else "plain")
    return _result(tracer, func, scores, known)


@_rule("clone", "_to_copy")
def _copy(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    scores, known = named["self"], _known(tracer, named["self"])
    dtype = named.get("dtype") or scores.dtype
    if not dtype.is_floating_point:
        raise LayoutError("of products of queries and keys")
    return _result(tracer, func, scores, known, dtype)


# Probabilities times values.


@_rule("bmm")
def _product(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    """Of probabilities and values, or their transposes."""
    x, y = named["self"], named["mat2"]
    transposed = tracer.scores_of(x) is None
    scores, values = (y, x) if transposed else (x, y)
    known = _known(tracer, scores)
    if not known.softmax or tracer.scores_of(values) is not None or not tracer.depends(values):
        raise LayoutError("of products of queries and keys and anything but softmax and values")
    axes = [0, 2, 1] if transposed else [0, 1, 2]
    if scores.dim() != 3 or known.axes(scores) != axes:
        raise LayoutError("that sums over anything but the keys")
    codes = _attend(tracer, known, known.split(tracer.codes(values).permute(axes)))
    result = torch.empty(x.shape[0], x.shape[1], y.shape[2], dtype=x.dtype, device=x.device)
    tracer.set_codes(result, known.join(codes).permute(axes))
    return result


def _attend(tracer: Tracer, known: Scores, values: Tensor) -> Tensor:
    """Codes [N, heads, queries, width] of attention to values [N, heads, keys, width]."""
    samples, heads, queries, width = *known.query.shape[:3], values.shape[3]
    query_order, query = _plane(tracer, known.query)
    key_order, keys = _plane(tracer, known.keys)
    _, of_values = _plane(tracer, values, key_order)
    node = tracer.graph.nodes[query.plane[0]]
    rows, columns = query_order[0].flatten(), key_order[0].flatten()  # of scores, by position
    scale, spans, bias, factor = _seen(known, rows, columns)
    found = Attention(
        tracer.module, heads * width, node.height, node.width, stride=query.stride, heads=heads, scale=scale,
        query=query, keys=keys, values=of_values, spans=spans, bias=bias,
    )  # fmt: skip
    codes = tracer.add(found)
    if factor is not None:
        size = (heads * width, node.height, node.width)
        data = factor.expand(heads, -1).repeat_interleave(width, 0).view(size).contiguous()
        codes = elementwise.pointwise_4d(
            tracer, "mul", [codes, tracer.add(Constant(tracer.module, *size, data=data)).expand(codes.shape)]
        )
    result = torch.empty(samples * queries, heads * width, dtype=torch.int64)
    result[query_order] = codes.permute(0, 2, 3, 1)
    return result.view(samples, queries, heads, width).transpose(1, 2)


def _plane(tracer: Tracer, codes: Tensor, order: Tensor | None = None) -> tuple[Tensor, Ref]:
    """Codes [N, heads, positions, channels] as channels of one plane, in place: the rows [N, h, w] of a tensor [N *
    positions] that make the plane, given or found, and the channels.
    """
    rows = codes.transpose(1, 2).flatten(2).flatten(0, 1)
    if order is None:
        order, grid, ref = feature_map(tracer, rows)
    else:
        grid = rows[order].permute(0, 3, 1, 2).contiguous()
        ref = tracer.recognise(grid)
    if not _in_place(tracer.graph, ref, grid.shape[2], grid.shape[3]):
        ref = tracer.graph.recognise(elementwise.pointwise_4d(tracer, "copy", [grid]))
    return order, ref


def _in_place(graph: Graph, ref: Ref, height: int, width: int) -> bool:
    node = graph.nodes[ref.plane[0]]
    if ref.plane[0] < 0 or ref.breaks().any() or ref.dy.any() or ref.dx.any():
        return False
    return (node.height, node.width) == (height, width) and (node.given or node.stride == ref.stride)


def _seen(known: Scores, rows: Tensor, columns: Tensor) -> tuple[float, Tensor, Tensor | None, Tensor | None]:
    """(scale, spans, bias) of an `Attention` whose positions and keys are these rows and columns of the scores, and
    what it is multiplied by [heads or 1, positions] or None.
    """
    _, queries, keys = known.shape
    gain, bias, weight = torch.broadcast_tensors(known.gain, known.bias, known.weight)
    size = (len(gain), queries, keys)
    gain, bias, weight = (v.expand(size)[:, rows][:, :, columns] for v in (gain, bias, weight))
    seen = (bias > MASKED) & (weight != 0).any(2, keepdim=True)
    if known.softmax == "plain":
        alone = ~seen.any(2) & (weight != 0).any(2)
        if alone.any():
            raise LayoutError("of a position that sees no key: softmax makes it see all of them, or NaN")
    weight = torch.where(seen, weight, torch.nan)
    factor = weight.nanmean(2)
    if ((weight - factor[:, :, None]).abs().nan_to_num() > 1e-6 * factor[:, :, None].abs()).any():
        raise LayoutError("of probabilities times what differs between keys")
    scales = gain[seen]
    scale = float(scales[0]) if len(scales) else 1.0
    if (scales != scale).any():
        raise LayoutError("of products of queries and keys times what differs between them")
    any_head = seen.any(0)
    some = any_head.any(1)
    begin = torch.where(some, any_head.int().argmax(1), 0)
    end = torch.where(some, keys - any_head.flip(1).int().argmax(1), 0)
    spans = torch.stack([begin, end], 1).int()
    index = torch.arange(keys)
    inside = (index >= begin[:, None]) & (index < end[:, None])
    bias = torch.where(seen, bias, -torch.inf)
    simple = torch.equal(seen, inside.expand(seen.shape)) and not bias[seen].any()
    factor = factor.nan_to_num(1.0).float()
    return scale, spans, None if simple else bias.float().contiguous(), None if (factor == 1).all() else factor
