"""Memory that is read again and again: where it lies, and what it holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastgen import _memory

LARGE_PAGE = 2**21


@pytest.mark.parametrize("size", [0, 5, LARGE_PAGE // 4 - 1, LARGE_PAGE // 4, LARGE_PAGE + 3])
def test_zeros(size: int) -> None:
    """Also where memory that was written before is given out again."""
    for _ in range(2):
        zeros = _memory.zeros_in_large_pages(size, torch.float32)
        assert zeros.shape == (size,) and zeros.dtype == torch.float32 and not zeros.any()
        assert 4 * size < LARGE_PAGE or zeros.data_ptr() % LARGE_PAGE == 0
        assert zeros.storage_offset() == 0  # `as_strided` counts from there
        zeros.fill_(1.0)


@pytest.mark.skipif(sys.platform != "linux", reason="as Linux lists the memory of a process")
def test_large_memory_is_private() -> None:
    """Shared memory has large pages on few systems."""
    tensor = _memory.empty_in_large_pages(3 * LARGE_PAGE, torch.uint8)
    for line in Path("/proc/self/maps").read_text().splitlines():
        begin, end = (int(number, 16) for number in line.split()[0].split("-"))
        if begin <= tensor.data_ptr() < end:
            assert line.split()[1].endswith("p")
            return
    raise AssertionError("it lies nowhere")
