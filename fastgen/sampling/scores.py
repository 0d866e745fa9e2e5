"""Pass 2 for the products of queries and keys, before they are attention.

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
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from fastgen.sampling.elementwise import named_arguments
from fastgen.sampling.graph import LayoutError
from fastgen.sampling.rules import adding_to

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


# A score as low as this is a mask: beside one that is seen its exponential is zero in float32. People write -1e4, and
# add other biases to it, or divide it with the scores.
MASKED = -1e3


# Operators that make views, though not marked so, or look only at the shape.
_LIKE = (
    "_unsafe_view _reshape_alias zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "new_empty_strided"
).split()


@dataclass(eq=False)
class Scores:
    """gain * query . key + bias, of which softmax may have been taken, times weight.

    Tensors of scores have the elements [samples * heads, queries, keys], in this order of memory or, as views, in
    another.

    query, keys: codes [N, heads, positions, depth]. gain, bias, weight: float64, broadcastable to [heads, queries,
    keys]. by_sample: a sample's heads lie side by side, not a head's samples. softmax: None, "exp" (the exponentials
    alone), "plain", or "safe", which makes zeros of rows without a key. swapped: in memory, keys come before queries.
    """

    query: Tensor
    keys: Tensor
    by_sample: bool
    gain: Tensor
    bias: Tensor
    weight: Tensor
    softmax: str | None = None
    swapped: bool = False

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
        rows, columns = (keys, queries) if self.swapped else (queries, keys)
        if tensor.numel() != batch * queries * keys or tensor.storage_offset():
            raise LayoutError("on some of the products of queries and keys")
        size, stride, dims = tensor.shape, tensor.stride(), range(tensor.dim())
        inner = [d for d in dims if size[d] == columns and (stride[d] == 1 or columns == 1)][-1:]
        outer = [d for d in dims if size[d] == rows and d not in inner and (stride[d] == columns or rows == 1)][-1:]
        if not inner or not outer:
            raise LayoutError("on products of queries and keys in another layout")
        last = [*inner, *outer] if self.swapped else [*outer, *inner]
        return [*sorted((d for d in dims if d not in last), key=lambda d: -stride[d]), *last]

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor of scores is [samples * heads, queries, keys]; a single query and key say nothing."""
        return tuple(tensor.shape) == self.shape and (self.axes(tensor) == [0, 1, 2] or self.shape[1:] == (1, 1))


class Unusable(str):
    """In place of scores: the operator that made something else of them."""


@dataclass(eq=False)
class Reduced:
    """In place of scores: their "maximum" or "sum" over the keys, and the sizes and strides of such a tensor."""

    kind: str
    of: Scores
    layout: list[tuple[int, int]]


Known = Scores | Reduced | Unusable


