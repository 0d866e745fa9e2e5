"""How exact a kernel must be."""

from __future__ import annotations

import torch
from torch import Tensor


def as_accurate(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """As plain PyTorch in the same dtype: at most twice its error, or half a unit in the last place."""
    assert actual.shape == exact.shape and actual.dtype == plain.dtype
    error, allowed = _rms(actual.cpu() - exact), 2 * _rms(plain - exact)
    assert error <= max(allowed, torch.finfo(actual.dtype).eps / 2 * _rms(exact))


def _rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()
