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
    mapped = _mapped(count, dtype)
    return torch.empty(count, dtype=dtype, device="cpu") if mapped is None else mapped


def zeros_in_large_pages(count: int, dtype: torch.dtype) -> Tensor:
    """`count` zeros, likewise. The system makes pages of them as they are first touched, by whoever touches them."""
    mapped = _mapped(count, dtype)
    if mapped is not None:
        return mapped
    zeros = torch.empty(count, dtype=dtype, device="cpu")
    # By NumPy: PyTorch's threads of OpenMP spin for milliseconds after such work, in the way of ours.
    zeros.numpy().fill(0)
    return zeros


def _mapped(count: int, dtype: torch.dtype) -> Tensor | None:
    """Elements that begin with a large page, as their storage does; None where there would be none."""
    size = count * dtype.itemsize
    if size < _LARGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    # What is never touched takes no memory. Shared memory, Python's default, has large pages only where the system is
    # told so.
    memory = mmap.mmap(-1, size + _LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a hint
        memory.madvise(mmap.MADV_HUGEPAGE)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=-address % _LARGE_PAGE)
