"""The plan executed step by step in PyTorch: the definition of what a plan means. Slow."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastgen.sampling.executors import Batch
from fastgen.sampling.plan import Attention, Draw, Plan, Read, Step, StepTap, Store, apply
from fastgen.sampling.uniforms import image_uniforms


class ReferenceExecutor:
    """Keeps every plane whole, [height, width, batch, channels] with a zero margin, in `dtype`."""

    def __init__(self, plan: Plan, dtype: torch.dtype = torch.float32):
        self.plan = plan
        self.dtype = dtype
        self.flops = plan.flops
        self.weight_bytes, self.sample_bytes = plan.weight_bytes, plan.cache_bytes

    def sample(self, batch: Batch) -> Tensor:
        """Levels [count, C, H, W]."""
        plan = self.plan
        channels, height, width = plan.image_shape
        head = plan.head.keeping(batch.truncation)
        groups = head.groups(channels)
        uniforms = image_uniforms(batch.seed, batch.start, batch.count, (groups[-1].uniforms.stop, height, width))
        levels = torch.zeros(batch.count, *plan.image_shape, dtype=plan.head.dtype)
        planes = _Planes(plan, batch, self.dtype)
        for y in range(plan.first_row, height):
            for step in plan.row_steps():
                row = plan.position(step, 0, y)
                if row is not None:
                    columns = range(step.phase[1], plan.planes[step.out].width, step.period[1])
                    _run(step, planes, row, columns)
            for x in plan.columns():
                for rank, (draw, group) in enumerate(zip(plan.draws, groups, strict=True)):
                    for step in plan.pixel_steps(rank):
                        row, column = plan.position(step, 0, y), plan.position(step, 1, x)
                        if row is not None and column is not None:
                            _run(step, planes, row, range(column, column + 1))
                    if y >= 0 and 0 <= x < width:
                        params = planes.params(draw, y, x)
                        if batch.guidance is not None:
                            params = batch.guidance.of(params[::2], params[1::2])
                        drawn = head.draw(params, uniforms[:, group.uniforms, y, x], batch.temperature)
                        if batch.known is not None and batch.mask is not None:
                            given = batch.mask[:, y, x].unsqueeze(1)
                            drawn = torch.where(given, batch.known[:, group.colours, y, x], drawn)
                        levels[:, group.colours, y, x] = drawn
                        planes.encode(levels.repeat_interleave(batch.streams, 0), y, x, group.colours)
            if y >= 0:
                batch.on_rows(1)
        return levels


class _Planes:
    """Values of all planes of a batch."""

    def __init__(self, plan: Plan, batch: Batch, dtype: torch.dtype):
        self.plan = plan
        given = dict(zip(plan.conditions, batch.conditions, strict=True))
        shifts = [abs(read.dy) + abs(read.dx) for step in plan.steps for read, _ in step.reads_here()]
        self.margin = max(shifts, default=0) + max(p.height + p.width for p in plan.planes)
        self.values: list[Tensor] = []
        for i, plane in enumerate(plan.planes):
            size = (plane.height + 2 * self.margin, plane.width + 2 * self.margin, batch.rows, plane.channels)
            value = torch.zeros(size, dtype=dtype)
            data = given.get(i) if plane.data is None else plane.data[None]
            if data is not None:
                self._inside(value, plane.height, plane.width).copy_(data.permute(2, 3, 0, 1))
            self.values.append(value)

    def _inside(self, value: Tensor, height: int, width: int) -> Tensor:
        return value[self.margin : self.margin + height, self.margin : self.margin + width]

    def read(self, step: Step, read: Read | StepTap, row: int, columns: range, count: int) -> Tensor:
        """[columns, batch, count]."""
        channels = slice(read.channel, read.channel + count)
        if self.plan.planes[read.plane].broadcast:
            return self.values[read.plane][self.margin, self.margin, :, channels].expand(len(columns), -1, -1)
        source_row = self.margin + self.plan.source(step, read.plane, 0, row, read.dy)
        source_columns = [self.margin + self.plan.source(step, read.plane, 1, c, read.dx) for c in columns]
        return self.values[read.plane][source_row, source_columns, :, channels]

    def whole(self, read: Read, count: int) -> Tensor:
        """All of a plane, in raster order: [positions, batch, count]."""
        plane = self.plan.planes[read.plane]
        inside = self._inside(self.values[read.plane], plane.height, plane.width)
        return inside[..., read.channel : read.channel + count].flatten(0, 1)

    def write(self, store: Store, row: int, columns: range, value: Tensor) -> None:
        at = slice(self.margin + columns.start, self.margin + columns.stop, columns.step)
        channels = slice(store.channel, store.channel + value.shape[-1])
        self.values[store.plane][self.margin + row, at, :, channels] = value

    def params(self, draw: Draw, y: int, x: int) -> Tensor:
        channels = slice(draw.channel, draw.channel + draw.count)
        return self.values[draw.plane][self.margin + y, self.margin + x, :, channels]

    def encode(self, levels: Tensor, y: int, x: int, colours: range) -> None:
        """Write the encodings of colours of a pixel."""
        for e in self.plan.encodings:
            if e.colour in colours:
                plane = self.values[e.plane][self.margin + y, self.margin + x]
                encoded = e.table.to(plane.dtype)[levels[:, e.colour, y, x].long()]
                plane[:, e.channel : e.channel + e.table.shape[1]] = encoded


def _run(step: Step, planes: _Planes, row: int, columns: range) -> None:
    """Run a step at some columns of a row of its frame."""
    dtype = planes.values[0].dtype
    acc = torch.zeros(len(columns), planes.values[0].shape[2], step.groups * step.width, dtype=dtype)
    if step.attention is not None:
        acc = _attend(step, step.attention, planes, row, columns)
    if step.bias is not None:
        acc += step.bias
    if step.init is not None:
        acc += planes.read(step, step.init, row, columns, step.groups * step.width)
    first = 0
    for tap in step.taps:
        assert step.weight is not None
        source = planes.read(step, tap, row, columns, tap.count)
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
            registers.append(planes.read(step, instr.read, row, columns, step.width))
        elif instr.op == "const":
            registers.append(torch.full((1, 1, step.width), instr.value, dtype=dtype))
        else:
            registers.append(apply(instr.op, *(registers[r] for r in instr.operands)))
    for store in step.stores:
        planes.write(store, row, columns, registers[store.register])


def _attend(step: Step, attention: Attention, planes: _Planes, row: int, columns: range) -> Tensor:
    """[columns, batch, heads * width]."""
    of, plan = attention, planes.plan
    (_, depths), _, (_, widths), *_ = of.reads()
    query = planes.read(step, of.query, row, columns, depths).unflatten(2, (of.heads, of.depth))
    keys = planes.whole(of.keys, depths).unflatten(2, (of.heads, of.depth))
    values = planes.whole(of.values, widths).unflatten(2, (of.heads, of.width))
    result = torch.zeros(len(columns), query.shape[1], of.heads, of.width, dtype=query.dtype)
    for i, column in enumerate(columns):
        position = row * plan.planes[step.out].width + column
        begin, end = of.spans[position].tolist()
        if begin == end:
            continue
        scores = of.scale * torch.einsum("nhd,snhd->nhs", query[i], keys[begin:end])
        if of.cap:
            scores = of.cap * torch.tanh(scores / of.cap)
        if of.bias is not None:
            scores += of.bias[:, position, begin:end].to(scores)
        if of.of_keys is not None:
            own = replace(of.of_keys, channel=of.of_keys.channel + position * of.each_query)
            scores += planes.whole(own, 1)[begin:end].permute(1, 2, 0)
        weights = torch.ops.aten._safe_softmax(scores, 2) if of.softmax else scores
        result[i] = torch.einsum("nhs,snhc->nhc", weights, values[begin:end])
    return result.flatten(2)
