"""Pass 2 for masks: comparisons make some of the image, choices take those that depend on parameters alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen.sampling.elementwise import Formula, elementwise
from fastgen.sampling.graph import LayoutError
from fastgen.sampling.planes import pointwise
from fastgen.sampling.rules import rule

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


def _positive(emit: Formula, x: Any) -> Any:
    """1 where x > 0, else 0; x is finite."""
    above = emit("relu", x)
    return emit("div", above, emit("positive_or", above, 1.0))


def _not(emit: Formula, mask: Any) -> Any:
    return emit("sub", 1.0, mask)


def _between(emit: Formula, mask: Any, x: Any, y: Any) -> Any:
    """x where the mask is 1, y where it is 0."""
    return emit("add", emit("mul", mask, x), emit("mul", _not(emit, mask), y))


@elementwise("gt")
def _gt(emit: Formula, x: Any, y: Any) -> Any:
    return _positive(emit, emit("sub", x, y))


@elementwise("lt")
def _lt(emit: Formula, x: Any, y: Any) -> Any:
    return _positive(emit, emit("sub", y, x))


@elementwise("ge")
def _ge(emit: Formula, x: Any, y: Any) -> Any:
    return _not(emit, _lt(emit, x, y))


@elementwise("le")
def _le(emit: Formula, x: Any, y: Any) -> Any:
    return _not(emit, _gt(emit, x, y))


@elementwise("ne")
def _ne(emit: Formula, x: Any, y: Any) -> Any:
    return _positive(emit, emit("abs", emit("sub", x, y)))


@elementwise("eq")
def _eq(emit: Formula, x: Any, y: Any) -> Any:
    return _not(emit, _ne(emit, x, y))


@elementwise("threshold")
def _threshold(emit: Formula, x: Any, threshold: float, value: float) -> Any:
    return _between(emit, _gt(emit, x, threshold), x, value)


@rule("where")
def _where(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """A choice that depends on neither the image nor labels or condition: masks of positions or channels."""
    _select(tracer, args[0], args[1], args[2], outputs[0])


@rule("masked_fill")
def _masked_fill(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    _select(tracer, args[1], torch.as_tensor(args[2]), args[0], outputs[0])


@rule("constant_pad_nd")
def _constant_pad(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    x, pad, value = (*args, 0)[:3]
    codes = func(tracer.codes(x), pad)
    if value != 0:
        codes = _either(tracer, codes, tracer.codes(func(torch.zeros(x.shape), pad, float(value))))
    tracer.set_codes(outputs[0], codes)


def _select(tracer: Tracer, mask: Tensor, chosen: Tensor, other: Tensor, output: Tensor) -> None:
    if tracer.varies(mask):
        raise LayoutError("with a mask that depends on the image, the labels or the condition")
    mask = mask.cpu().expand(output.shape)
    parts = []
    for keep, value in ((mask, chosen), (~mask, other)):
        codes = tracer.codes(value.to(output)) if not tracer.depends(value) else tracer.codes(value)
        parts.append(torch.where(keep, codes.expand(output.shape), 0))
    tracer.set_codes(output, _either(tracer, *parts))


def _either(tracer: Tracer, x: Tensor, y: Tensor) -> Tensor:
    """The codes that are not zero; where neither is zero anywhere in common."""
    if x.any() and y.any():
        return pointwise(tracer, "add", [x, y], x.shape)
    return x if x.any() else y
