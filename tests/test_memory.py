"""Memory that is read again and again: where it lies, and what it holds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fastgen import _memory

LARGE_PAGE = 2**21


@pytest.mark.parametrize("size", [0, 5, LARGE_PAGE // 4 - 1, LARGE_PAGE // 4, LARGE_PAGE + 3])
def test_kept_memory(size: int) -> None:
    """Zeros, also where it was written before."""
    kept, seen = _memory.KeptMemory(), []
    for _ in range(2):
        zeros = [kept.take(size) for _ in range(2)]
        for tensor in zeros:
            assert tensor.shape == (size,) and tensor.dtype == torch.float32 and not tensor.any()
            assert 4 * size < LARGE_PAGE or tensor.data_ptr() % LARGE_PAGE == 0
            assert tensor.storage_offset() == 0  # `as_strided` counts from there
            tensor.fill_(1.0)
        assert size == 0 or zeros[0].data_ptr() != zeros[1].data_ptr()
        kept.give_back(zeros)
        seen.append({tensor.data_ptr() for tensor in zeros})
    assert seen[0] == seen[1]


def test_little_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the last batch alone, and nothing of a large one."""
    kept = _memory.KeptMemory()
    kept.give_back([torch.ones(3)])
    kept.give_back([torch.ones(5), torch.ones(4)])
    assert [len(tensor) for tensor in kept._tensors] == [5, 4]
    monkeypatch.setattr(_memory, "_MOST_KEPT", 35)
    kept.give_back([torch.ones(5), torch.ones(4)])
    assert not kept._tensors and not kept.take(5).any()


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
