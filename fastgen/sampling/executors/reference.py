"""The plan executed step by step in PyTorch: the definition of what a plan means. Slow."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.sampling.executors import Batch
from fastgen.sampling.plan import Plan, Read, Step, apply
from fastgen.sampling.uniforms import image_uniforms


class ReferenceExecutor:
    """Keeps every plane whole, [height, width, batch, channels] with a zero margin, in `dtype`."""

    def __init__(self, plan: Plan, dtype: torch.dtype = torch.float32):
        self.plan = plan
        self.dtype = dtype

    def sample(self, batch: Batch) -> Tensor:
        """uint8 levels [count, C, H, W]."""
        plan = self.plan
        channels, height, width = plan.image_shape
        groups = plan.head.groups(channels)
        uniforms = image_uniforms(batch.seed, batch.start, batch.count, (groups[-1].uniforms.stop, height, width))
        levels = torch.zeros(batch.count, *plan.image_shape, dtype=torch.uint8)
        planes = _Planes(plan, batch, self.dtype)
        encoding = plan.head.encoding().to(self.dtype)
        for y in range(plan.first_row, height):
            for step in plan.row_steps():
                row = y - step.lag_y
                if 0 <= row < plan.planes[step.out].height:
                    columns = range(plan.planes[step.out].width)
                    planes.write(step, row, slice(0, len(columns)), _evaluate(step, planes, row, columns))
            for x in plan.columns():
                for rank, (draw, group) in enumerate(zip(plan.draws, groups, strict=True)):
                    for step in plan.pixel_steps(rank):
                        row, column = y - step.lag_y, x - step.lag_x
                        out = plan.planes[step.out]
                        if 0 <= row < out.height and 0 <= column < out.width:
                            value = _evaluate(step, planes, row, range(column, column + 1))
                            planes.write(step, row, slice(column, column + 1), value)
                    if y >= 0 and 0 <= x < width:
                        params = planes.read(Read(draw.plane, 0, 0, draw.channel), y, range(x, x + 1), draw.count)[0]
                        drawn = plan.head.draw(params, uniforms[:, group.uniforms, y, x], batch.temperature)
                        if batch.known is not None and batch.mask is not None:
                            given = batch.mask[:, y, x].unsqueeze(1)
                            drawn = torch.where(given, batch.known[:, group.colours, y, x], drawn)
                        levels[:, group.colours, y, x] = drawn
                        planes.set_image(group.colours, y, x, encoding[drawn.long()])
            if y >= 0:
                batch.on_rows(1)
        return levels


class _Planes:
    """Values of all planes of a batch."""

    def __init__(self, plan: Plan, batch: Batch, dtype: torch.dtype):
        self.plan = plan
        given = dict(zip(plan.conditions, batch.conditions, strict=True))
        steps = plan.steps
        shifts = [abs(t.dy) + abs(t.dx) for s in steps for t in s.taps] + [
            abs(r.dy) + abs(r.dx) for s in steps for r in s.reads()
        ]
        self.margin = max(shifts, default=0) + max(p.height + p.width for p in plan.planes)
        self.values: list[Tensor] = []
        for i, plane in enumerate(plan.planes):
            size = (plane.height + 2 * self.margin, plane.width + 2 * self.margin, batch.count, plane.channels)
            value = torch.zeros(size, dtype=dtype)
            data = given.get(i) if plane.data is None else plane.data[None]
            if data is not None:
                self._inside(value, plane.height, plane.width).copy_(data.permute(2, 3, 0, 1))
            self.values.append(value)

    def _inside(self, value: Tensor, height: int, width: int) -> Tensor:
        return value[self.margin : self.margin + height, self.margin : self.margin + width]

    def read(self, read: Read, row: int, columns: range, count: int) -> Tensor:
        """[columns, batch, count]."""
        plane = self.plan.planes[read.plane]
        channels = slice(read.channel, read.channel + count)
        if plane.broadcast:
            return self.values[read.plane][self.margin, self.margin, :, channels].expand(len(columns), -1, -1)
        first = self.margin + columns.start + read.dx
        return self.values[read.plane][self.margin + row + read.dy, first : first + len(columns), :, channels]

    def write(self, step: Step, row: int, columns: slice, value: Tensor) -> None:
        out = self._inside(self.values[step.out], self.plan.planes[step.out].height, self.plan.planes[step.out].width)
        out[row, columns, :, step.out_channel : step.out_channel + step.width] = value

    def set_image(self, colours: range, y: int, x: int, value: Tensor) -> None:
        self.values[self.plan.image][self.margin + y, self.margin + x, :, colours] = value


def _evaluate(step: Step, planes: _Planes, row: int, columns: range) -> Tensor:
    """[columns, batch, width]: the step's value at some columns of a row."""
    dtype = planes.values[0].dtype
    acc = torch.zeros(len(columns), planes.values[0].shape[2], step.groups * step.width, dtype=dtype)
    if step.bias is not None:
        acc += step.bias
    if step.init is not None:
        acc += planes.read(step.init, row, columns, step.groups * step.width)
    first = 0
    for tap in step.taps:
        assert step.weight is not None
        source = planes.read(Read(tap.plane, tap.dy, tap.dx, tap.channel), row, columns, tap.count)
        acc += source @ step.weight[first : first + tap.count].to(dtype)
        first += tap.count
    groups = acc.unflatten(2, (-1, step.width)) if step.groups else None
    registers: list[Tensor] = []
    for instr in step.program:
        if instr.op == "acc":
            assert groups is not None
            registers.append(groups[:, :, instr.a])
        elif instr.op == "load":
            assert instr.read is not None
            registers.append(planes.read(instr.read, row, columns, step.width))
        elif instr.op == "const":
            registers.append(torch.full((1, 1, step.width), instr.value, dtype=dtype))
        else:
            operands = [registers[r] for r in (instr.a, instr.b) if r >= 0]
            registers.append(apply(instr.op, *operands))
    return registers[-1]
