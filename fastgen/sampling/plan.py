"""The plan: what an executor runs to draw a batch of images.  No executor knows any model; a new model needs no
executor code.

Planes are cached feature maps with zeros outside.  A *step* computes channels of one plane, for a whole row
(`Stage.ROW`) or for one pixel (`Stage.PIXEL`):

    acc[g, j] = init[g, j] or bias[g, j]  +  sum over taps t, k of  plane_t[Y + dy, X + dx, channel + k] * weight[t, k,
    g, j] out[Y, X, out_channel + j] = program(acc, other planes)

with g < groups, j < width.  Time runs over image rows y and, inside, columns x; at time (y, x) a step works on
Y = y - lag_y, X = x - lag_x, where that lies in its plane.  One batch:

    for y from min(lag_y) to H-1:
        every ROW step, in order
        for x from min(lag_x) to W-1 + max(lag_x):
            for rank in 0..C-1:
                every PIXEL step of that rank, in order
                if (y, x) is in the image: draw colour `rank` from the parameters at (y, x), write its level and its
                encoding
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.sampling.heads import Head
from fastgen.sampling.schedule import Stage

UNARY = ("copy", "neg", "abs", "relu", "exp", "expm1", "log", "sqrt", "tanh", "sigmoid")
BINARY = ("add", "sub", "mul", "div", "max", "min")
PRIMITIVES = UNARY + BINARY


@dataclass(eq=False)
class Plane:
    """A feature map [height, width, batch, channels], zero outside.

    kind: "image" (encoded levels, written by draws), "cache" (written by steps), "condition" (per sample, given before
    the batch), "constant" (given, `data` [channels, height, width], the same for all samples).
    rows: how many of its latest rows are needed at a time, or, where it is given, its height and how far readers look
    over its top and bottom; row y is kept as row y mod rows. left, right: how far readers look over its sides.
    Conditions and constants of size 1x1 are read at every position alike (`broadcast`).
    """

    name: str
    kind: str
    channels: int
    height: int
    width: int
    data: Tensor | None = None
    rows: int = 0
    left: int = 0
    right: int = 0

    @property
    def given(self) -> bool:
        return self.kind in ("condition", "constant")

    @property
    def broadcast(self) -> bool:
        return self.given and self.height == self.width == 1


@dataclass(frozen=True)
class Read:
    """Channels from `channel` on of a plane at (Y + dy, X + dx)."""

    plane: int
    dy: int
    dx: int
    channel: int


@dataclass(frozen=True)
class StepTap:
    """`count` channels of a plane at (Y + dy, X + dx), multiplied by the next `count` rows of the step's weight."""

    plane: int
    dy: int
    dx: int
    channel: int
    count: int


@dataclass(frozen=True)
class Instr:
    """One operation of a program; its result is the register with its index.

    op: "acc" (group a of the product), "load" (read), "const" (value), or a primitive of registers a (and b).
    """

    op: str
    a: int = -1
    b: int = -1
    value: float = 0.0
    read: Read | None = None


@dataclass(eq=False)
class Step:
    name: str
    stage: Stage
    lag_y: int
    lag_x: int
    rank: int
    out: int
    out_channel: int
    width: int
    program: tuple[Instr, ...]
    groups: int = 0
    taps: tuple[StepTap, ...] = ()
    weight: Tensor | None = None  # float32 [sum of counts, groups * width]
    bias: Tensor | None = None  # float32 [groups * width]
    init: Read | None = None  # groups * width channels: bias and the part of the sum that the row stage has done

    def reads(self) -> list[Read]:
        """Everything but the taps that it reads."""
        loads = [i.read for i in self.program if i.read is not None]
        return loads if self.init is None else [self.init, *loads]

    @property
    def macs(self) -> int:
        """Multiply-adds per position."""
        return sum(t.count for t in self.taps) * self.groups * self.width


@dataclass(frozen=True)
class Draw:
    """The parameters of one colour at (y, x) are `count` channels of a plane, from `channel` on, at position (y, x)."""

    plane: int
    channel: int
    count: int


@dataclass(eq=False)
class Plan:
    """Everything an executor needs, and nothing else. `conditions`: the planes to be given for each batch, in tape
    order.
    """

    image_shape: tuple[int, int, int]
    head: Head
    planes: list[Plane]
    steps: list[Step]
    draws: list[Draw]
    image: int
    conditions: list[int] = field(default_factory=list)

    def row_steps(self) -> list[Step]:
        return [s for s in self.steps if s.stage == Stage.ROW]

    def pixel_steps(self, rank: int) -> list[Step]:
        return [s for s in self.steps if s.stage == Stage.PIXEL and s.rank == rank]

    @property
    def first_row(self) -> int:
        return min(0, *(s.lag_y for s in self.steps))

    def columns(self) -> range:
        """The values of x that the pixel stage of a row runs through."""
        pixel = [s for s in self.steps if s.stage == Stage.PIXEL]
        first = min([0, *(s.lag_x for s in pixel)])
        last = max([self.image_shape[2], *(self.planes[s.out].width + s.lag_x for s in pixel)])
        return range(first, last)

    @property
    def flops(self) -> int:
        """Useful floating point operations of the products, per sample (two per multiply-add)."""
        return sum(2 * s.macs * self._rows_of(s) * self.planes[s.out].width for s in self.steps)

    def _rows_of(self, step: Step) -> int:
        return min(self.planes[step.out].height, self.image_shape[1] - step.lag_y)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights in float32."""
        return sum(4 * s.weight.numel() for s in self.steps if s.weight is not None)

    @property
    def cache_bytes(self) -> int:
        """Bytes of all planes in float32, per sample."""
        return sum(4 * p.channels * p.rows * (p.left + p.width + p.right) for p in self.planes if p.kind != "constant")

    def __str__(self) -> str:
        channels, height, width = self.image_shape
        rows = len(self.row_steps())
        lines = [
            f"plan for {channels}x{height}x{width} images, {self.head}",
            f"  {self.flops / 1e6:.1f} MFLOP and {self.cache_bytes / 1e6:.2f} MB of planes per sample",
            f"  {self.weight_bytes / 1e6:.2f} MB of weights",
            f"  {rows} row steps, {len(self.steps) - rows} pixel steps, {len(self.planes)} planes",
            "planes (index, kind, channels x height x width, rows kept, name)",
        ]
        for i, p in enumerate(self.planes):
            lines.append(f"  {i:4d} {p.kind:9s} {p.channels:5d} x {p.height} x {p.width}  rows {p.rows}  {p.name}")
        lines.append("steps (stage, rank, lag, plane[channels], multiply-adds per position, program, name)")
        for s in self.steps:
            stage = "row  " if s.stage == Stage.ROW else f"pixel {s.rank}"
            ops = " ".join(i.op for i in s.program)
            lines.append(
                f"  {stage:7s} lag ({s.lag_y}, {s.lag_x})  {s.out}[{s.out_channel}:{s.out_channel + s.width}]"
                f"  {s.macs}  {ops}  {s.name}"
            )
        return "\n".join(lines)


def apply(op: str, a: Tensor, b: Tensor | None = None) -> Tensor:
    """The definition of the primitives."""
    if op == "copy":
        return a
    if op in UNARY:
        return getattr(torch, op)(a)
    names = {"max": "maximum", "min": "minimum"}
    assert b is not None
    return getattr(torch, names.get(op, op))(a, b)