@contextlib.contextmanager
def undisguised() -> Iterator[None]:
    """PyTorch's attention comes as products and softmax, not as one of its fused operators, unless the module asks for
    one (`unfused`).
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# What PyTorch's attention becomes on other devices, and here where the module chooses the kernel.
_FUSED = (
    "flash_attention_for_cpu flash_attention efficient_attention cudnn_attention fused_attention_overrideable"
).split()


def unfused(func: Any, args: tuple, kwargs: dict) -> Any:
    """The results of a fused operator, its first one by products and softmax; NotImplemented for other operators."""
    if func._schema.name.removeprefix("aten::_scaled_dot_product_") not in _FUSED:
        return NotImplemented
    named = named_arguments(func, args, kwargs)
    query, key, value = named["query"], named["key"], named["value"]
    with sdpa_kernel(SDPBackend.MATH):
        attended = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=named.get("attn_mask", named.get("attn_bias")),
            dropout_p=named.get("dropout_p", 0.0),
            is_causal=named.get("is_causal", False),
            scale=named.get("scale"),
            enable_gqa=query.shape[1] != key.shape[1],
        )
    # Heads lie beside each other in the results of such operators, and are views of one feature map.
    others = (0 if str(r.type) != "Tensor" else torch.empty(0) for r in func._schema.returns[1:])
    return attended.transpose(1, 2).contiguous().transpose(1, 2), *others


def lower(tracer: Tracer, func: Any, args: tuple, kwargs: dict) -> Any:
    """Run a call with scores among its arguments, or one that makes some; NotImplemented for others."""
    name = func._schema.name.removeprefix("aten::")
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    found = [tracer.scores_of(t) for t in tensors]
    known = [f for f in found if f is not None]
    if not known:
        if name in ("bmm", "baddbmm") and all(is_batch(tracer, t) for t in tensors[-2:]):
            return _begin(tracer, named_arguments(func, args, kwargs))
        return NotImplemented
    if func.is_view or name in _LIKE:
        return func(*args, **kwargs)
    rule = _RULES.get(name) or (_RULES.get(name.removesuffix("_")) if func._schema.is_mutable else None)
    if rule is not None and not any(isinstance(k, Unusable) for k in known):
        return rule(tracer, func, named_arguments(func, args, kwargs))
    lost = next((k for k in known if isinstance(k, Unusable)), Unusable(func))
    if any(f is None and tracer.depends(t) for f, t in zip(found, tensors, strict=True)):
        raise lost_in(lost)
    result = func(*args, **kwargs)
    for tensor in result if isinstance(result, tuple | list) else [result]:
        tracer.set_scores(tensor, lost)
    return result


def lost_in(known: Known) -> LayoutError:
    """The error where a feature map would be made of scores."""
    if isinstance(known, Unusable):
        return LayoutError(f"on what {known} makes of products of queries and keys")
    return LayoutError("on products of queries and keys")


# Queries times keys.


def is_batch(tracer: Tracer, tensor: Tensor) -> bool:
    """Whether the matrices [batch, ...] are of samples and heads, not one parameter for all."""
    return tracer.varies(tensor) or (tensor.shape[0] > 1 and tensor.stride(0) != 0)


def _begin(tracer: Tracer, named: dict[str, Any]) -> Tensor:
    """Of bmm(self=query, mat2=keys^T), or baddbmm(self=bias, batch1=query, batch2=keys^T, beta, alpha)."""
    bias = named["self"] if "batch1" in named else None
    left, right = (named["self"], named["mat2"]) if bias is None else (named["batch1"], named["batch2"])
    alpha, beta = named.get("alpha", 1), named.get("beta", 1)
    query, keys = _heads_apart(tracer, tracer.codes(left), tracer.codes(right).transpose(1, 2))
    samples = tracer.graph.batch
    if len(query) % samples:
        raise LayoutError("of matrices that do not belong to samples")
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    known = Scores(query[None], keys[None], _by_sample(tracer, query, keys), one * alpha, 0 * one, one)
    known = replace(known, query=torch.empty(samples, len(query) // samples, *query.shape[1:], device="meta"))
    known = replace(known, query=known.split(query), keys=known.split(keys))
    result = torch.empty(*left.shape[:2], right.shape[2], dtype=left.dtype, device=left.device)
    if bias is not None and beta:
        known = replace(known, bias=_constant(tracer, known, result, bias) * beta)
    tracer.set_scores(result, known)
    return result


def _heads_apart(tracer: Tracer, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [batch, positions, depth] of queries and keys: einsum makes one matrix of all queries of a sample where
    heads share their keys.
    """
    plane, _, _, y, x = tracer.graph.decode(query[0, :, 0].numpy())
    if tracer.graph.given(plane).any():
        return query, keys
    place = y * (1 + x.max()) + x
    count = len(np.unique(place))
    if count == len(place) or len(place) % count or (place.reshape(-1, count) != place[:count]).any():
        return query, keys
    heads = len(place) // count
    return query.reshape(-1, count, query.shape[2]), keys.repeat_interleave(heads, 0)


