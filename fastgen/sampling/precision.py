"""Weights in bfloat16, as a plain PyTorch forward pass would have them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen import backends

PRECISIONS = ("fp32", "bf16")
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
        raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}")


@contextlib.contextmanager
def weights_in(precision: str) -> Iterator[None]:
    """Forward passes inside are those of the model that `Sampler(model, precision=precision)` samples: with "bf16" the
    weights of convolutions and matrix products, after weight normalisation and the like, are rounded to bfloat16.
    """
    check_precision(precision)
    if precision == "fp32":
        yield
        return
    with backends.backend("reference"), _RoundedWeights():
        yield


class _RoundedWeights(TorchDispatchMode):
    """Attention multiplies what it made of the image by each other: what was computed from a product is no weight."""

    def __init__(self) -> None:
        super().__init__()
        self._parameters: dict[int, StorageWeakRef] = {}
        self._data: dict[int, StorageWeakRef] = {}  # storages of products, and of what was made of them

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `fastgen.sampling.trace.Tracer`

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        inputs = [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        self._parameters |= _storages(a for a in inputs if isinstance(a, nn.Parameter))
        weights = [i for i in _WEIGHTS.get(name, ()) if not self._is_data(args[i])]
        made = any(map(self._is_data, inputs)) or (bool(weights) and not self._is_parameter(args[_DATA.get(name, 0)]))
        args = tuple(a.bfloat16().to(a.dtype) if i in weights else a for i, a in enumerate(args))
        result = func(*args, **kwargs)
        if made:
            written = inputs if func._schema.is_mutable else []
            self._data |= _storages([*written, *(t for t in tree_leaves(result) if isinstance(t, Tensor))])
        return result

    def _is_parameter(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._parameters

    def _is_data(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._data


def _storages(tensors: Iterable[Tensor]) -> dict[int, StorageWeakRef]:
    """By their keys, which are not given to others as long as the reference lives."""
    return {t.untyped_storage()._cdata: StorageWeakRef(t.untyped_storage()) for t in tensors}
