"""Weights in bfloat16 or 8 bits, as a plain PyTorch forward pass would have them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen import backends
from fastgen.sampling.scores import undisguised

PRECISIONS = ("fp32", "bf16", "int8")
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a weight
LARGEST = 127  # of the integers
_LEAST_POWER = 2.0**-100  # that they are multiplied by: the inverse is a number, too
# Which arguments of an operator are weights; these are the operators that layers are decomposed into.
_WEIGHTS = {
    "aten::convolution": (1,),
    "aten::linear": (1,),
    "aten::mm": (1,),
    "aten::addmm": (2,),
    "aten::bmm": (1,),
    "aten::mkldnn_rnn_layer": (1, 2),
}
_DATA = {"aten::addmm": 1}  # which one is multiplied by them, if not the first


def check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be 'fp32', 'bf16' or 'int8', got {precision!r}")


def powers(largest: Tensor) -> Tensor:
    """The least powers of two of which floats up to the given ones are LARGEST or fewer; 1 for zeros."""
    fraction, _ = torch.frexp(largest)  # in [0.5, 1), times a power of two
    power = largest / (LARGEST + 1) / fraction
    power = torch.where(fraction > LARGEST / (LARGEST + 1), 2 * power, power)
    return torch.where(largest > 0, power.clamp(min=_LEAST_POWER), 1.0)


def rounded(weight: Tensor, precision: str, columns: tuple[int, ...]) -> Tensor:
    """A weight in a precision, but for the dtype: "int8" is an integer of at most LARGEST times a power of two, one for
    all that is added to one output: for each index of the dimensions `columns`.
    """
    if precision == "fp32":
        return weight
    if precision == "bf16" or not weight.numel():
        return weight.bfloat16().to(weight.dtype)
    summed = [d for d in range(weight.dim()) if d not in columns]
    exact = weight if weight.dtype == torch.float64 else weight.float()
    power = powers(exact.abs().amax(summed, keepdim=True))
    return (exact / power).round().mul(power).to(weight.dtype)


@contextlib.contextmanager
def weights_in(precision: str) -> Iterator[None]:
    """Forward passes inside are those of the model that `Sampler(model, precision=precision)` samples: the weights of
    convolutions and matrix products, after weight normalisation and the like, are `rounded`.
    """
    check_precision(precision)
    if precision == "fp32":
        yield
        return
    with backends.backend("reference"), undisguised(), _RoundedWeights(precision):
        yield


class _RoundedWeights(TorchDispatchMode):
    """Attention multiplies what it made of the image by each other: what was computed from a product is no weight."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self._precision = precision
        self._parameters: dict[int, StorageWeakRef] = {}
        self._data: dict[int, StorageWeakRef] = {}  # storages of products, and of what was made of them

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `fastgen.sampling.trace.Tracer`

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name not in _WEIGHTS and torch.is_inference_mode_enabled():  # then composite operators come undecomposed
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        self._parameters |= _storages(a for a in inputs if isinstance(a, nn.Parameter))
        weights = [i for i in _WEIGHTS.get(name, ()) if not self._is_data(args[i])]
        made = any(map(self._is_data, inputs)) or (bool(weights) and not self._is_parameter(args[_DATA.get(name, 0)]))
        columns = _columns(name, args) if weights else ()
        args = tuple(self._rounded(a, columns) if i in weights else a for i, a in enumerate(args))
        result = func(*args, **kwargs)
        if made:
            written = inputs if func._schema.is_mutable else []
            self._data |= _storages([*written, *(t for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result

    def _rounded(self, weight: Tensor, columns: tuple[int, ...]) -> Tensor:
        if weight.stride(0) == 0:  # one matrix for a whole batch, as `matmul` makes of it, and one it stays
            return rounded(weight[:1], self._precision, columns).expand_as(weight)
        return rounded(weight, self._precision, columns)

    def _is_parameter(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._parameters

    def _is_data(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._data


def _columns(name: str, args: tuple) -> tuple[int, ...]:
    """Which dimensions of an operator's weight are outputs; those of the groups of a transposed convolution share."""
    if name == "aten::convolution":
        return (1,) if args[6] else (0,)
    return {"aten::mm": (1,), "aten::addmm": (1,), "aten::bmm": (0, 2)}.get(name, (0,))


def _storages(tensors: Iterable[Tensor]) -> dict[int, StorageWeakRef]:
    """By their keys, which are not given to others as long as the reference lives."""
    return {t.untyped_storage()._cdata: StorageWeakRef(t.untyped_storage()) for t in tensors}