def _by_sample(tracer: Tracer, query: Tensor, keys: Tensor) -> bool:
    """Whether the heads of a sample lie side by side in codes [samples * heads, ...]."""
    samples = tracer.graph.batch
    heads, expected = len(query) // samples, np.arange(samples)
    found = set()
    for codes in (query, keys):
        flat = codes.flatten(1).numpy()
        first = flat[np.arange(len(flat)), np.argmax(flat > 0, axis=1)]
        plane, sample, *_ = tracer.graph.decode(first)
        if (first > 0).all() and all(tracer.graph.nodes[p].samples == samples for p in np.unique(plane)):
            if np.array_equal(sample, np.repeat(expected, heads)):
                found.add(True)
            elif np.array_equal(sample, np.tile(expected, heads)):
                found.add(False)
            else:
                raise LayoutError("of matrices that do not belong to samples")
    if len(found) != 1:
        raise LayoutError("of matrices that do not belong to samples")
    return found.pop()


# Scores made of scores.


Rule = Callable[["Tracer", Any, dict[str, Any]], Any]


_RULES: dict[str, Rule] = {}


rule = adding_to(_RULES)


def known_of(tracer: Tracer, tensor: Any) -> Scores:
    known = tracer.scores_of(tensor) if isinstance(tensor, Tensor) else None
    if not isinstance(known, Scores):
        raise LayoutError("on what is made of products of queries and keys")
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
    if np.broadcast_shapes(value.shape, tensor.shape) != tensor.shape:
        raise LayoutError("that repeats products of queries and keys")
    value = value.expand(tensor.shape).permute(known.axes(tensor))
    batch = known.shape[0]
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
    first = isinstance(x, Tensor) and isinstance(tracer.scores_of(x), Scores)
    scores, other = (x, y) if first else (y, x)
    known = known_of(tracer, scores)
    return scores, known, _constant(tracer, known, scores, other), first


def _reduced(tracer: Tracer, named: dict[str, Any], kind: str) -> Scores | None:
    """What is known of the first operand, if the second is a maximum or sum of its kind, for each query."""
    scores, other = named["self"], named["other"]
    if not isinstance(scores, Tensor) or not isinstance(other, Tensor):
        return None
    known, reduced = tracer.scores_of(scores), tracer.scores_of(other)
    if not isinstance(known, Scores) or not isinstance(reduced, Reduced) or reduced.kind != kind:
        return None
    expected = list(scores.shape)
    expected[known.axes(scores)[-1]] = 1
    if list(other.shape) != expected or _layout(other) != reduced.layout:
        return None
    return known if kind == "maximum" or reduced.of is known else None


