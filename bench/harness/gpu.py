"""What differs on a GPU: its clock, its memory, its ceilings. Imports no part of fastgen.

Times are those of CUDA events around each call, with the L2 cache overwritten before it: the launches queue up behind
the overwriting, so that short calls do not wait for Python. A ceiling is the best of a few runs of a large copy, and of
a large product of random matrices by the vendor's library. On the CPU, where all this is tried, times are the usual.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import measure
from bench.harness.ceilings import Ceilings

FLUSHED_BYTES = 256 << 20  # beyond the L2 of any GPU
COPY_BYTES = 4 << 30
SIDE = 8192  # of the matrices
RUNS = 10
MEMORY_METHOD = (
    "peak of the memory that torch allocated during one call, above what was allocated before it; inputs, weights and "
    "the memory pools of CUDA graphs are not in it"
)


class EventClock:
    """Seconds per call on the current GPU."""

    def __init__(self) -> None:
        self._flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")

    def seconds_of(self, call: Callable[[], object], calls: int) -> float:
        """The mean of `calls` calls, each after the cache was overwritten."""
        marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
        for begin, end in marks:
            self._flushed.zero_()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in marks) / calls / 1e3


def seconds_of(device: str) -> Callable[[Callable[[], object], int], float]:
    """The device's clock: of (call, calls), seconds per call."""
    return EventClock().seconds_of if device == "cuda" else measure.seconds_of


def peak_bytes(call: Callable[[], object], device: str) -> int | None:
    """See `MEMORY_METHOD`; None on the CPU."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine(device: str) -> dict[str, Any]:
    """The GPU's name and sizes, and versions of what drives it."""
    if device != "cuda":
        return {"gpu": f"none: tried on the {device}"}
    facts = torch.cuda.get_device_properties(0)
    return {
        "gpu": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "l2_bytes": getattr(facts, "L2_cache_size", None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def measure_ceilings(device: str, share: int = 1) -> Ceilings:
    """Copy bandwidth, and the rates of matrix products in float32, TF32, bfloat16 and float16.

    `share` divides the sides of the matrices, and twice what is copied, for a try on a CPU.
    """
    clock = seconds_of(device)

    def best(call: Callable[[], object]) -> float:
        return min(clock(call, 1) for _ in range(RUNS))

    side = SIDE // share
    source = torch.randint(255, (COPY_BYTES // share**2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / best(partial(target.copy_, source))
    del source, target
    flops = {}
    a, b = torch.randn(2, side, side, device=device)
    for kind, dtype, precision in (
        ("float32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
        ("bfloat16", torch.bfloat16, "highest"),
        ("float16", torch.float16, "highest"),
    ):
        x, y = a.to(dtype), b.to(dtype)
        flops["matrix product", kind, 1] = 2 * side**3 / best(partial(_product, x, y, precision))
    return Ceilings(flops, {("copy", 1): bandwidth})


def _product(x: Tensor, y: Tensor, precision: str) -> Tensor:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return x @ y
    finally:
        torch.set_float32_matmul_precision(before)


def graphed(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """`call` as a CUDA graph, replayed; its inputs stay where they are. On the CPU `call` itself."""
    if device != "cuda":
        return call
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # whatever is prepared at the first calls is not captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
