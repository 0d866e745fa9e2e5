"""The plan executed by Triton kernels (kernels/sample_plan.py): on a GPU, rows of an image are replayed as CUDA graphs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgen.kernels import sample_plan as kernels
from fastgen.kernels.launch import INTERPRETED
from fastgen.kernels.philox import signed
from fastgen.sampling.executors import Batch
from fastgen.sampling.heads import Bernoulli, LogisticMixture
from fastgen.sampling.plan import Plan, Read, Step, StepTap, Store
from fastgen.sampling.schedule import Stage

_KEPT = 2  # batch sizes whose memory and graphs are kept
_MIN_TILE = 16  # of a product, in each direction
# (rows that a step has at least, tile of rows and columns, warps): small tiles spread one image over the GPU.
_TILES = ((4096, 64, 64, 8), (128, 64, 32, 4), (0, 16, 16, 4))
_ALIGNED = 8  # elements: Triton looks whether pointers are multiples of 16 bytes
_DRAW_SAMPLES = 4  # of a program that draws from logits
_MIXTURE_SAMPLES = 16

Row = tuple[tuple[Step, ...], tuple[Step, ...], bool]  # row steps and pixel steps that have work, whether pixels are drawn


class TritonExecutor:
    """Plans on the current GPU in float32, or on the CPU where Triton's kernels are interpreted.

    Products of float32 have its full precision unless ``torch.set_float32_matmul_precision`` asks for TF32. Rows of
    an image with the same steps are one CUDA graph, captured the second time that a batch size comes to them. Nothing
    waits for the GPU before the batch is done.
    """

    def __init__(self, plan: Plan, device: torch.device | None = None):
        self.plan = plan
        here = torch.device("cpu") if INTERPRETED else torch.device("cuda")
        self.device = here if device is None else device
        self.flops = plan.flops
        self.weight_bytes = plan.weight_bytes
        self._offsets, self._floats = _layout(plan)
        tables = _Tables(plan, self._offsets)
        dtype = torch.bfloat16 if plan.precision == "bf16" else torch.float32
        self._launches = tables.launches
        self._table = torch.tensor(tables.rows, dtype=torch.int64, device="cpu").to(self.device)
        self._weight = _joined(tables.weights, dtype).to(self.device)
        self._bias = _joined(tables.biases, torch.float32).to(self.device)
        self._constants = torch.tensor(tables.constants or [0.0], dtype=torch.float32, device="cpu").to(self.device)
        self._encoded = _joined([e.table for e in plan.encodings], torch.float32).to(self.device)
        self._values = plan.head.encoding().to(self.device)
        self._draws, self._encodings = tables.draws, tables.encodings
        self._widest = _power(max((e.table.shape[1] for e in plan.encodings), default=1))
        self._spaces: dict[tuple[Any, ...], _Space] = {}
        self.rows = [self._row(y) for y in range(plan.first_row, plan.image_shape[1])]

    def sample(self, batch: Batch) -> Tensor:
        """Levels [count, C, H, W], on the CPU."""
        precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
        space = self.space(batch.count, precision)
        space.begin(batch)
        self._give(batch, space)
        for y, row in enumerate(self.rows, self.plan.first_row):
            self._run(row, space)
            if y >= 0:
                batch.on_rows(1)
        return space.levels.to("cpu").to(self.plan.head.dtype)

    def _run(self, row: Row, space: _Space) -> None:
        """Launches a row; the second time, and on a GPU, captures it first."""
        key = tuple(id(s) for steps in row[:2] for s in steps), row[2]
        if not space.planes.is_cuda or key not in space.graphs:
            space.graphs[key] = None  # the first time compiles the kernels, which must not be captured
            return self.launch_row(row, space)
        graph = space.graphs[key]
        if graph is None:
            graph = space.graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.launch_row(row, space)
        graph.replay()

    def _row(self, y: int) -> Row:
        active = [s for s in self.plan.steps if self.plan.position(s, 0, y) is not None]
        rows = tuple(s for s in active if s.stage == Stage.ROW)
        return rows, tuple(s for s in active if s.stage == Stage.PIXEL), y >= 0

    def launch_row(self, row: Row, space: _Space) -> None:
        """Everything of one image row, whose number is in the memory of the space."""
        plan, (row_steps, pixel_steps, drawn) = self.plan, row
        for step in row_steps:
            columns = len(range(step.phase[1], plan.planes[step.out].width, step.period[1]))
            self._launch_step(step, space, step.phase[1], columns)
        for x in plan.columns():
            for rank, _ in enumerate(plan.draws):
                for step in pixel_steps:
                    column = plan.position(step, 1, x) if step.rank == rank else None
                    if column is not None:
                        self._launch_step(step, space, column, 1)
                if drawn and 0 <= x < plan.image_shape[2]:
                    self._launch_draw(rank, space, x)
        kernels.next_row[(1,)](space.state)

    def _launch_step(self, step: Step, space: _Space, column: int, columns: int) -> None:
        if columns == 0:
            return
        launch, stride = self._launches[id(step)], self.plan.planes[step.out].stride[0]
        rows, width = columns * space.count, step.width
        _, tile_rows, tile_columns, warps = next(tile for tile in _TILES if rows >= tile[0])
        if INTERPRETED:
            tile_rows, tile_columns = _MIN_TILE, _MIN_TILE
        kernels.step[(-(-rows // tile_rows), -(-width // tile_columns))](
            space.planes, self._table, self._weight[launch.weight :], self._bias[launch.bias :], self._constants,
            space.state, launch.first, launch.blocks, step.lag_y, stride, column, step.period[1], columns, space.count, width,
            LOADS=launch.loads, PROGRAM=launch.program, STORES=launch.stores,
            GROUPS=max(step.groups, 1), INIT=step.init is not None, BIAS=step.bias is not None, PRECISION=space.precision,
            ROWS=tile_rows, COLUMNS=tile_columns, CHANNELS=kernels.CHANNELS, num_warps=warps,
        )  # fmt: skip

    def _launch_draw(self, rank: int, space: _Space, x: int) -> None:
        head, draw = self.plan.head, self.plan.draws[rank]
        colours, height, width = self.plan.image_shape
        group = head.groups(colours)[rank]
        size = {"COLOURS": colours, "HEIGHT": height, "WIDTH": width, "WIDEST": self._widest}
        where = (space.levels, space.known, space.mask, self._draws[rank], x, space.count, *self._encodings)
        if isinstance(head, LogisticMixture):
            kernels.draw_mixture[(-(-space.count // _MIXTURE_SAMPLES),)](
                space.planes, self._table, self._encoded, self._values, space.state, space.inverse_temperature, *where,
                COMPONENTS=head.components, NUM_LEVELS=head.levels, **size, SAMPLES=_MIXTURE_SAMPLES,
                COMPONENT_BLOCK=_power(head.components),
            )  # fmt: skip
            return
        kernels.draw_level[(-(-space.count // _DRAW_SAMPLES),)](
            space.planes, self._table, self._encoded, space.state, space.inverse_temperature, *where,
            COLOUR=group.colours.start, UNIFORM=group.uniforms.start, COUNT=draw.count,
            BERNOULLI=isinstance(head, Bernoulli), **size, SAMPLES=_DRAW_SAMPLES, LEVELS=_power(draw.count),
        )  # fmt: skip

    def space(self, count: int, precision: str) -> _Space:
        """The memory of a batch size and a precision of float32 products, "ieee" or "tf32"."""
        key = count, precision
        if key not in self._spaces:
            while len(self._spaces) >= _KEPT:
                del self._spaces[next(iter(self._spaces))]
            self._spaces[key] = _Space(self.plan, count, precision, self._floats, self.device)
        return self._spaces[key]

    def _give(self, batch: Batch, space: _Space) -> None:
        """Writes the planes that are given."""
        given = dict(zip(self.plan.conditions, batch.conditions, strict=True))
        for i, plane in enumerate(self.plan.planes):
            if plane.given:
                data = given[i] if plane.data is None else plane.data[None].expand(batch.count, -1, -1, -1)
                size = plane.height * plane.width * batch.count * plane.channels
                part = space.planes[self._offsets[i] * batch.count :][:size]
                part.view(plane.height, plane.width, batch.count, plane.channels).copy_(data.permute(2, 3, 0, 1))


class _Space:
    """Memory and graphs of one batch size."""

    def __init__(self, plan: Plan, count: int, precision: str, floats: int, device: torch.device):
        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.count, self.precision, self.first_row = count, precision, plan.first_row
        self.planes = empty(count * floats + kernels.CHANNELS, dtype=torch.float32)
        self.levels = empty(count, *plan.image_shape, dtype=torch.int32)
        self.known = empty(count, *plan.image_shape, dtype=torch.int32)
        self.mask = empty(count, *plan.image_shape[1:], dtype=torch.uint8)
        self.state = empty(3, dtype=torch.int64)  # image row, seed, index of the first sample
        self.inverse_temperature = empty(1, dtype=torch.float64)
        self.graphs: dict[tuple[Any, ...], torch.cuda.CUDAGraph | None] = {}

    def begin(self, batch: Batch) -> None:
        self.planes.zero_()
        self.state.copy_(torch.tensor([self.first_row, signed(batch.seed), batch.start], device="cpu"))
        self.inverse_temperature.fill_(1.0 / batch.temperature)
        self.mask.zero_() if batch.mask is None else self.mask.copy_(batch.mask)
        if batch.known is not None:
            self.known.copy_(batch.known)


@dataclass(frozen=True)
class _Launch:
    """What the kernel of a step is told: rows of the table, offsets, and the program."""

    first: int
    blocks: int
    loads: int
    weight: int
    bias: int
    program: tuple[tuple[str, int, int, int], ...]
    stores: tuple[int, ...]


@dataclass
class _Tables:
    """The plan's operands as rows of integers, and what else its kernels read."""

    plan: Plan
    offsets: list[int]
    rows: list[list[int]] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        plan = self.plan
        self._num_weights = self._num_biases = 0
        self.launches = {id(step): self._step(step) for step in plan.steps}
        self.draws = [self._add(self._pixel(draw), draw.count) for draw in plan.draws]
        self.encodings = len(self.rows), len(plan.encodings)
        offset = 0
        for e in plan.encodings:
            self._add(self._pixel(e), e.table.shape[1], offset, e.colour)
            offset += e.table.numel()

    def _step(self, step: Step) -> _Launch:
        first, loads, program = len(self.rows), 0, []
        for instr in step.program:
            operand = -1
            if instr.read is not None:
                operand, loads = loads, loads + 1
                self._add(self._address(step, instr.read))
            elif instr.op == "const":
                if instr.value not in self.constants:
                    self.constants.append(instr.value)
                operand = self.constants.index(instr.value)
            program.append((instr.op, max(instr.a, 0), max(instr.b, 0), operand))
        for store in step.stores:
            self._add(self._address(step, store))
        if step.init is not None:
            self._add(self._address(step, step.init))
        blocks = self._product(step)
        launch = _Launch(
            first, blocks, loads, self._num_weights, self._num_biases, tuple(program),
            tuple(s.register for s in step.stores),
        )  # fmt: skip
        self._num_weights += _keep(self.weights, step.weight)
        self._num_biases += _keep(self.biases, step.bias)
        return launch

    def _product(self, step: Step) -> int:
        """Adds the blocks of a product; returns their number."""
        before, k = len(self.rows), 0
        for tap in step.taps:
            address = self._address(step, tap)
            for c in range(0, tap.count, kernels.CHANNELS):
                block = [*address[:5], address[5] + c, *address[6:]]
                self._add(block, min(kernels.CHANNELS, tap.count - c), k + c)
            k += tap.count
        return len(self.rows) - before

    def _add(self, address: list[int], count: int = 0, more: int = 0, colour: int = 0) -> int:
        self.rows.append([*address, count, more, colour])
        return len(self.rows) - 1

    def _address(self, step: Step, at: Read | StepTap | Store) -> list[int]:
        ratios = [self.plan.ratio(step, at.plane, axis) for axis in range(2)]
        shifts = (0, 0) if isinstance(at, Store) else (at.dy, at.dx)
        return self._operand(at.plane, at.channel, shifts, ratios)

    def _pixel(self, at: Any) -> list[int]:
        """Of a draw or an encoding: the position is that in the image."""
        return self._operand(at.plane, at.channel, (0, 0), [(1, 1), (1, 1)])

    def _operand(
        self, index: int, channel: int, shifts: tuple[int, int], ratios: list[tuple[int, int]]
    ) -> list[int]:
        plane = self.plan.planes[index]
        sizes = [self.offsets[index], _rows(plane), plane.width, plane.height, plane.channels, channel]
        for shift, (num, den) in zip(shifts, ratios, strict=True):
            sizes += [shift, num, den]
        return [*sizes, int(plane.broadcast)]


def _rows(plane: Any) -> int:
    return plane.height if plane.given else plane.rows


def _layout(plan: Plan) -> tuple[list[int], int]:
    """(offset of each plane, all floats), per sample; offsets are such that vectors of four are aligned."""
    offsets, end = [], 0
    for plane in plan.planes:
        offsets.append(end)
        end += -(-_rows(plane) * plane.width * plane.channels // 4) * 4
    return offsets, end


def _keep(kept: list[Tensor], tensor: Tensor | None) -> int:
    """Adds a tensor, filled up so that the next one is aligned and needs no kernel of its own; returns its size."""
    if tensor is None:
        return 0
    size = -(-tensor.numel() // _ALIGNED) * _ALIGNED
    kept.append(torch.nn.functional.pad(tensor.detach().flatten(), (0, size - tensor.numel())))
    return size


def _joined(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([t.detach().flatten().to("cpu", dtype) for t in tensors] or [torch.zeros(1, dtype=dtype)])


def _power(n: int) -> int:
    return 1 << math.ceil(math.log2(max(n, 1)))