def _layout(tensor: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides, without dimensions of one element."""
    return [(n, s) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1]


@rule("mul", "div")
def _scale(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    normalised = _reduced(tracer, named, "sum") if "div" in func._schema.name else None
    if normalised is not None and normalised.softmax and (normalised.weight >= 0).all():
        bias = normalised.bias + normalised.weight.log()
        one = torch.ones_like(normalised.weight[:1, :1, :1])
        return _result(tracer, func, named["self"], replace(normalised, bias=bias, weight=one, softmax="plain"))
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


@rule("add", "sub", "rsub")
def _add(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    lowered = _reduced(tracer, named, "maximum") if "aten::sub" in func._schema.name else None
    if lowered is not None and not lowered.softmax:  # softmax is the same
        return _result(tracer, func, named["self"], lowered)
    scores, known, value, first = _operands(tracer, named)
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    own, others = {"add": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}[name]
    if known.softmax:
        raise LayoutError("to probabilities of attention")
    factor = named.get("alpha", 1)  # of the second operand; of rsub, of the first
    own, others = (own, others * factor) if first == (name != "rsub") else (others * factor, own)
    known = replace(known, gain=known.gain * own, bias=known.bias * own + value * others)
    return _result(tracer, func, scores, known)


@rule("masked_fill")
def _masked_fill(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    scores, known = named["self"], known_of(tracer, named["self"])
    return _fill(tracer, func, scores, known, named["mask"], named["value"])


@rule("index_put")
def _write(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    """Of a number, where a mask says."""
    scores, known, value = named["self"], known_of(tracer, named["self"]), named["values"]
    indices = [i for i in named["indices"] if i is not None]
    if value.numel() != 1 or named.get("accumulate") or any(tracer.varies(i) for i in indices):
        raise LayoutError("of products of queries and keys by anything but a number")
    mask = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    torch.ops.aten.index_put_.default(mask, named["indices"], torch.ones_like(mask[(0,) * mask.dim()]))
    return _fill(tracer, func, scores, known, mask, value.reshape(()))


@rule("where")
def _where(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    mask, x, y = named["condition"], named["self"], named["other"]
    if tracer.varies(mask):
        raise LayoutError("with a mask that depends on the image, the labels or the condition")
    if isinstance(x, Tensor) and tracer.scores_of(x) is not None:
        return _fill(tracer, func, x, known_of(tracer, x), ~mask.bool(), y)
    return _fill(tracer, func, y, known_of(tracer, y), mask, x)


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


@rule("_softmax", "_safe_softmax")
def _softmax(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    scores, known = named["self"], known_of(tracer, named["self"])
    axes, dim = known.axes(scores), named["dim"] % scores.dim()
    if known.softmax or dim not in axes[-2:]:
        raise LayoutError("over anything but the keys")
    if dim != axes[-1]:  # so the first factor were the keys
        gain, bias, weight = (v.transpose(1, 2) for v in (known.gain, known.bias, known.weight))
        known = replace(known, query=known.keys, keys=known.query, gain=gain, bias=bias, weight=weight)
        known = replace(known, swapped=not known.swapped)
    known = replace(known, softmax="safe" if "safe" in func._schema.name else "plain")
    dtype = torch.float32 if named.get("half_to_float") else None
    return _result(tracer, func, scores, known, dtype)


@rule("nan_to_num")
def _nan_to_num(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    """Zeros in place of what softmax makes of rows without a key."""
    scores, known = named["self"], known_of(tracer, named["self"])
    if not known.softmax or named.get("nan"):
        raise LayoutError("of products of queries and keys")
    nothing = ~(known.bias > MASKED).expand(-1, *known.shape[1:]).any(2)
    if known.softmax == "plain" and (known.bias.expand(-1, *known.shape[1:])[nothing] == -torch.inf).all():
        known = replace(known, softmax="safe")
    return _result(tracer, func, scores, known)


@rule("neg")
def _negative(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    scores, known = named["self"], known_of(tracer, named["self"])
    if known.softmax:
        known = replace(known, weight=-known.weight)
    else:
        known = replace(known, gain=-known.gain, bias=-known.bias)
    return _result(tracer, func, scores, known)


@rule("exp")
def _exp(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    scores, known = named["self"], known_of(tracer, named["self"])
    if known.softmax:
        raise LayoutError("of probabilities of attention")
    return _result(tracer, func, scores, replace(known, softmax="exp"))


@rule("amax", "max", "sum")
def _reduce(tracer: Tracer, func: Any, named: dict[str, Any]) -> Any:
    """For softmax written out. Of the maximum, its place is of no use."""
    scores, known = named["self"], tracer.scores_of(named["self"])
    kind = "sum" if "sum" in func._schema.name else "maximum"
    result = func(*named.values()) if "dim" in named else func(scores)
    results = result if isinstance(result, tuple) else (result,)
    dims = named["dim"] if isinstance(named.get("dim"), list | tuple) else [named.get("dim")]
    found: Known = Unusable(func)
    if isinstance(known, Scores) and [d is not None and d % scores.dim() for d in dims] == known.axes(scores)[-1:]:
        found = Reduced(kind, known, _layout(results[0]))
    for i, tensor in enumerate(results):
        tracer.set_scores(tensor, found if i == 0 else Unusable(func))
    return result


@rule("clone", "_to_copy")
def _copy(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    scores, known = named["self"], tracer.scores_of(named["self"])
    dtype = named.get("dtype") or scores.dtype
    if not dtype.is_floating_point:
        raise LayoutError("of products of queries and keys")
    memory_format = named.get("memory_format") or torch.preserve_format
    result = torch.empty_like(scores, dtype=dtype, memory_format=memory_format)
    if isinstance(known, Scores):
        known.axes(result)
    if known is not None:
        tracer.set_scores(result, known)
    return result
