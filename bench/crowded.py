"""Sampling on a crowded machine: more threads than processors, and other busy processes beside.

PixelCNN++ of the published size.  The baseline is the sampler alone with a thread for each processor.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref
from functools import partial
from typing import Any

import torch

from bench.harness.case import Case, Provider, Work
from bench.harness.environment import cores

TESTS = ("tests/sampling",)
BUSY = "while True: pass"


class Neighbours:
    """Processes that take all the time they get, while `call` runs; stopped otherwise."""

    def __init__(self, count: int):
        self.processes = [subprocess.Popen([sys.executable, "-S", "-c", BUSY]) for _ in range(count)]
        weakref.finalize(self, _end, self.processes)
        self._signal(signal.SIGSTOP)

    def beside(self, call: Any) -> Any:
        self._signal(signal.SIGCONT)
        try:
            return call()
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for process in self.processes:
            process.send_signal(number)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.kill()
        process.wait()


def with_threads(threads: int, call: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def build(config: dict[str, Any], batch: int) -> Work:
    import fastgen
    from fastgen import models

    torch.manual_seed(0)
    sampler = fastgen.Sampler(models.PixelCNNpp(**config).eval(), max_batch=batch, backend="cpu")
    draw = partial(sampler.sample, batch)
    crowd = Neighbours(cores())
    providers = {
        "alone": Provider(draw, baseline=True),
        "fastgen": Provider(
            partial(with_threads, 4 * cores(), draw), note=f"{4 * cores()} threads on {cores()} processors"
        ),
        "fastgen beside others": Provider(
            partial(crowd.beside, draw), note=f"beside {cores()} busy processes on {cores()} processors"
        ),
    }
    return Work(providers, flops=sampler.plan.flops * batch, bytes=sampler.plan.weight_bytes)


def cases(quick: bool) -> list[Case]:
    config = {"image_shape": (3, 4, 4), "num_filters": 4, "num_blocks": 1, "num_mixtures": 2} if quick else {}
    return [
        Case(
            f"PixelCNN++ {'3x4x4' if quick else '3x32x32'}, batch {batch}",
            {"batch": batch},
            partial(build, config, batch),
            threads=cores(),
        )
        for batch in ((1,) if quick else (1, 16))
    ]
