"""Pass 2 for scores made of scores: what factors, biases, masks and softmax do to products of queries and keys
(`fastgen.sampling.scores`). Several are joined in `fastgen.sampling.joined_scores`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen.sampling import key_masks
from fastgen.sampling.attention import added
from fastgen.sampling.graph import LayoutError
from fastgen.sampling.key_masks import MASKED
from fastgen.sampling.scores import Attended, Known, Reduced, Scores, Unusable, constant, known_of, rule

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


def _result(tracer: Tracer, func: Any, tensor: Tensor, known: Scores, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor like a tensor of scores that has other ones; the same one where the call works in place."""
    result = tensor if func._schema.is_mutable else torch.empty_like(tensor, dtype=dtype)
    known.axes(result)
    tracer.set_scores(result, known)
    return result


def _operands(tracer: Tracer, named: dict[str, Any]) -> tuple[Tensor, Scores, Any, bool]:
    """(scores, what is known of them, the other operand, whether the scores come first)."""
    x, y = named["self"], named["other"]
    first = isinstance(x, Tensor) and isinstance(tracer.scores_of(x), Scores)
    scores, other = (x, y) if first else (y, x)
    known = known_of(tracer, scores)
    return scores, known, other, first


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
    scores, known, other, first = _operands(tracer, named)
    value = constant(tracer, known, scores, other)
    if func._schema.name.removeprefix("aten::").startswith("div"):
        if not first or named.get("rounding_mode") is not None:
            raise LayoutError("by products of queries and keys")
        value = 1 / value
    if known.softmax:
        known = replace(known, weight=known.weight * value)
    else:
        known = key_masks.scaled(tracer, known, value)
        known = replace(known, gain=known.gain * value, bias=known.bias * value)
    return _result(tracer, func, scores, known)


@rule("add", "sub", "rsub")
def _add(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    if isinstance(tracer.scores_of(named["self"]), Attended):
        return added(tracer, func, named)
    lowered = _reduced(tracer, named, "maximum") if "aten::sub" in func._schema.name else None
    if lowered is not None and not lowered.softmax:  # softmax is the same
        return _result(tracer, func, named["self"], replace(lowered, lowered=True))
    scores, known, other, first = _operands(tracer, named)
    name = func._schema.name.removeprefix("aten::").removesuffix("_")
    own, others = {"add": (1, 1), "sub": (1, -1), "rsub": (-1, 1)}[name]
    if known.softmax:
        raise LayoutError("to probabilities of attention")
    factor = named.get("alpha", 1)  # of the second operand; of rsub, of the first
    own, others = (own, others * factor) if first == (name != "rsub") else (others * factor, own)
    if own != 1:
        known.check_not_given()
    known = replace(known, gain=known.gain * own, bias=known.bias * own)
    if key_masks.of_condition(tracer, other):
        known = key_masks.added(tracer, known, scores, other, others)
    else:
        known = replace(known, bias=known.bias + constant(tracer, known, scores, other) * others)
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
    if isinstance(x, Tensor) and tracer.scores_of(x) is not None:
        others = tracer.tape.call(torch.logical_not, mask) if key_masks.of_condition(tracer, mask) else ~mask.bool()
        return _fill(tracer, func, x, known_of(tracer, x), others, y)
    return _fill(tracer, func, y, known_of(tracer, y), mask, x)


def _fill(tracer: Tracer, func: Any, scores: Tensor, known: Scores, mask: Tensor, value: Any) -> Tensor:
    number = constant(tracer, known, scores, value)
    if key_masks.of_condition(tracer, mask):
        return _result(tracer, func, scores, key_masks.filled(tracer, known, scores, mask, float(number.max())))
    filled = constant(tracer, known, scores, mask) != 0
    if not (number <= MASKED).all():
        known.check_not_given()
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
        known = known.each(lambda v, outside: v.transpose(1, 2))
        known = replace(known, query=known.keys, keys=known.query, swapped=not known.swapped)
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
        known.check_not_given()
        known = replace(known, gain=-known.gain, bias=-known.bias)
    return _result(tracer, func, scores, known)


@rule("tanh")
def _cap(tracer: Tracer, func: Any, named: dict[str, Any]) -> Tensor:
    """Of scores that softmax follows, times what they are capped at: Bello et al. 2017, "Neural Combinatorial
    Optimization with Reinforcement Learning", appendix A.1.
    """
    scores, known = named["self"], known_of(tracer, named["self"])
    known.check_not_given()
    if known.softmax or known.capped is not None or known.lowered:
        raise LayoutError("of products of queries and keys that were capped, lowered or made probabilities before")
    one = torch.ones(1, 1, 1, dtype=torch.float64)
    return _result(tracer, func, scores, replace(known, gain=one, bias=0 * one, capped=(known.gain, known.bias)))


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
    if isinstance(known, Attended) and not scores.is_contiguous():
        raise LayoutError("of probabilities of some keys times values")
    if known is not None:
        tracer.set_scores(result, known)
    return result
