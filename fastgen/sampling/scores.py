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

from fastgen.sampling import key_masks
from fastgen.sampling.elementwise import named_arguments
from fastgen.sampling.graph import LayoutError
from fastgen.sampling.orders import are_positions
from fastgen.sampling.rules import adding_to

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


# Operators that make views, though not marked so, or look only at the shape.
_LIKE = (
    "_unsafe_view _reshape_alias zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty "
    "new_empty_strided"
).split()


@dataclass(eq=False)
class Scores:
    """gain * query . key + bias, of which softmax may have been taken, times weight. Where they are capped, gain *
    tanh(own gain * query . key + own bias) + bias.

    Tensors of scores have the elements [samples * heads, queries, keys], in this order of memory or, as views, in
    another.

    query, keys: codes [N, heads, positions, depth]. gain, bias, weight: float64, broadcastable to [heads, queries,
    keys]. by_sample: a sample's heads lie side by side, not a head's samples. softmax: None, "exp" (the exponentials
    alone), "plain", or "safe", which makes zeros of rows without a key. swapped: in memory, keys come before queries.
    capped: the gain and bias inside of tanh. lowered: less the maximum of each query, which softmax takes no notice of.
    given: what is added for each condition, on the tape, [N, heads or 1, queries or 1, keys], see
    `fastgen.sampling.key_masks`.
    """

    query: Tensor
    keys: Tensor
    by_sample: bool
    gain: Tensor
    bias: Tensor
    weight: Tensor
    softmax: str | None = None
    swapped: bool = False
    capped: tuple[Tensor, Tensor] | None = None
    lowered: bool = False
    given: Tensor | None = None

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

    def each(self, f: Callable[[Tensor, float], Tensor]) -> Scores:
        """With f(tensor, outside) in place of all that is [heads, queries, keys]; outside: of keys not seen."""
        self.check_not_given()
        capped = self.capped and (f(self.capped[0], 1), f(self.capped[1], 0))
        gain, bias, weight = f(self.gain, 1), f(self.bias, -torch.inf), f(self.weight, 1)
        return replace(self, gain=gain, bias=bias, weight=weight, capped=capped)

    def check_not_given(self) -> None:
        if self.given is not None:
            raise LayoutError(
                "of products of queries and keys to which something that depends on the condition was added"
            )

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


@dataclass(eq=False)
class Attended:
    """In place of codes [samples * heads, queries, width]: probabilities of some keys times their values, to which
    those of the others are added. values: codes [N, heads, keys, width], -1 of the others. there: bool [keys].
    """

    of: Scores
    values: Tensor
    there: Tensor


Known = Scores | Reduced | Attended | Unusable


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
        if name in ("bmm", "baddbmm") and all(is_batch(tracer, t) for t in tensors[-2:]) and not mixes(tracer, tensors):
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


def mixes(tracer: Tracer, tensors: list[Tensor]) -> bool:
    """Whether products are those of positions with matrices of parameters: see `fastgen.sampling.mixing`."""
    (left, right), varies = tensors[-2:], [tracer.varies(t) for t in tensors[-2:]]
    if all(varies):
        return False
    return are_positions(tracer, tracer.codes(left) if varies[0] else tracer.codes(right).transpose(1, 2))


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
        if key_masks.of_condition(tracer, bias):
            known = key_masks.added(tracer, known, result, bias, beta)
        else:
            known = replace(known, bias=constant(tracer, known, result, bias) * beta)
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


# Rules: `fastgen.sampling.score_rules`.

Rule = Callable[["Tracer", Any, dict[str, Any]], Any]


_RULES: dict[str, Rule] = {}


rule = adding_to(_RULES)


def known_of(tracer: Tracer, tensor: Any) -> Scores:
    known = tracer.scores_of(tensor) if isinstance(tensor, Tensor) else None
    if not isinstance(known, Scores):
        raise LayoutError("on what is made of products of queries and keys")
    return known


def constant(tracer: Tracer, known: Scores, tensor: Tensor, value: Any) -> Tensor:
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
