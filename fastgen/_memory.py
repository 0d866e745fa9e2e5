"""Memory: how much there is, and large pages for what is streamed through again and again."""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

_LARGE_PAGE = 1 << 21  # of x86-64, and of arm64 with pages of 4 KiB
_HAS_LARGE_PAGES = hasattr(mmap, "MADV_HUGEPAGE")
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
_CPU = torch.device("cpu")  # whatever the default device is
LEAST_POOLED = 8 << 20  # bytes: the C library maps most of such anew each time, or gives them back to the system
_POOLED_PART = 8  # of the memory that there is, one part at most
_SECONDS = 30.0
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
    if size < _LARGE_PAGE or not _HAS_LARGE_PAGES:
        return torch.empty(count, dtype=dtype, device="cpu")
    memory, offset = _map(size)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset)


def zeros(count: int) -> Tensor:
    """float32, on the CPU; in memory of the pool where they are large."""
    found = _pool().take(count, torch.float32) if 4 * count >= LEAST_POOLED else None
    result, is_new = (torch.empty(count, dtype=torch.float32, device="cpu"), False) if found is None else found
    if not is_new:
        # By NumPy: PyTorch's threads of OpenMP spin for milliseconds after such work, in the way of ours.
        result.numpy().fill(0)
    return result


def empty(shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
    """As ``torch.empty`` on the CPU, contiguous or channels-last; in memory of the pool where it is large: then its
    storage cannot be resized.
    """
    count = math.prod(shape)
    found = _pool().take(count, dtype) if count * dtype.itemsize >= LEAST_POOLED else None
    if found is None:
        return torch.empty(shape, dtype=dtype, device=_CPU, memory_format=memory_format)
    strides = torch.empty(shape, device="meta", memory_format=memory_format).stride()
    # No view of another tensor: autograd would not let such be changed in place.
    return torch.empty(0, dtype=dtype, device=_CPU).set_(found[0].untyped_storage(), 0, shape, strides)


def empty_cache() -> None:
    """Gives the memory of large results that nobody has any more back to the system, on the CPU, as
    ``torch.cuda.empty_cache`` does on a GPU. Otherwise what was not used for half a minute goes back with the next
    large result.
    """
    _pool().clear()


class Pool:
    """Memory of megabytes that is given out again once no tensor has it. New pages are dear: the system clears them,
    and the host of a virtual machine takes a second to find half a gigabyte.

    What nobody has had for `_SECONDS` goes back to the system when someone asks next; and so does as much as keeps all
    of it below `most` bytes.
    """

    def __init__(self, most: int):
        self.most = most
        self._blocks: list[_Block] = []
        self._lock = threading.Lock()
        self._alone = _Block(0).references()

    def take(self, count: int, dtype: torch.dtype) -> tuple[Tensor, bool] | None:
        """Elements that nobody else has, and whether they are new zeros; None where there is no room for them."""
        # Nobody waits: not for another thread, nor, in a finaliser that comes in between, for this one.
        if not self._lock.acquire(blocking=False):
            return None
        try:
            return self._take(count, dtype)
        finally:
            self._lock.release()

    def _take(self, count: int, dtype: torch.dtype) -> tuple[Tensor, bool] | None:
        size = count * dtype.itemsize
        found = self._free_block(size)
        if found is None and sum(block.size for block in self._blocks) + size > self.most:
            return None
        try:
            block = found or _Block(size)
        except OSError:  # there is no room: PyTorch's allocator says so, or finds some
            self._drop_free_blocks()
            return None
        if found is None:
            self._blocks.append(block)
        block.used = time.monotonic()
        return torch.frombuffer(block.memory, dtype=dtype, count=count, offset=block.offset), found is None

    def clear(self) -> None:
        if self._lock.acquire(timeout=1):  # not longer: it may be this thread that has it
            try:
                self._drop_free_blocks()
            finally:
                self._lock.release()

    def _drop_free_blocks(self) -> None:
        self._blocks = [block for block in self._blocks if block.references() != self._alone]

    def _free_block(self, size: int) -> _Block | None:
        """The smallest that serves; others go where they are old, or in the way of a new one."""
        free = [block for block in self._blocks if block.references() == self._alone]
        fitting = [block for block in free if size <= block.size <= 2 * size]
        found = min(fitting, key=lambda block: block.size, default=None)
        total = sum(block.size for block in self._blocks) + (size if found is None else 0)
        gone, old = set(), time.monotonic() - _SECONDS
        for block in sorted(free, key=lambda block: block.used):
            if block is not found and (block.used < old or total > self.most):
                gone.add(id(block))
                total -= block.size
        self._blocks = [block for block in self._blocks if id(block) not in gone]
        return found


class _Block:
    """A mapping, which every storage in it refers to. used: when it was last asked for."""

    def __init__(self, size: int):
        self.size, self.used = size, 0.0
        self.memory, self.offset = _map(size)

    def references(self) -> int:
        return sys.getrefcount(self.memory)


@functools.cache
def _pool() -> Pool:
    """Of the process; FASTGEN_REUSE_MEMORY=0 does without."""
    counts_references = getattr(sys, "_is_gil_enabled", lambda: True)()
    wanted = os.environ.get("FASTGEN_REUSE_MEMORY") != "0"
    return Pool(total_memory() // _POOLED_PART if wanted and counts_references else 0)


if hasattr(os, "register_at_fork"):  # whose lock another thread may have had
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _map(size: int) -> tuple[mmap.mmap, int]:
    """New memory, and where in it the first large page begins."""
    # What is never touched takes no memory. Shared memory, Python's default, has large pages only where the system is
    # told so.
    memory = mmap.mmap(-1, size + _LARGE_PAGE, **_PRIVATE)
    if _HAS_LARGE_PAGES:
        with contextlib.suppress(OSError):  # a hint
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _LARGE_PAGE
