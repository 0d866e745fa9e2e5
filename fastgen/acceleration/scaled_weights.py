"""Weights that are scaled for each sample, and not computed where the images may as well be scaled.

StyleGAN2 (Karras et al. 2020, section 2.2) scales the input channels of the weights by a style, and the output channels
so that the squares of what that gives sum to one (equations 1 and 3); each sample is then convolved with weights of its
own, as a group. But

    conv(x[n], weight * inner[n] * outer[n]) = outer[n] * conv(inner[n] * x[n], weight)

so that one convolution serves the whole batch. The code that computes the weights is left as it is; it is given a
`ScaledWeight` instead of the parameter, which takes note of the scales.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgen.acceleration.deferred import Axes, Deferred, plain
from fastgen.ops.conv_block import is_transformed, is_unobserved, wants_grad
from fastgen.ops.packed_weights import kept

DTYPES = (torch.float32, torch.float64)
_N, _O, _I, _Y, _X = _AXES = "NOIYX"  # samples, output and input channels, the kernel


def own_weight(weight: Tensor) -> Any:
    """A parameter [1, ..., O, I, kh, kw], to be scaled; or itself."""
    if torch.compiler.is_compiling() or is_transformed() or not is_unobserved((weight,)) or weight.is_inference():
        return weight
    if wants_grad((weight,)) or torch.is_autocast_enabled("cpu"):
        return weight
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or math.prod(weight.shape[:-4]) != 1:
        return weight
    sizes = dict(zip(_AXES[1:], weight.shape[-4:], strict=True)) | {_N: 1}
    return ScaledWeight(sizes, [*[()] * (weight.dim() - 4), (_O,), (_I,), (_Y,), (_X,)], weight)


class ScaledWeight(Deferred):
    """``(weight * factor * inner * outer) ** power``."""

    def __init__(self, sizes: dict[str, int], dims: list[Axes], weight: Tensor) -> None:
        super().__init__(sizes, dims, weight)
        self.weight, self.factor, self.power = weight, 1.0, 1
        self.inner: Tensor | None = None  # [N, I], either may be 1
        self.outer: Tensor | None = None  # [N or 1, O]

    def tensor(self) -> Tensor:
        n, o, i, y, x = (self.sizes[axis] for axis in _AXES)
        value = self.weight.reshape(1, o, i, y, x) * self.factor
        if self.inner is not None:
            value = value * self.inner[:, None, :, None, None]
        if self.outer is not None:
            value = value * self.outer[:, :, None, None, None]
        value = value**self.power if self.power != 1 else value
        return self.arranged(value.expand(n, o, i, y, x), _AXES)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return self if args == (self.dtype,) and not kwargs else self.tensor().to(*args, **kwargs)

    def __mul__(self, other: Any) -> Any:
        if isinstance(other, int | float):
            return self._with(factor=self.factor * other) if self.power == 1 else self.tensor() * other
        if other is self:
            return self.square()
        return self._scaled(other, operator.mul) if isinstance(other, Tensor) else self.tensor() * plain(other)

    __rmul__ = mul = multiply = __mul__

    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, int | float) and other:
            return self * (1 / other)
        return self._scaled(other, operator.truediv) if isinstance(other, Tensor) else self.tensor() / plain(other)

    div = __truediv__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _PRODUCTS and isinstance(args[1], ScaledWeight) and not kwargs:
            args = args[::-1]
        return super().__torch_function__(function, types, args, kwargs)

    def _scaled(self, other: Tensor, operation: Callable[[Any, Any], Any]) -> Any:
        """By a tensor that differs between samples and channels alone."""
        found = self._find_scale(other) if self.power == 1 else None
        if found is None:
            return operation(self.tensor(), other)
        side, value, sizes, dims = found
        before = getattr(self, side)
        return self._with(**{side: operation(1.0 if before is None else before, value)}, sizes=sizes, dims=dims)

    def _find_scale(self, tensor: Tensor) -> tuple[str, Tensor, dict[str, int], tuple[Axes, ...]] | None:
        """Whether the tensor scales input or output channels, as [N, channels], and what the product is then."""
        if tensor.dtype != self.dtype or tensor.device != self.device:
            return None
        missing = tensor.dim() - len(self.dims)
        dims, shape = [*[()] * missing, *self.dims], [*[1] * -missing, *tensor.shape]
        sizes = dict(self.sizes)
        found: list[str] = []
        for at, size in enumerate(shape):
            if size == 1:
                continue
            if not dims[at] and sizes[_N] == 1:  # this is where the samples are from now on
                dims[at], sizes[_N] = (_N,), size
            elif math.prod(sizes[axis] for axis in dims[at]) != size:
                return None
            found += dims[at]
        for side, channels in (("inner", _I), ("outer", _O)):
            if set(found) <= {_N, channels}:
                value = tensor.reshape([sizes[axis] for axis in found])
                value = value.t() if found == [channels, _N] else value
                value = value if _N in found else value[None]
                value = value if channels in found else value.reshape(-1, 1)
                value = value.expand(-1, sizes[_O]) if side == "outer" else value
                return side, value, sizes, tuple(dims)
        return None

    def square(self) -> Any:
        return self._with(power=2) if self.power == 1 else self.tensor().square()

    def pow(self, exponent: Any) -> Any:
        return self.square() if exponent == 2 and isinstance(exponent, int | float) else self.tensor() ** exponent

    __pow__ = pow

    def sum(self, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
        """Of squares over all but samples and output channels."""
        given = [dim] if isinstance(dim, int) else list(range(len(self.dims)) if dim is None else dim)
        summed = {at % len(self.dims) for at in given}
        axes = {axis for at in summed for axis in self.dims[at]}
        if options or self.power != 2 or axes != {axis for axis in (_I, _Y, _X) if self.sizes[axis] > 1}:
            return self.tensor().sum(given, keepdim=keepdim, **options)
        squares = kept([self.weight], "squares", lambda: _squares(self.weight))
        inner = squares.new_ones(1, 1) if self.inner is None else self.inner
        value = inner.square().expand(-1, self.sizes[_I]) @ squares * self.factor**2
        value = value if self.outer is None else value * self.outer.square()
        value = value.expand(self.sizes[_N], -1)
        if [axis for at, dim in enumerate(self.dims) for axis in dim if at not in summed] == [_O, _N]:
            value = value.t()
        shape = [1 if at in summed else size for at, size in enumerate(self.shape) if keepdim or at not in summed]
        return value.reshape(shape)

    def of_groups(self, samples: int, channels: int, groups: int, transposed: bool) -> bool:
        """Whether a convolution of so many groups takes a sample with its own weights in each."""
        outer, inner = (_I, _O) if transposed else (_O, _I)
        expected = [axis for axis in (_N, outer, inner, _Y, _X) if self.sizes[axis] > 1]
        shape = (samples * self.sizes[outer], self.sizes[inner], self.sizes[_Y], self.sizes[_X])
        return (
            [axis for axes in self.dims for axis in axes] == expected
            and self.shape == shape
            and self.power == 1
            and groups == samples == self.sizes[_N]
            and self.sizes[_I] == channels
        )

    def kernel(self, transposed: bool) -> Tensor:
        """The parameter's own memory, as a convolution takes it."""
        return kept([self.weight], ("kernel", transposed), lambda: _kernel(self.weight, transposed))

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """What images are to be multiplied with before and after, [N or 1, channels or 1, 1, 1]."""
        inner, outer = self.inner, self.outer
        if outer is not None:
            outer = outer * self.factor
        elif inner is not None:
            inner = inner * self.factor
        else:
            outer = self.weight.new_full((1, 1), self.factor)
        return tuple(None if scale is None else scale[:, :, None, None] for scale in (inner, outer))  # type: ignore


_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
ScaledWeight.functions = {
    **dict.fromkeys(_PRODUCTS, "__mul__"),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), "__truediv__"),
    **{torch.square: "square", torch.pow: "pow", torch.sum: "sum"},
}


def _squares(weight: Tensor) -> Tensor:
    """[I, O], each the sum over the kernel."""
    return weight.reshape(weight.shape[-4:]).square().sum((2, 3)).t().contiguous()


def _kernel(weight: Tensor, transposed: bool) -> Tensor:
    kernel = weight.detach().view(weight.shape[-4:])
    return kernel.transpose(0, 1) if transposed else kernel
