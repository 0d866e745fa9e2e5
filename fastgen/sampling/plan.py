"""The plan: what an executor runs to draw a batch of images.  No executor knows any model; a new model needs no
executor code.

Planes are cached feature maps with zeros outside.  A *step* works on positions (Y, X) of a frame, for a whole row
(`Stage.ROW`) or for one pixel (`Stage.PIXEL`), and computes `width` channels of one or several planes:

    acc[g, j] = init[g, j] or bias[g, j]  +  sum over taps t, k of  plane_t[Y, X, channel + k] * weight[t, k, g, j]
    plane_s[Y, X, channel_s + j] = register_s of program(acc, other planes)[j]      for each store s

with g < groups, j < width; or acc[0] is what attention gives (`Attention`).  Reads are shifted by (dy, dx), see
`Plan.source`.  Time runs over image rows y and, inside, columns x; position Y of a frame of stride s lies at image row
s * Y, and at time (y, x) a step works on the position that lies at (y - lag_y, x - lag_x), where there is one and it
has the step's phase.  One batch:

    for y from min(lag_y) to H-1:
        every ROW step, in order
        for x from the first to the last column of any step:
            for rank, group of colours:
                every PIXEL step of that rank, in order
                if (y, x) is in the image: draw the group's colours from their parameters at (y, x), write their levels
                and their encodings
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastgen.sampling.graph import Stride, ratio
from fastgen.sampling.heads import Head
from fastgen.sampling.precision import BYTES
from fastgen.sampling.schedule import Stage

UNARY = tuple("copy neg abs relu elu expm1_of_minus_abs exp expm1 log sqrt erf tanh sigmoid".split())
BINARY = tuple("add sub mul div max min positive_or".split())
PRIMITIVES = UNARY + BINARY


@dataclass(eq=False)
class Plane:
    """A feature map [height, width, batch, channels], zero outside.

    kind: "image" (encoded levels, written by draws), "cache" (written by steps), "condition" (per sample, given before
    the batch), "constant" (given, `data` [channels, height, width], the same for all samples).
    stride: of its positions in the image.
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
    stride: Stride = (1, 1)
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
    """Channels from `channel` on of a plane at (Y, X) shifted by (dy, dx)."""

    plane: int
    dy: int
    dx: int
    channel: int


@dataclass(frozen=True)
class StepTap:
    """`count` channels of a plane at (Y, X) shifted by (dy, dx), times the next `count` rows of the step's weight."""

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

    @property
    def operands(self) -> tuple[int, ...]:
        """The registers that it reads."""
        return () if self.op in ("acc", "load", "const") else tuple(r for r in (self.a, self.b) if r >= 0)


@dataclass(frozen=True)
class Store:
    """A register of the program becomes channels [channel, channel + width) of a plane."""

    plane: int
    channel: int
    register: int


@dataclass(eq=False)
class Attention:
    """A step's sum over keys, in place of a product: with p the step's position in raster order,

        score[h, s] = capped(scale * query[p, h] . keys[s, h]) + bias[h, p, s] + of_keys[s, p or 0]
        acc[0, h * width + c] = sum over s of softmax_s(score[h, s]) * values[s, h, c]

    or, where it has no softmax, of score[h, s] * values[s, h, c],
    over the keys spans[p, 0] <= s < spans[p, 1]; zero where none is seen. capped(x) is x where the cap is 0, else
    cap * tanh(x / cap). Query, keys and values are read in place, the
    query `heads * depth` channels at the step's position, keys as many and values `heads * width` at position s of
    their planes, in raster order. These planes have one size, and keep all their rows.

    spans: int32 [positions, 2]. bias: float32 [heads or 1, positions, keys], -inf for keys that are not seen, or None.
    of_keys: a channel of a plane like that of the keys or, where `each_query`, one for each position p from there on;
    or None: what masks have for each sample.
    """

    heads: int
    depth: int
    width: int
    scale: float
    query: Read
    keys: Read
    values: Read
    spans: Tensor
    bias: Tensor | None
    of_keys: Read | None = None
    each_query: bool = False
    cap: float = 0.0
    softmax: bool = True

    def reads(self) -> list[tuple[Read, int]]:
        """What it reads, with the number of channels."""
        channels = self.heads * self.depth
        reads = [(self.query, channels), (self.keys, channels), (self.values, self.heads * self.width)]
        added = len(self.spans) if self.each_query else 1
        return reads if self.of_keys is None else [*reads, (self.of_keys, added)]

    @property
    def macs(self) -> float:
        """Multiply-adds per position, on average."""
        seen = (self.spans[:, 1] - self.spans[:, 0]).double().mean().item()
        return seen * self.heads * (self.depth + self.width)


