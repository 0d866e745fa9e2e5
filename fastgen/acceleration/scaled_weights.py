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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgen.acceleration.deferred import Deferred, Dims, Sizes, of_shapes, or_of_tensor, shape_of
from fastgen.ops.conv_block import is_transformed, is_unobserved, wants_grad
from fastgen.ops.packed_weights import kept

_LEAST_PRODUCTS = 1 << 24
DTYPES = (torch.float32, torch.float64)
_N, _O, _I, _Y, _X = range(5)  # samples, output and input channels, the kernel


def own_weight(weight: Tensor, images: Any = None) -> Any:
    """A parameter [1, ..., O, I, kh, kw], to be scaled; or itself, as it is for few products with `images`."""
    if images is not None and weight.numel() * images.shape[0] * math.prod(images.shape[2:]) < _LEAST_PRODUCTS:
        return weight
    if torch.compiler.is_compiling() or is_transformed() or not is_unobserved((weight,)) or weight.is_inference():
        return weight
    if wants_grad((weight,)) or torch.is_autocast_enabled("cpu"):
        return weight
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or math.prod(weight.shape[:-4]) != 1:
        return weight
    dims: Dims = (*[()] * (weight.dim() - 4), (_O,), (_I,), (_Y,), (_X,))
    return ScaledWeight((1, *weight.shape[-4:]), dims, weight)


class ScaledWeight(Deferred):
    """``(weight * factor * inner * outer) ** power``."""

    def __init__(self, sizes: Sizes, dims: Dims, weight: Tensor) -> None:
        super().__init__(sizes, dims, weight)
        self.weight, self.factor, self.power = weight, 1.0, 1
        self.inner: Tensor | None = None  # [N, I], either may be 1
        self.outer: Tensor | None = None  # [N or 1, O]

    def tensor(self) -> Tensor:
        value = self.weight.reshape(1, *self.sizes[1:]) * self.factor
        if self.inner is not None:
            value = value * self.inner[:, None, :, None, None]
        if self.outer is not None:
            value = value * self.outer[:, :, None, None, None]
        value = value**self.power if self.power != 1 else value
        return self.arranged(value.expand(self.sizes))

    @or_of_tensor
    def to(self, dtype: Any) -> Any:
        if dtype != self.dtype:
            raise ValueError
        return self

    def float(self) -> Any:
        return self.to(torch.float32)

    @or_of_tensor
    def __mul__(self, other: Any) -> Any:
        if isinstance(other, int | float) and self.power == 1:
            return self._with(factor=self.factor * other)
        return self.square() if other is self else self._scaled(other, operator.mul)

    __rmul__ = mul = multiply = __mul__

    @or_of_tensor
    def __truediv__(self, other: Any) -> Any:
        if isinstance(other, int | float) and other and self.power == 1:
            return self._with(factor=self.factor / other)
        return self._scaled(other, operator.truediv)

    div = __truediv__

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _PRODUCTS and len(args) == 2 and isinstance(args[1], ScaledWeight) and not kwargs:
            args = args[::-1]
        return super().__torch_function__(function, types, args, kwargs)

    def _scaled(self, other: Any, operation: Callable[[Any, Any], Any]) -> Any:
        """By a tensor that differs between samples and channels alone."""
        alike = isinstance(other, Tensor) and other.dtype == self.dtype and other.device == self.device
        found = _scale(self.sizes, self.dims, other.shape) if alike and self.power == 1 else None
        if found is None:
            raise ValueError
        value = other.reshape(found.shape)
        value = value.t() if found.transposed else value
        before = getattr(self, found.side)
        value = operation(1.0 if before is None else before, value)
        return self._with(**{found.side: value}, sizes=found.sizes, dims=found.dims)

    @or_of_tensor
    def square(self) -> Any:
        if self.power != 1:
            raise ValueError
        return self._with(power=2)

    @or_of_tensor
    def pow(self, exponent: Any) -> Any:
        if not isinstance(exponent, int | float) or exponent != 2:
            raise ValueError
        return self.square()

    __pow__ = pow

    @or_of_tensor
    def sum(self, dim: Any = None, keepdim: bool = False) -> Tensor:
        """Of squares over all but samples and output channels."""
        given = [dim] if isinstance(dim, int) else list(range(len(self.dims)) if dim is None else dim)
        summed = {at % len(self.dims) for at in given}
        axes = {axis for at in summed for axis in self.dims[at]}
        if self.power != 2 or axes != {axis for axis in (_I, _Y, _X) if self.sizes[axis] > 1}:
            raise ValueError
        squares = kept([self.weight], "squares", lambda: _squares(self.weight))
        if self.inner is None:
            value = squares.sum(0)[None]
        elif self.inner.shape[1] == 1:
            value = self.inner.square() * squares.sum(0)
        else:
            value = self.inner.square() @ squares
        value = value * self.factor**2 if self.factor != 1.0 else value
        value = value if self.outer is None else value * self.outer.square()
        value = value.expand(self.sizes[_N], self.sizes[_O])
        if [axis for at, dim in enumerate(self.dims) for axis in dim if at not in summed] == [_O, _N]:
            value = value.t()
        shape = [1 if at in summed else size for at, size in enumerate(self.shape) if keepdim or at not in summed]
        return value.reshape(shape)

    def of_groups(self, samples: int, channels: int, groups: int, transposed: bool) -> bool:
        """Whether a convolution of so many groups takes a sample with its own weights in each."""
        fits = self.power == 1 and groups == samples == self.sizes[_N] and self.sizes[_I] == channels
        return fits and _is_by_sample(self.sizes, self.dims, transposed)

    def matrices(self) -> Tensor | None:
        """[N, O, I], of kernels of one element."""
        n, outer, inner, height, width = self.sizes
        if (height, width) != (1, 1):
            return None
        value = self.weight.view(1, outer, inner) * self.factor
        value = value if self.inner is None else value * self.inner[:, None]
        value = value if self.outer is None else value * self.outer[:, :, None]
        return value.expand(n, outer, inner)

    def kernel(self, transposed: bool) -> Tensor:
        """The parameter's own memory, as a convolution takes it."""
        return kept([self.weight], ("kernel", transposed), lambda: _kernel(self.weight, transposed))

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        """What images are to be multiplied with before and after, [N or 1, channels or 1, 1, 1]."""
        inner, outer = self.inner, self.outer
        if self.factor != 1.0 and outer is not None:
            outer = outer * self.factor
        elif self.factor != 1.0 and inner is not None:
            inner = inner * self.factor
        elif self.factor != 1.0:
            outer = self.weight.new_full((1, 1), self.factor)
        return tuple(None if scale is None else scale[:, :, None, None] for scale in (inner, outer))  # type: ignore


_PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__)
ScaledWeight.functions = {
    **dict.fromkeys(_PRODUCTS, "__mul__"),
    **dict.fromkeys((torch.div, Tensor.div, Tensor.__truediv__), "__truediv__"),
    **{torch.square: "square", torch.pow: "pow", torch.sum: "sum"},
}


class _Scale(NamedTuple):
    """What a tensor is to a weight that it is multiplied with: once it has the shape, and perhaps is transposed, a
    scale of the channels of a side, [N or 1, channels or 1]; and what the product has for sizes and dimensions.
    """

    side: str
    shape: tuple[int, ...]
    transposed: bool
    sizes: Sizes
    dims: Dims


@of_shapes
def _scale(sizes: Sizes, dims: Dims, shape: tuple[int, ...]) -> _Scale | None:
    missing = len(shape) - len(dims)
    now, n = [*[()] * missing, *dims], sizes[_N]
    found: list[int] = []
    for at, size in enumerate([*[1] * -missing, *shape]):
        if size == 1:
            continue
        if not now[at] and n == 1:  # this is where the samples are from now on
            now[at], n = (_N,), size
        elif math.prod(n if axis == _N else sizes[axis] for axis in now[at]) != size:
            return None
        found += now[at]
    of_all, counts = (n, *sizes[1:]), {_N: n, _O: sizes[_O], _I: sizes[_I]}
    for side, channels in (("inner", _I), ("outer", _O)):
        if set(found) <= {_N, channels}:
            order = found if len(found) == 2 else [_N, channels]
            parts = tuple(counts[axis] if axis in found else 1 for axis in order)
            return _Scale(side, parts, order == [channels, _N], of_all, tuple(now))
    return None


@of_shapes
def _is_by_sample(sizes: Sizes, dims: Dims, transposed: bool) -> bool:
    """Whether the weights lie as a convolution takes them, samples first."""
    outer, inner = (_I, _O) if transposed else (_O, _I)
    expected = [axis for axis in (_N, outer, inner, _Y, _X) if sizes[axis] > 1]
    shape = (sizes[_N] * sizes[outer], sizes[inner], sizes[_Y], sizes[_X])
    return [axis for axes in dims for axis in axes] == expected and shape_of(sizes, dims) == shape


def _squares(weight: Tensor) -> Tensor:
    """[I, O], each the sum over the kernel."""
    return weight.reshape(weight.shape[-4:]).square().sum((2, 3)).t().contiguous()


def _kernel(weight: Tensor, transposed: bool) -> Tensor:
    """As a parameter, so that what a convolution needs to know of it is kept."""
    kernel = weight.detach().view(weight.shape[-4:])
    return torch.nn.Parameter(kernel.transpose(0, 1) if transposed else kernel, requires_grad=False)
