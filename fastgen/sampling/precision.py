"""Weights in bfloat16, as a plain PyTorch forward pass would have them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from fastgen import backends

PRECISIONS = ("fp32", "bf16")
# Which argument of an operator is the weight; these are the operators that layers are decomposed into.
_WEIGHT = {"aten::convolution": 1, "aten::linear": 1, "aten::mm": 1, "aten::addmm": 2, "aten::bmm": 1}


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
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as in `fastgen.sampling.trace.Tracer`

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        index = _WEIGHT.get(func._schema.name)
        if index is not None:
            weight = args[index]
            args = (*args[:index], weight.bfloat16().to(weight.dtype), *args[index + 1 :])
        return func(*args, **(kwargs or {}))
