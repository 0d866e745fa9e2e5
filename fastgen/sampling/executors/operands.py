"""A plan's operands as tables of integers, for kernels on a GPU: kernels/sample_plan.py, csrc/cuda/pixel_stage.h."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.kernels.sample_plan import ALIGNED, PITCH
from fastgen.sampling.plan import Draw, Encoding, Plan, Plane, Read, Step, StepTap, Store
from fastgen.sampling.schedule import Stage

_VECTOR = 4  # floats that are read at once where all that a step reads and writes comes in such pieces


@dataclass(frozen=True)
class Launch:
    """What the kernel of a step is told."""

    operand: int
    init: int
    query: int
    first: int
    weight: int
    bias: int
    constant: int
    vector: int
    spacing: str
    program: tuple[tuple[str, int, int, int], ...]
    stores: tuple[tuple[int, int], ...]


@dataclass
class Operands:
    """The plan's operands as rows of integers (kernels/sample_plan.py), and what else its kernels read."""

    plan: Plan
    pixel_weights: bool = True  # those of pixel steps are packed, too
    offsets: list[int] = field(default_factory=list)  # of each plane, floats per sample
    floats: int = 0  # of all planes, per sample
    row_fields: list[tuple[int, ...]] = field(default_factory=list)
    fields: list[tuple[int, ...]] = field(default_factory=list)
    constants: list[float] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    row_weights: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        plan = self.plan
        for plane in plan.planes:
            self.offsets.append(self.floats)
            self.floats += _kept(plane) * plane.width * pitch_of(plane)
        self._num_weights = {Stage.ROW: 0, Stage.PIXEL: 0}
        self._num_biases = 0
        no_bias = torch.zeros(max((s.groups * _columns(s.width) for s in plan.steps), default=0))
        self._keep(self.biases, no_bias)
        self._num_biases = self.biases[0].numel()
        by_stage = sorted(plan.steps, key=lambda step: step.stage)
        row_steps = len(plan.row_steps())
        self.launches = {id(step): self._step(step) for step in by_stage[:row_steps]}
        self.of_pixels = len(self.fields)  # from here on operands are those of pixel steps and draws
        self.launches |= {id(step): self._step(step) for step in by_stage[row_steps:]}
        self.draws = [self._pixel(draw, draw.count) for draw in plan.draws]
        self.encodings = len(self.fields), len(plan.encodings)
        offset = 0
        for e in plan.encodings:
            self._pixel(e, e.table.shape[1], offset, e.colour)
            offset += e.table.numel()

    @staticmethod
    def integers(rows: list[tuple[int, ...]], dtype: torch.dtype) -> Tensor:
        return torch.tensor(rows, dtype=dtype, device="cpu")

    def _step(self, step: Step) -> Launch:
        self.constants += [0.0] * (-len(self.constants) % ALIGNED)
        operand, constant, program = len(self.fields), len(self.constants), []
        for instr in step.program:
            index = 0
            if instr.read is not None:
                index = self._address(step, instr.read) - operand
            elif instr.op == "const":
                index = len(self.constants) - constant
                self.constants.append(instr.value)
            program.append((instr.op, max(instr.a, 0), max(instr.b, 0), index))
        stores = tuple((s.register, self._address(step, s) - operand) for s in step.stores)
        init = -1 if step.init is None else self._address(step, step.init)
        query = -1 if step.attention is None else self._address(step, step.attention.query)
        first, k = len(self.fields), 0
        for tap in step.taps:
            self._address(step, tap, tap.count, k)
            k += tap.count
        launch = Launch(
            operand, init, query, first, self._num_weights[step.stage], 0 if step.bias is None else self._num_biases,
            constant, _vector(step), self._spacing(step), tuple(program), stores,
        )  # fmt: skip
        if step.weight is not None and (step.stage == Stage.ROW or self.pixel_weights):
            kept = self.row_weights if step.stage == Stage.ROW else self.weights
            self._num_weights[step.stage] += self._keep(kept, _packed(step.weight, step))
        if step.bias is not None:
            self._num_biases += self._keep(self.biases, _packed(step.bias, step))
        return launch

    def _spacing(self, step: Step) -> str:
        """Of the columns in which its operands lie, see the kernel."""
        planes = {read.plane for read, _ in step.reads_here()} | {store.plane for store in step.stores}
        ratios = [self.plan.ratio(step, plane, 1) for plane in planes]
        if all(den == 1 for _, den in ratios):
            return "whole"
        even = step.stage == Stage.PIXEL or all(step.period[1] * num % den == 0 for num, den in ratios)
        return "even" if even else "any"

    @staticmethod
    def _keep(kept: list[Tensor], tensor: Tensor) -> int:
        """Adds a tensor, filled up so that the next one is aligned and needs no kernel of its own; returns its size."""
        kept.append(torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % ALIGNED)))
        return kept[-1].numel()

    def _address(self, step: Step, at: Read | StepTap | Store, count: int = 0, more: int = 0) -> int:
        out = self.plan.planes[step.out]
        rows, columns = (self.plan.ratio(step, at.plane, axis) for axis in range(2))
        dy, dx = (0, 0) if isinstance(at, Store) else (at.dy, at.dx)
        frame = (step.lag_y, out.stride[0])
        return self._operand(at.plane, frame, (*rows, dy), (*columns, dx), (at.channel, count, more, 0))

    def _pixel(self, at: Draw | Encoding, count: int, more: int = 0, colour: int = 0) -> int:
        return self._operand(at.plane, (0, 1), (1, 1, 0), (1, 1, 0), (at.channel, count, more, colour))

    def _operand(
        self, index: int, frame: tuple[int, int], rows: tuple[int, ...], columns: tuple[int, ...],
        rest: tuple[int, int, int, int],
    ) -> int:  # fmt: skip
        plane = self.plan.planes[index]
        if plane.broadcast:  # position 0 wherever it is read
            rows = columns = (0, 1, 0)
        pitch = pitch_of(plane)
        self.row_fields.append((*frame, *rows, plane.height, _kept(plane), plane.width * pitch, self.offsets[index]))
        self.fields.append((*columns, plane.width, pitch, *rest))
        return len(self.fields) - 1


def _kept(plane: Plane) -> int:
    return plane.height if plane.given else plane.rows


def pitch_of(plane: Plane) -> int:
    return -(-plane.channels // _VECTOR) * _VECTOR


def _columns(width: int) -> int:
    return -(-width // PITCH) * PITCH


def _vector(step: Step) -> int:
    """How many floats all that a step reads and writes are multiples of, _VECTOR or 1."""
    operands: tuple[Read | StepTap | Store, ...] = (*step.reads(), *step.stores, *step.taps)
    counts = [step.width, *(t.count for t in step.taps)]
    if step.attention is not None:
        operands += step.attention.query, step.attention.keys, step.attention.values
        counts += step.attention.depth, step.attention.width
    return 1 if any(n % _VECTOR for n in (*counts, *(operand.channel for operand in operands))) else _VECTOR


def _packed(tensor: Tensor, step: Step) -> Tensor:
    """[..., groups * width] -> [..., groups, columns]."""
    groups = tensor.detach().unflatten(-1, (step.groups, step.width))
    return torch.nn.functional.pad(groups, (0, _columns(step.width) - step.width))
