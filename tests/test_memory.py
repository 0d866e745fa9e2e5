"""Memory that is read again and again: where it lies, and what it holds."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastgen
from fastgen import _memory, ops
from fastgen.acceleration.deferred_images import _times

LARGE_PAGE = 2**21


FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> _memory.Pool:
    """One that serves tensors of any size."""
    made = _memory.Pool(1 << 20)
    monkeypatch.setattr(_memory, "LEAST_POOLED", 1)
    monkeypatch.setattr(_memory, "_pool", lambda: made)
    return made


def new(*shape: int) -> Tensor:
    return _memory.empty(shape, torch.float32, torch.contiguous_format)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_pooled_tensors_are_like_others(memory_format: torch.memory_format, dtype: torch.dtype, pool: object) -> None:
    for shape in ((2, 3, 4, 5), (1, 1, 4, 5), (3, 1, 1, 1), (2, 3, 1, 4)):
        tensor = _memory.empty(shape, dtype, memory_format)
        expected = torch.empty(shape, dtype=dtype, memory_format=memory_format)
        assert tensor.shape == shape and tensor.dtype == dtype and tensor.stride() == expected.stride()
        assert tensor.storage_offset() == 0 and not tensor._is_view()
        assert tensor.untyped_storage().nbytes() == expected.untyped_storage().nbytes()


def test_memory_is_reused_when_nobody_has_it(pool: object) -> None:
    first, second = new(50), new(50)
    assert first.data_ptr() != second.data_ptr()
    first.fill_(1.0), second.fill_(2.0)
    place, part, array = first.data_ptr(), first[3:5], second.numpy()
    del first, second
    assert place not in {new(50).data_ptr(), new(49).data_ptr()} and part.tolist() == [1.0] * 2
    assert array.tolist() == [2.0] * 50  # NumPy has it
    del part
    found = new(40)
    assert found.data_ptr() == place
    del array, found
    assert new(50).data_ptr() and new(20).data_ptr() != place  # of less than half of it


def test_autograd_keeps_what_it_saved(pool: object) -> None:
    x = torch.ones(50, requires_grad=True)

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            result = new(50)
            ctx.save_for_backward(torch.mul(x, 2, out=result))
            return result

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * ctx.saved_tensors[0]

    y = Doubled.apply(x)
    place = y.data_ptr()
    loss = y.sum()
    del y
    assert new(50).data_ptr() != place
    assert torch.autograd.grad(loss, x)[0].tolist() == [2.0] * 50
    Doubled.apply(x).mul_(3).sum()  # in place, as of any result
    del loss
    assert new(50).data_ptr() == place


def test_what_is_kept_has_a_limit_and_an_end(pool: _memory.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pool.most = 1000
    held = new(200)  # 800 bytes
    assert new(60).untyped_storage().nbytes() == 240 and len(pool._blocks) == 1  # beyond: as PyTorch has it
    new(50)
    assert [block.size for block in pool._blocks] == [800, 200]
    new(45)  # in that
    new(12)  # in one in place of it
    assert [block.size for block in pool._blocks] == [800, 48]
    del held
    now = time.monotonic()
    monkeypatch.setattr("time.monotonic", lambda: now + 100)
    new(13)
    assert [block.size for block in pool._blocks] == [52]  # the others went back
    pool.most = 0
    assert new(5).shape == (5,)


def test_the_cache_is_emptied(pool: _memory.Pool) -> None:
    """But for what somebody has."""
    held, free = new(100).fill_(3), new(50)
    assert len(pool._blocks) == 2
    del free
    fastgen.empty_cache()
    assert [block.size for block in pool._blocks] == [400] and (held == 3).all()
    del held
    fastgen.empty_cache()
    assert not pool._blocks


def test_threads_get_memory_of_their_own(pool: object) -> None:
    failed = []

    def work(number: float) -> None:
        for _ in range(200):
            tensor = new(30)
            tensor.fill_(number)
            time.sleep(0)
            if tensor.ne(number).any():
                failed.append(number)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_zeros(pool: object) -> None:
    for _ in range(2):
        zeros = _memory.zeros(30)
        assert zeros.dtype == torch.float32 and zeros.tolist() == [0.0] * 30
        zeros.fill_(1.0)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "convolution": lambda x: ops.conv2d_bn_act(x, torch.ones(4, 8, 3, 3), padding=1, activation="relu"),
    "transposed": lambda x: ops.conv_transpose2d_bn_act(x, torch.ones(8, 4, 4, 4), stride=2),
    "group norm": lambda x: ops.group_norm_act(x, 2, activation="silu"),
    "filter": lambda x: ops.upfirdn2d(x, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), padding=(1, 0, 1, 0)),
    "scales": lambda x: _times(x, torch.arange(16.0).view(2, 8, 1, 1)),
}


@FORMATS
@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_in_pooled_memory(
    name: str, memory_format: torch.memory_format, pool: _memory.Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["fastgen.ops.group_norm_act"], "LEAST_POOLED", 1)
    x = torch.randn(2, 8, 7, 9).contiguous(memory_format=memory_format)
    with torch.inference_mode():
        first, second = OPERATIONS[name](x), OPERATIONS[name](2 * x)
        assert len(pool._blocks) == 2
        with fastgen.backend("reference"):
            torch.testing.assert_close(first, OPERATIONS[name](x), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(second, OPERATIONS[name](2 * x), rtol=1e-4, atol=1e-4)


def test_training_in_pooled_memory(pool: _memory.Pool) -> None:
    """Results and gradients of two layers in a row, which keep what they are of."""
    torch.manual_seed(0)
    layers = nn.Sequential(fastgen.nn.ConvBNAct(32, 32, 3, padding=1), fastgen.nn.ConvBNAct(32, 32, 3, padding=1))
    x = torch.randn(4, 32, 12, 12)
    grads = []
    for backend in ("cpu", "reference"):
        with fastgen.backend(backend):
            grads.append(torch.autograd.grad(layers(x).square().sum(), list(layers.parameters())))
    assert len(pool._blocks) > 2
    kernels = [[grad for grad in found if grad.dim() == 4] for found in grads]  # biases ahead of BatchNorm have none
    for actual, expected in zip(*kernels, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_networks_in_pooled_memory(pool: _memory.Pool) -> None:
    """One call after the other, results held."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(8, 8, 3, 1, 1), nn.GroupNorm(2, 8), nn.SiLU(), nn.ConvTranspose2d(8, 8, 4, 2, 1), nn.ReLU()]
    network = nn.Sequential(*layers).eval()
    fast = fastgen.accelerate(network)
    with torch.inference_mode():
        inputs = [torch.randn(2, 8, 5, 6) for _ in range(4)]
        results = [fast(x) for x in inputs]
        assert len(pool._blocks) > 1
        for x, result in zip(inputs, results, strict=True):
            torch.testing.assert_close(result, network(x), rtol=1e-4, atol=1e-5)


def test_it_can_be_turned_off() -> None:
    code = "from fastgen import _memory; print(_memory._pool().most)"
    for value, expected in (("0", 0), ("1", _memory.total_memory() // 8)):
        environment = {**os.environ, "FASTGEN_REUSE_MEMORY": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert int(done.stdout) == expected


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


def test_no_room(pool: _memory.Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is idle goes back to the system; PyTorch's allocator has the last word."""
    held = new(50)
    new(60)
    assert len(pool._blocks) == 2

    def full(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr("mmap.mmap", full)
    assert new(500).shape == (500,) and len(pool._blocks) == 1 and held.shape == (50,)


def test_a_finaliser_may_ask_for_memory(pool: _memory.Pool) -> None:
    """In the middle of another question: it gets memory that is not pooled."""
    pool._lock.acquire()
    assert new(50).shape == (50,) and not pool._blocks
    pool._lock.release()
    new(50)
    assert len(pool._blocks) == 1
