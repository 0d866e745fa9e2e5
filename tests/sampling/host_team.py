"""The code of the persistent CUDA kernel on threads of the host, under ThreadSanitizer where the compiler has it."""

from __future__ import annotations

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.sampling import Head, Sampler
from fastgen.sampling.executors import Batch
from fastgen.sampling.executors.cuda import Strategy, plan_sizes
from fastgen.sampling.executors.tables import PlanTables
from fastgen.sampling.plan import Plan

ROOT = Path(__file__).parents[2]
# Products are fused into sums where the source says fma, and nowhere else: as setup.py compiles.
FLAGS = [
    "-std=c++17",
    "-O1",
    "-g",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-ffp-contract=off",
    "-pthread",
    f"-I{ROOT / 'csrc'}",
]


@functools.cache
def program() -> tuple[Path, bool]:
    """(the compiled program, whether it watches for data races)"""
    cxx = (os.environ.get("CXX") or shutil.which("g++") or "c++").split()
    target = Path(tempfile.mkdtemp(prefix="fastgen-"), "plan_host")
    command = [*cxx, *FLAGS, str(Path(__file__).with_name("plan_host.cpp")), "-o", str(target)]
    watched = subprocess.run([*command, "-fsanitize=thread"], capture_output=True).returncode == 0
    if not watched:
        subprocess.run(command, check=True)
    return target, watched


class HostTeamExecutor:
    """Plans on `workers` groups of `lanes` threads. A data race is an error."""

    def __init__(self, plan: Plan, workers: int = 2, lanes: int = 2, strategy: Strategy = Strategy.AUTOMATIC):
        self.plan = plan
        self._tables = PlanTables(plan, filtered=False)
        self._sizes = {**plan_sizes(self._tables), "workers": workers, "lanes": lanes, "strategy": int(strategy)}
        self._parts = self._tables.tensors()
        self.flops, self.weight_bytes = self._tables.flops, self._parts["weights"].nbytes

    def sample(self, batch: Batch) -> Tensor:
        """Levels [count, C, H, W]."""
        plan, shape = self.plan, (batch.count, *self.plan.image_shape)
        numbers = {"count": batch.count, "start": batch.start, "first_row": plan.first_row, **self._sizes}
        tensors = {
            **self._parts,
            "planes of batch": self._tables.fill(batch, 0, batch.count),
            "known": torch.zeros(0) if batch.known is None else batch.known.to(torch.int32),
            "mask": torch.zeros(0) if batch.mask is None else batch.mask,
        }
        with tempfile.TemporaryDirectory() as folder:
            call, result = Path(folder, "call"), Path(folder, "result")
            with call.open("wb") as file:
                for name, tensor in tensors.items():
                    _write(file, name, len(tensor), tensor.contiguous().numpy().tobytes())
                for name, number in numbers.items():
                    _write(file, name, 1, struct.pack("q", number))
                _write(file, "seed", 1, struct.pack("Q", batch.seed))
                _write(file, "temperature", 1, struct.pack("d", batch.temperature))
            done = subprocess.run([program()[0], call, result], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            levels = np.fromfile(result, dtype=np.int32).reshape(shape)
        batch.on_rows(shape[2])
        return torch.from_numpy(levels).to(plan.head.dtype)


def _write(file: object, name: str, rows: int, data: bytes) -> None:
    file.write(struct.pack("16sqq", name.encode(), rows, len(data)) + data)  # type: ignore[attr-defined]


def host_sampler(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None = None,
    head: Head | None = None,
    *,
    num_classes: int | None = None,
    precision: str = "fp32",
    max_batch: int | None = None,
    workers: int = 2,
    lanes: int = 2,
    strategy: Strategy = Strategy.AUTOMATIC,
) -> Sampler:
    """A `Sampler` whose plan runs on a host team."""
    options = {"num_classes": num_classes, "precision": precision, "max_batch": max_batch}
    sampler = Sampler(model, image_shape, head, **options, backend="reference")
    sampler._executor = HostTeamExecutor(sampler.plan, workers, lanes, strategy)
    return sampler
