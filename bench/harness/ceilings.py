"""What this machine can do at most, measured: the denominators of every row.

The loops are native (csrc/cpu/ceilings.cpp). A ceiling is the best of many short runs, since whatever disturbs a run
only lowers it, and the runs of all ceilings are interleaved, so that a busy second hits none of them alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CHUNK_BYTES = 16 << 20
CHUNKS = 16  # together far beyond the last-level cache
L2_BYTES, L3_BYTES = 256 << 10, 4 << 20  # arrays that fit these caches, per thread
RUN_SECONDS = 0.0005  # far below a slice of the scheduler, so that some runs are undisturbed
ROUNDS = 50

Loop = Callable[[int, int], float]  # (repeats, threads) -> seconds


@dataclass(frozen=True)
class Ceilings:
    """Measured limits.

    Attributes:
        flops: FLOP/s by (instruction set, dtype, threads); dtypes "float32", "float64", "bfloat16" (dot product).
        bandwidth: bytes/s by (what, threads); "read" and "copy" (bytes read plus bytes written) of main memory,
            "read L2" and "read L3" of arrays of that level's size.
    """

    flops: dict[tuple[str, str, int], float]
    bandwidth: dict[tuple[str, int], float]

    def peak_flops(self, dtype: str, threads: int) -> tuple[str, float]:
        """The fastest instruction set for a dtype, and its FLOP/s."""
        options = {isa: rate for (isa, kind, n), rate in self.flops.items() if kind == dtype and n == threads}
        if not options:
            raise ValueError(
                f"no ceiling was measured for {dtype} on {threads} threads; there are {sorted(self.flops)}"
            )
        isa = max(options, key=lambda name: options[name])
        return isa, options[isa]

    def peak_bandwidth(self, threads: int) -> float:
        """Bytes/s of main memory, the better of read and copy; of a GPU, copy alone is measured."""
        return max(self.bandwidth[what, threads] for what in ("read", "copy") if (what, threads) in self.bandwidth)

    def rows(self) -> list[dict[str, Any]]:
        """JSON rows, one per ceiling, in GFLOP/s and GB/s."""
        compute = [
            {"ceiling": f"{dtype} multiply-add", "isa": isa, "threads": n, "gflops": round(rate / 1e9, 1)}
            for (isa, dtype, n), rate in self.flops.items()
        ]
        memory = [
            {"ceiling": what, "threads": n, "gbs": round(rate / 1e9, 1)} for (what, n), rate in self.bandwidth.items()
        ]
        return compute + memory


def calibrate(loop: Loop) -> int:
    """Repeats that take about RUN_SECONDS."""
    loop(1, 1)  # touches the pages
    repeats = 1
    while min(loop(repeats, 1) for _ in range(3)) < RUN_SECONDS / 2:
        repeats *= 2
    return repeats


def best_rates(loops: dict[Any, Loop], threads: list[int], rounds: int) -> dict[Any, dict[int, float]]:
    """Repeats per second of every loop, by number of threads: the best of `rounds` interleaved runs."""
    repeats = {key: calibrate(loop) for key, loop in loops.items()}
    best = {key: dict.fromkeys(threads, 0.0) for key in loops}
    for _, (key, loop), n in itertools.product(range(rounds), loops.items(), threads):
        best[key][n] = max(best[key][n], repeats[key] / loop(repeats[key], n))
    return best


def measure(threads: list[int], rounds: int = ROUNDS) -> Ceilings:
    """Measure all ceilings at the given numbers of threads.

    Raises:
        RuntimeError: fastgen's C++ module is missing.
    """
    import torch

    from fastgen import backends

    native = backends.native_cpu().ceilings
    memory = torch.ones(CHUNKS, CHUNK_BYTES, dtype=torch.uint8)
    chunks = itertools.cycle([chunk.data_ptr() for chunk in memory])  # the next one has left every cache

    def read(bytes_per_thread: int) -> Loop:
        return lambda repeats, n: native.read(native.isas()[-1], memory.data_ptr(), bytes_per_thread * n, repeats, n)

    def read_memory(repeats: int, n: int) -> float:
        return native.read(native.isas()[-1], next(chunks), CHUNK_BYTES, repeats, n)

    def copy_memory(repeats: int, n: int) -> float:
        return native.copy(next(chunks), next(chunks), CHUNK_BYTES, repeats, n)

    compute: dict[tuple[str, str], Loop] = {
        (isa, dtype): functools.partial(native.compute, isa, dtype)
        for isa, dtype in itertools.product(native.isas(), ("float32", "float64", "bfloat16"))
        if (native.flops(isa, "bfloat16") > 0) == (dtype == "bfloat16")  # dot products are all that such a set adds
    }
    moves: dict[str, tuple[Loop, Callable[[int], int]]] = {  # the loop, and bytes moved by one repeat on n threads
        "read": (read_memory, lambda n: CHUNK_BYTES),
        "copy": (copy_memory, lambda n: 2 * CHUNK_BYTES),
        "read L2": (read(L2_BYTES), lambda n: L2_BYTES * n),
        "read L3": (read(L3_BYTES), lambda n: L3_BYTES * n),
    }
    rates = best_rates({**compute, **{what: loop for what, (loop, _) in moves.items()}}, threads, rounds)
    return Ceilings(
        flops={(*key, n): native.flops(*key) * n * rates[key][n] for key in compute for n in threads},
        bandwidth={(what, n): size(n) * rates[what][n] for what, (_, size) in moves.items() for n in threads},
    )
