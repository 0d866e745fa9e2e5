"""The CUDA kernel for pixels on the host, under sanitizers where the compiler has them: its schedule on a team of
threads, or the whole of its source on what tests/cuda_on_host makes of a GPU.
"""

from __future__ import annotations

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastgen.sampling import Head, Sampler
from fastgen.sampling.executors.cuda import pixel_memory
from fastgen.sampling.executors.pixel_tables import PixelTables
from fastgen.sampling.executors.triton import Pattern, Space, TritonExecutor
from fastgen.sampling.plan import Plan, Read, Step, StepTap, apply

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
    "-U_FORTIFY_SOURCE",  # which takes a jump to another lane's stack for an error
    "-Wno-unknown-pragmas",  # those for nvcc
    f"-I{ROOT / 'tests/cuda_on_host'}",
    f"-I{ROOT / 'csrc'}",
]


class Watch(Enum):
    """Programs, and what their compilers are asked to watch."""

    SCHEDULE = "pixel_host", "-fsanitize=thread"
    KERNEL = "pixel_kernel_host", "-fsanitize=undefined"  # misaligned vectors among others
    MEMORY = "pixel_kernel_host", "-fsanitize=address,undefined"  # out of bounds: five times slower


_folder = tempfile.TemporaryDirectory(prefix="fastgen-")  # gone with the process


@functools.cache
def program(watch: Watch) -> tuple[Path, bool]:
    """(the compiled program, whether the compiler has the sanitizers)"""
    name, sanitizers = watch.value
    cxx = (os.environ.get("CXX") or shutil.which("g++") or "c++").split()
    target = Path(_folder.name, watch.name)
    command = [*cxx, *FLAGS, str(Path(__file__).with_name(f"{name}.cpp")), "-o", str(target)]
    watched = subprocess.run([*command, sanitizers, "-fno-sanitize-recover=all"], capture_output=True).returncode == 0
    if not watched:
        subprocess.run(command, check=True)
    return target, watched


class HostTeamExecutor(TritonExecutor):
    """Pixels on `clusters` of `size` blocks, rows in plain PyTorch. What the sanitizers see is an error.

    The schedule has `lanes` threads a block, the whole kernel its own number and `share` blocks on a multiprocessor.
    """

    def __init__(
        self,
        plan: Plan,
        watch: Watch = Watch.SCHEDULE,
        *,
        clusters: int = 2,
        size: int = 2,
        lanes: int = 2,
        share: int = 1,
    ):
        super().__init__(plan, torch.device("cpu"), pixel_weights=False)
        self._pixels = PixelTables(plan, self._tables)
        self._parts = self._pixels.tensors()
        self._watch = watch
        self._team = {"size": size, "lanes": lanes, "share": share, **self._pixels.sizes}
        self._most_clusters = clusters
        self._row_weights = {id(step): step.weight for step in plan.row_steps()}

    def launch_row(self, pattern: Pattern, space: Space) -> None:
        y = int(space.state[0])
        space.where.copy_(torch.tensor([_row_of(fields, y) for fields in self._tables.row_fields]))
        for step in pattern[0]:
            row = self.plan.position(step, 0, y)
            for column in range(step.phase[1], self.plan.planes[step.out].width, step.period[1]):
                self._run_step(step, space, row, column)
        self.launch_pixels(pattern, space)
        space.state[0] += 1

    def _run_step(self, step: Step, space: Space, row: int, column: int) -> None:
        """As the plan defines it."""
        plan = self.plan

        def read(at: Read | StepTap, count: int) -> Tensor:
            plane = plan.planes[at.plane]
            y, x = (plan.source(step, at.plane, *axis) for axis in ((0, row, at.dy), (1, column, at.dx)))
            if plane.broadcast:
                y = x = 0
            if not (0 <= y < plane.height and 0 <= x < plane.width):
                return torch.zeros(space.count, count)
            return self._pixel(space, at.plane, y, x)[:, at.channel : at.channel + count]

        acc = torch.zeros(space.count, step.groups * step.width)
        if step.init is not None:
            acc = acc + read(step.init, acc.shape[1])
        elif step.bias is not None:
            acc = acc + step.bias
        if step.taps:
            acc = acc + torch.cat([read(tap, tap.count) for tap in step.taps], 1) @ self._row_weights[id(step)]
        values: list[Tensor] = []
        for instr in step.program:
            if instr.op == "acc":
                values.append(acc[:, instr.a * step.width :][:, : step.width])
            elif instr.op == "load":
                values.append(read(instr.read, step.width))
            elif instr.op == "const":
                values.append(torch.full((space.count, step.width), instr.value))
            else:
                values.append(apply(instr.op, *(values[r] for r in instr.operands)))
        for store in step.stores:
            at = self._pixel(space, store.plane, row, column)
            at[:, store.channel : store.channel + step.width] = values[store.register]

    def _pixel(self, space: Space, index: int, y: int, x: int) -> Tensor:
        """[count, pitch] of a plane."""
        plane = self.plan.planes[index]
        kept, pitch = plane.height if plane.given else plane.rows, -(-plane.channels // 4) * 4
        first = (self._tables.offsets[index] + (y % kept * plane.width + x) * pitch) * space.count
        return space.planes[first : first + space.count * pitch].view(space.count, pitch)

    def launch_pixels(self, pattern: Pattern, space: Space) -> None:
        actions = self._pixels.actions(pattern)
        if len(actions) == 0:
            return
        memory = pixel_memory(space)
        clusters = min(space.count // space.streams, self._most_clusters)
        batch = {"num_actions": len(actions), "count": space.count, "streams": space.streams, "clusters": clusters}
        numbers = {**batch, **self._team}
        with tempfile.TemporaryDirectory() as folder:
            call, result = Path(folder, "call"), Path(folder, "result")
            with call.open("wb") as file:
                for name, tensor in {**self._parts, **memory, "actions": actions}.items():
                    _write(file, name, _bytes(tensor))
                for name, number in numbers.items():
                    _write(file, name, struct.pack("q", number))
            done = subprocess.run([program(self._watch)[0], call, result], capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            written = np.fromfile(result, dtype=np.uint8)
        workspace, levels = memory["workspace"], memory["levels"]
        workspace.copy_(torch.from_numpy(written[: workspace.nbytes].view(np.float32)))
        levels.copy_(torch.from_numpy(written[workspace.nbytes :].view(np.int32)).view_as(levels))


def _row_of(fields: tuple[int, ...], y: int) -> int:
    """What `begin_row` of kernels/sample_plan.py finds."""
    lag, stride, numerator, denominator, shift, height, kept, floats, offset = fields
    row = ((y - lag) // stride * numerator + shift) // denominator
    return offset + row % kept * floats if 0 <= row < height else -1


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _write(file: object, name: str, data: bytes) -> None:
    file.write(struct.pack("24sq", name.encode(), len(data)) + data)  # type: ignore[attr-defined]


def host_sampler(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None = None,
    head: Head | None = None,
    watch: Watch = Watch.SCHEDULE,
    *,
    num_classes: int | None = None,
    precision: str = "fp32",
    max_batch: int | None = None,
    **team: int,
) -> Sampler:
    """A `Sampler` with a `HostTeamExecutor`."""
    options = {"num_classes": num_classes, "precision": precision, "max_batch": max_batch}
    sampler = Sampler(model, image_shape, head, **options, backend="reference")
    sampler._executor = HostTeamExecutor(sampler.plan, watch, **team)
    return sampler
