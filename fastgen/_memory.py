"""Memory: how much there is, and large pages for what is streamed through again and again."""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

import torch
from torch import Tensor

_LARGE_PAGE = 1 << 21  # of x86-64, and of arm64 with pages of 4 KiB
_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # version 2, 1


def total_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its container's (Linux, cgroups)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in _CONTAINER_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(path).read_text(encoding="ascii")))
    return min(limits)


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
