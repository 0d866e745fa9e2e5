"""The code of the CUDA kernel for pixels on threads of the host, under ThreadSanitizer where the compiler has it."""

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
from fastgen.sampling.executors.cuda import pixel_memory
from fastgen.sampling.executors.pixel_tables import PixelTables
from fastgen.sampling.executors.triton import Pattern, Space, TritonExecutor
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
    target = Path(tempfile.mkdtemp(prefix="fastgen-"), "pixel_host")
    command = [*cxx, *FLAGS, str(Path(__file__).with_name("pixel_host.cpp")), "-o", str(target)]
    watched = subprocess.run([*command, "-fsanitize=thread"], capture_output=True).returncode == 0
    if not watched:
        subprocess.run(command, check=True)
    return target, watched


class HostTeamExecutor(TritonExecutor):
    """Pixels on `clusters` of `size` groups of `lanes` threads, rows by interpreted Triton kernels.

    A data race is an error.
    """

    def __init__(self, plan: Plan, clusters: int = 2, size: int = 2, lanes: int = 2):
        super().__init__(plan, torch.device("cpu"), pixel_weights=False)
        self._pixels = PixelTables(plan, self._tables)
        self._parts = self._pixels.tensors()
        self._team = {"size": size, "lanes": lanes, **self._pixels.sizes}
        self._most_clusters = clusters

    def launch_pixels(self, pattern: Pattern, space: Space) -> None:
        actions = self._pixels.actions(pattern)
        if len(actions) == 0:
            return
        memory = pixel_memory(space)
        clusters = min(space.count, self._most_clusters)
        numbers = {"num_actions": len(actions), "count": space.count, "clusters": clusters, **self._team}
        with tempfile.TemporaryDirectory() as folder:
            call, result = Path(folder, "call"), Path(folder, "result")
            with call.open("wb") as file:
                for name, tensor in {**self._parts, **memory, "actions": actions}.items():
                    _write(file, name, _bytes(tensor))
                for name, number in numbers.items():
                    _write(file, name, struct.pack("q", number))
            done = subprocess.run([program()[0], call, result], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            written = np.fromfile(result, dtype=np.uint8)
        workspace, levels = memory["workspace"], memory["levels"]
        workspace.copy_(torch.from_numpy(written[: workspace.nbytes].view(np.float32)))
        levels.copy_(torch.from_numpy(written[workspace.nbytes :].view(np.int32)).view_as(levels))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _write(file: object, name: str, data: bytes) -> None:
    file.write(struct.pack("24sq", name.encode(), len(data)) + data)  # type: ignore[attr-defined]


def host_sampler(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None = None,
    head: Head | None = None,
    *,
    num_classes: int | None = None,
    precision: str = "fp32",
    max_batch: int | None = None,
    clusters: int = 2,
    size: int = 2,
    lanes: int = 2,
) -> Sampler:
    """A `Sampler` whose pixels are drawn on a host team."""
    options = {"num_classes": num_classes, "precision": precision, "max_batch": max_batch}
    sampler = Sampler(model, image_shape, head, **options, backend="reference")
    sampler._executor = HostTeamExecutor(sampler.plan, clusters, size, lanes)
    return sampler
