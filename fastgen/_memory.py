"""Memory: how much there is, and large pages for what is streamed through again and again."""

from __future__ import annotations

import contextlib
import mmap
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_LARGE_PAGE = 1 << 21  # of x86-64, and of arm64 with pages of 4 KiB
_MOST_KEPT = 1 << 28  # bytes
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


class KeptMemory:
    """Zeros, float32 and in large pages, in the memory of earlier ones. New pages are dear: the host of a virtual
    machine takes a second to find half a gigabyte.
    """

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._lock = threading.Lock()

    def take(self, count: int) -> Tensor:
        """`count` zeros, which nobody else has."""
        with self._lock:
            i = next((i for i, tensor in enumerate(self._tensors) if len(tensor) == count), None)
            tensor = None if i is None else self._tensors.pop(i)
        if tensor is None:
            tensor = _mapped(count, torch.float32)
            if tensor is not None:
                return tensor
            tensor = torch.empty(count, dtype=torch.float32, device="cpu")
        # By NumPy: PyTorch's threads of OpenMP spin for milliseconds after such work, in the way of ours.
        tensor.numpy().fill(0)
        return tensor

    def give_back(self, tensors: Sequence[Tensor]) -> None:
        """They are kept for those who ask for as many, in place of what was kept, unless they are large."""
        with self._lock:
            self._tensors = list(tensors) if sum(t.nbytes for t in tensors) <= _MOST_KEPT else []


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
