"""What tests of kernels that work element by element share: how exact they must be, and rows longer than memory."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

_FEW = 16
_HARDWARE = 8 * 2**-23


def as_accurate(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """As plain PyTorch in the same dtype: at most twice its error, or half a unit in the last place; of a few numbers
    on a GPU, whose errors do not average out, as much more as its approximate ex2, rcp and div may be off together.
    """
    assert actual.shape == exact.shape and actual.dtype == plain.dtype
    error, allowed = _rms(actual.cpu() - exact), 2 * _rms(plain - exact)
    floor = torch.finfo(actual.dtype).eps / 2
    if actual.is_cuda and actual.numel() < _FEW:
        floor += _HARDWARE
    assert error <= max(allowed, floor * _rms(exact))


def _rms(error: Tensor) -> float:
    return error.double().square().mean().sqrt().item()


FAR = 2**30 + 8  # columns of a row: offsets in three of them take more than 32 bits
_NORESERVE = 0x4000  # of Linux; Python names it from 3.13 on


def far_rows(halves: int) -> tuple[Tensor, Tensor]:
    """bfloat16 [3, halves * FAR] in pages that exist once they are written; and of it the beginnings of all halves,
    [3 * halves, 32], random numbers.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    pages = mmap.mmap(-1, 2 * 3 * halves * FAR, flags=flags)
    whole = torch.frombuffer(pages, dtype=torch.bfloat16).view(3, halves * FAR)
    begin = whole.view(-1, FAR)[:, :32]
    return whole, begin.copy_(torch.randn(begin.shape))