@dataclass(eq=False)
class Step:
    """See the module. Its frame is that of the planes it stores to, with their height, width and stride; it works on
    the positions that equal `phase` modulo `period`.
    """

    name: str
    stage: Stage
    lag_y: int
    lag_x: int
    rank: int
    width: int
    program: tuple[Instr, ...]
    stores: tuple[Store, ...]
    period: tuple[int, int] = (1, 1)
    phase: tuple[int, int] = (0, 0)
    groups: int = 0
    taps: tuple[StepTap, ...] = ()
    weight: Tensor | None = None  # float32 [sum of counts, groups * width]
    bias: Tensor | None = None  # float32 [groups * width]
    init: Read | None = None  # groups * width channels: bias and the part of the sum that the row stage has done
    attention: Attention | None = None  # then groups is 1, and there are no taps

    def reads(self) -> list[Read]:
        """Everything but taps and attention that it reads."""
        loads = [i.read for i in self.program if i.read is not None]
        return loads if self.init is None else [self.init, *loads]

    def reads_here(self) -> list[tuple[Read | StepTap, int]]:
        """What it reads from its own position on, with the number of channels: all but the keys of attention, their
        values and what masks add to them.
        """
        found: list[tuple[Read | StepTap, int]] = [(tap, tap.count) for tap in self.taps]
        found += ((read, self.width * (self.groups if read is self.init else 1)) for read in self.reads())
        return found if self.attention is None else [*found, self.attention.reads()[0]]

    def all_reads(self) -> list[tuple[Read | StepTap, int]]:
        """All that it reads, with the number of channels."""
        return self.reads_here() + (self.attention.reads()[1:] if self.attention else [])

    @property
    def out(self) -> int:
        """A plane with the step's frame."""
        return self.stores[0].plane

    @property
    def macs(self) -> int:
        """Multiply-adds of the product per position."""
        return sum(t.count for t in self.taps) * self.groups * self.width

    @property
    def all_macs(self) -> float:
        """Multiply-adds per position, those of attention on average."""
        return self.macs if self.attention is None else self.attention.macs


@dataclass(frozen=True)
class Draw:
    """The parameters of one group of colours at (y, x) are `count` channels of a plane, from `channel` on."""

    plane: int
    channel: int
    count: int


@dataclass(eq=False)
class Encoding:
    """Level l of a colour is table[l] [channels] in a plane, from `channel` on."""

    plane: int
    channel: int
    colour: int
    table: Tensor


