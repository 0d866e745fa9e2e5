"""Values that stand for tensors while code that was written for these reshapes them, and are computed when it is known
what for.

What a value is made of has axes. Its dimensions, as the code sees them, are these axes in some order, several of them
in one dimension where they were joined; views change nothing else. Whatever a value has no answer to makes a tensor of
it, and the original operation follows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

Sizes = tuple[int, ...]  # of the axes
Axes = tuple[int, ...]  # of one dimension; those of size 1 are left out
Dims = tuple[Axes, ...]
of_shapes = functools.lru_cache(maxsize=4096)  # what follows from shapes alone is found once


def plain(value: Any) -> Any:
    """A tensor, of what stands for one."""
    return value.tensor() if isinstance(value, Deferred) else value


def or_of_tensor(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method that raises ValueError, or TypeError, where that of the tensor has to do."""

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except (TypeError, ValueError):
            return getattr(self.lying(), method.__name__)(*tree_map(plain, args), **tree_map(plain, kwargs))

    return called


def _of_tensors(name: str) -> Callable[..., Any]:
    return lambda self, *others: getattr(self.lying(), name)(*map(plain, others))


def _names(operators: str) -> list[str]:
    return [f"__{name}__" for name in operators.split()]


class Deferred:
    """Of a dtype and on a device, with `sizes` of its axes, and the axes of its dimensions."""

    functions: ClassVar[dict[Any, str]] = {}  # of PyTorch, and the methods that stand for them

    def __init__(self, sizes: Sizes, dims: Dims, like: Tensor) -> None:
        self.sizes, self.dims = sizes, without_ones(sizes, dims)
        self.dtype, self.device, self.is_cuda = like.dtype, like.device, like.is_cuda

    def _with(self, **changes: Any) -> Any:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__, **changes)
        return other

    def tensor(self) -> Tensor:
        """What it stands for."""
        raise NotImplementedError

    def arranged(self, value: Tensor) -> Tensor:
        """A tensor with one dimension for each of the axes, as the code would see it."""
        order = [axis for axes in self.dims for axis in axes]
        order += [axis for axis in range(len(self.sizes)) if axis not in order]
        return value.permute(order).reshape(self.shape)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "sizes" not in self.__dict__:  # as copies ask for, before there is anything
            raise AttributeError(name)
        return getattr(self.lying(), name)

    def lying(self) -> Tensor:
        """As the code takes for granted that it lies, which then calls ``view``."""
        return self.tensor().contiguous()

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        args = args or (kwargs.pop("input", None),)
        method = cls.functions.get(function, _VIEWS.get(function))
        if method is not None and isinstance(args[0], cls):
            try:
                return getattr(args[0], method)(*args[1:], **kwargs)
            except (TypeError, ValueError):  # called in another way
                pass
        return function(*tree_map(plain, args), **tree_map(plain, kwargs))

    @property
    def shape(self) -> torch.Size:
        return shape_of(self.sizes, self.dims)

    @property
    def ndim(self) -> int:
        return len(self.dims)

    def dim(self) -> int:
        return len(self.dims)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return self.shape.numel()

    def stride(self, dim: int | None = None) -> Any:
        """As if it lay in memory."""
        sizes = self.shape
        strides = tuple(math.prod(sizes[i + 1 :]) for i in range(len(sizes)))
        return strides if dim is None else strides[dim]

    def contiguous(self, *_: Any, **__: Any) -> Any:
        return self

    @or_of_tensor
    def view(self, *shape: Any) -> Any:
        shape = _flat(shape)
        dims = _split(self.sizes, self.dims, shape) if all(type(size) is int for size in shape) else None
        return self.lying().reshape(shape) if dims is None else self._with(dims=dims)

    reshape = view

    @or_of_tensor
    def permute(self, *order: Any) -> Any:
        order = _flat(order)
        if sorted(i % len(self.dims) for i in order) != list(range(len(self.dims))):
            raise ValueError
        return self._with(dims=tuple(self.dims[i] for i in order))

    @or_of_tensor
    def transpose(self, first: int, second: int) -> Any:
        order = list(range(len(self.dims)))
        order[first], order[second] = order[second], order[first]
        return self.permute(order)

    @or_of_tensor
    def unsqueeze(self, dim: int) -> Any:
        at = dim if dim >= 0 else dim + len(self.dims) + 1
        return self._with(dims=(*self.dims[:at], (), *self.dims[at:]))

    @or_of_tensor
    def squeeze(self, dim: int) -> Any:
        at = dim % len(self.dims)
        return self if self.dims[at] else self._with(dims=(*self.dims[:at], *self.dims[at + 1 :]))

    @or_of_tensor
    def __getitem__(self, index: Any) -> Any:
        """Of new dimensions, and all of the others."""
        index = index if isinstance(index, tuple) else (index,)
        whole = all(i is None or (isinstance(i, slice) and i == slice(None)) for i in index)
        if not whole or index.count(slice(None)) > len(self.dims):
            raise ValueError
        left = list(self.dims)
        return self._with(dims=(*[() if i is None else left.pop(0) for i in index], *left))

    __hash__ = object.__hash__
    __add__, __radd__, __sub__, __rsub__ = (_of_tensors(name) for name in _names("add radd sub rsub"))
    __mul__, __rmul__, __truediv__, __rtruediv__ = (_of_tensors(n) for n in _names("mul rmul truediv rtruediv"))
    __pow__, __rpow__, __matmul__, __rmatmul__ = (_of_tensors(name) for name in _names("pow rpow matmul rmatmul"))
    __neg__, __abs__, __eq__, __ne__ = (_of_tensors(name) for name in _names("neg abs eq ne"))
    __lt__, __le__, __gt__, __ge__ = (_of_tensors(name) for name in _names("lt le gt ge"))


_VIEWS: dict[Any, str] = {
    **{torch.reshape: "view", torch.transpose: "transpose", torch.permute: "permute"},
    **{torch.unsqueeze: "unsqueeze", torch.squeeze: "squeeze"},
}


def _flat(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arguments[0]) if len(arguments) == 1 and isinstance(arguments[0], Sequence) else arguments


@of_shapes
def without_ones(sizes: Sizes, dims: Dims) -> Dims:
    return tuple(tuple(axis for axis in axes if sizes[axis] > 1) for axes in dims)


@of_shapes
def shape_of(sizes: Sizes, dims: Dims) -> torch.Size:
    return torch.Size(math.prod(sizes[axis] for axis in axes) for axes in dims)


@of_shapes
def _split(sizes: Sizes, dims: Dims, shape: Sizes) -> Dims | None:
    """The axes in turn as dimensions of these sizes, one of which may be -1; None if one axis would be parted."""
    left = [axis for axes in dims for axis in axes]
    known = math.prod(size for size in shape if size != -1)
    count = math.prod(sizes[axis] for axis in left)
    found = []
    for size in shape:
        size = count // known if size == -1 and known else size
        inside: list[int] = []
        while left and math.prod(sizes[axis] for axis in inside) < size:
            inside.append(left.pop(0))
        if math.prod(sizes[axis] for axis in inside) != size:
            return None
        found.append(tuple(inside))
    return None if left else tuple(found)
