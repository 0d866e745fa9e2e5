"""Memory that is streamed through again and again."""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_LARGE_PAGE = 1 << 21  # of x86-64, and of arm64 with pages of 4 KiB


def empty_in_large_pages(count: int, dtype: torch.dtype) -> Tensor:
    """`count` elements, in large pages where the system has them: megabytes of small pages miss the TLB at each one.

    Tensors that fill no large page are made as others are.
    """
    size = count * dtype.itemsize
    if size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size + _LARGE_PAGE)  # what is never touched takes no memory
    with contextlib.suppress(OSError):  # a hint
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    return whole[-whole.data_ptr() % _LARGE_PAGE :][:size].view(dtype)