@dataclass(eq=False)
class Plan:
    """Everything an executor needs, and nothing else.

    draws: one for each group of the head. conditions: the planes to be given for each batch, in tape order.
    precision: of the weights, see `fastgen.sampling.precision`; all else is float32.
    """

    image_shape: tuple[int, int, int]
    head: Head
    planes: list[Plane]
    steps: list[Step]
    draws: list[Draw]
    encodings: list[Encoding]
    conditions: list[int] = field(default_factory=list)
    precision: str = "fp32"

    def round_weights(self, precision: str) -> None:
        """Round the weights of products to bfloat16, to nearest even. For "int8" the trace has rounded those of the
        network, which bfloat16 holds, too: others are left, such as the ones of a sum over channels.
        """
        self.precision = precision
        if precision == "fp32":
            return
        for step in self.steps:
            if step.weight is not None:
                step.weight = step.weight.bfloat16().float()

    def drop_weights(self) -> None:
        """Free the weights, where an executor has a packed copy."""
        for step in self.steps:
            step.weight = None

    def source(self, step: Step, plane: int, axis: int, position: int, shift: int) -> int:
        """The row (axis 0) or column (axis 1) of a plane that a step reads at a position of its frame."""
        num, den = self.ratio(step, plane, axis)
        return (position * num + shift) // den

    def ratio(self, step: Step, plane: int, axis: int) -> tuple[int, int]:
        """(num, den) of a step's frame and a plane, see `fastgen.sampling.graph`."""
        source = self.planes[plane]
        return (1, 1) if source.given else ratio(self.planes[step.out].stride[axis], source.stride[axis])

    def position(self, step: Step, axis: int, time: int) -> int | None:
        """The row (axis 0) or column (axis 1) of its frame that a step works on at time y or x; None: none."""
        out = self.planes[step.out]
        position, rest = divmod(time - (step.lag_y, step.lag_x)[axis], out.stride[axis])
        inside = 0 <= position < (out.height, out.width)[axis]
        return position if not rest and inside and position % step.period[axis] == step.phase[axis] else None

    def row_steps(self) -> list[Step]:
        return [s for s in self.steps if s.stage == Stage.ROW]

    def pixel_steps(self, rank: int) -> list[Step]:
        return [s for s in self.steps if s.stage == Stage.PIXEL and s.rank == rank]

    @property
    def first_row(self) -> int:
        return min(0, *(s.lag_y for s in self.steps))

    def columns(self) -> range:
        """The values of x that the pixel stage of a row runs through."""
        first, last = 0, self.image_shape[2] - 1
        for step in self.steps:
            if step.stage == Stage.PIXEL:
                out = self.planes[step.out]
                first = min(first, step.lag_x)
                last = max(last, (out.width - 1) * out.stride[1] + step.lag_x)
        return range(first, last + 1)

    @property
    def flops(self) -> int:
        """Useful floating point operations of products and attention, per sample (two per multiply-add)."""
        return sum(round(2 * s.all_macs * self.positions(s)) for s in self.steps)

    def positions(self, step: Step) -> int:
        """How many positions of its frame a step computes."""
        return self._along(step, 0) * self._along(step, 1)

    def _along(self, step: Step, axis: int) -> int:
        out = self.planes[step.out]
        size = (out.height, out.width)[axis]
        if axis == 0:
            size = min(size, -((step.lag_y - self.image_shape[1]) // out.stride[0]))
        return len(range(step.phase[axis], size, step.period[axis]))

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return BYTES[self.precision] * sum(s.macs for s in self.steps)

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
            size = f"{p.channels:5d} x {p.height} x {p.width}"
            lines.append(f"  {i:4d} {p.kind:9s} {size}  rows {p.rows}  {p.name}")
        lines.append("steps (stage, rank, lag, planes[channels], multiply-adds per position, program, name)")
        for s in self.steps:
            stage = "row  " if s.stage == Stage.ROW else f"pixel {s.rank}"
            ops = " ".join("attention" if i.op == "acc" and s.attention else i.op for i in s.program)
            stores = " ".join(f"{t.plane}[{t.channel}:{t.channel + s.width}]" for t in s.stores)
            lines.append(f"  {stage:7s} lag ({s.lag_y}, {s.lag_x})  {stores}  {round(s.all_macs)}  {ops}  {s.name}")
        return "\n".join(lines)


def apply(op: str, a: Tensor, b: Tensor | None = None) -> Tensor:
    """The definition of the primitives."""
    if op == "copy":
        return a
    if op == "elu":
        return torch.nn.functional.elu(a)
    if op == "expm1_of_minus_abs":
        return torch.expm1(-a.abs())
    if op == "positive_or":
        assert b is not None
        return torch.where(a > 0, a, b)
    if op in UNARY:
        return getattr(torch, op)(a)
    names = {"max": "maximum", "min": "minimum"}
    assert b is not None
    return getattr(torch, names.get(op, op))(a, b)
