"""Pass 2 for operators over the channels of each position. Sums are products with ones, which bfloat16 weights hold
exactly; all else is element by element.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastgen.sampling.elementwise import named_arguments
from fastgen.sampling.graph import LayoutError
from fastgen.sampling.planes import pointwise
from fastgen.sampling.products import sums
from fastgen.sampling.rules import OVER_POSITIONS, rule

if TYPE_CHECKING:
    from fastgen.sampling.trace import Tracer


class _Channels:
    """Codes [N, C, ...], in this order because the operators try it first."""

    def __init__(self, tracer: Tracer, codes: Tensor):
        self.tracer, self.codes = tracer, codes
        self.count = codes.shape[1]

    def apply(self, op: str, *others: _Channels | Tensor | float) -> _Channels:
        """op(self, others); a tensor is of parameters [C]."""
        shape, broadcast = self.codes.shape, (-1, *[1] * (self.codes.dim() - 2))
        operands: list[Tensor | float] = [self.codes]
        for other in others:
            other = self.tracer.codes(other).view(broadcast) if isinstance(other, Tensor) else other
            operands.append(other.codes if isinstance(other, _Channels) else other)
        return _Channels(self.tracer, pointwise(self.tracer, op, operands, shape))

    def total(self, copies: int = 1) -> _Channels:
        """The sum over the channels, `copies` times."""
        last = self.codes.movedim(1, -1)
        out = sums(self.tracer, last.reshape(-1, self.count), copies)
        return _Channels(self.tracer, out.view(*last.shape[:-1], copies).movedim(-1, 1))

    def mean(self, copies: int = 1) -> _Channels:
        return self.total(copies).apply("div", float(self.count))

    def centred(self) -> _Channels:
        return self.apply("sub", self.mean(self.count))

    def squared(self) -> _Channels:
        return self.apply("mul", self)


@rule("native_layer_norm")
def _layer_norm(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    x, shape, weight, bias, eps = args
    if len(shape) != 1:
        raise LayoutError(f"over more than the channels, {OVER_POSITIONS},")
    centred = _Channels(tracer, tracer.codes(x).movedim(-1, 1)).centred()
    out = centred.apply("div", centred.squared().mean(centred.count).apply("add", eps).apply("sqrt"))
    out = out if weight is None else out.apply("mul", weight)
    out = out if bias is None else out.apply("add", bias)
    tracer.set_codes(outputs[0], out.codes.movedim(1, -1))


Formula = Callable[..., "list[_Channels]"]


def reduction(*names: str) -> Callable[[Formula], Formula]:
    """Register formula(channels, **rest) for ATen operators that leave one channel of a dimension."""

    def add(formula: Formula) -> Formula:
        def apply(tracer: Tracer, func: Any, args: tuple, kwargs: dict, outputs: list[Tensor]) -> None:
            named = named_arguments(func, args, kwargs)
            x, dims = named.pop("self"), named.pop("dim", None)
            if not dims or len(dims) != 1:
                raise LayoutError(f"over more than the channels, {OVER_POSITIONS},")
            found = formula(_Channels(tracer, tracer.codes(x).movedim(dims[0], 1)), **named)
            for output, channels in zip(outputs, found, strict=True):
                tracer.set_codes(output, channels.codes.movedim(1, dims[0]).reshape(output.shape))

        rule(*names)(apply)
        return formula

    return add


@reduction("sum")
def _sum(x: _Channels, keepdim: bool = False, dtype: torch.dtype | None = None) -> list[_Channels]:
    return [x.total()]


@reduction("mean")
def _mean(x: _Channels, keepdim: bool = False, dtype: torch.dtype | None = None) -> list[_Channels]:
    return [x.mean()]


def _variance(x: _Channels, correction: float | None = None, unbiased: bool = True, keepdim: bool = False) -> _Channels:
    if correction is None:
        correction = 1.0 if unbiased else 0.0
    return x.centred().squared().total().apply("div", max(0.0, x.count - correction))


@reduction("var")
def _var(x: _Channels, **rest: Any) -> list[_Channels]:
    return [_variance(x, **rest)]


@reduction("std")
def _std(x: _Channels, **rest: Any) -> list[_Channels]:
    return [_variance(x, **rest).apply("sqrt")]


@reduction("var_mean")
def _var_mean(x: _Channels, **rest: Any) -> list[_Channels]:
    return [_variance(x, **rest), x.mean()]


@reduction("linalg_vector_norm")
def _vector_norm(
    x: _Channels, ord: float = 2, keepdim: bool = False, dtype: torch.dtype | None = None
) -> list[_Channels]:
    if ord == 1:
        return [x.apply("abs").total()]
    if ord != 2:
        raise LayoutError(f"of order {ord}")
    return [x.squared().total().apply("sqrt")]
