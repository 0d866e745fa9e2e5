"""The plan executed by the C++ module (csrc/cpu/plan_executor.h): tables, packed weights, memory, threads."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen import backends
from fastgen.sampling.executors import Batch
from fastgen.sampling.plan import PRIMITIVES, Instr, Plan, Read, Step
from fastgen.sampling.schedule import Stage

PANEL = 16  # columns that are packed together
OPS = {op: i for i, op in enumerate(("acc", "load", "const", *PRIMITIVES))}  # enum PlanOp
NO_READ = (0, 0, 0, 0)
ALONE_SECONDS = 0.25  # how long groups are left to one thread each after a team could not keep together
CHUNKS = 8  # calls per batch: between them the progress bar moves and Ctrl-C is heard
# Samples that a thread needs so that multiplying by the weights of the pixel stage takes longer than fetching them, by
# the bytes of these weights: a core's own cache keeps up with one, the shared cache and memory need more
# (2 * FLOP/s of a core / bytes/s to it).
SAMPLES_PER_THREAD = ((1 << 20, 1), (16 << 20, 4), (math.inf, 16))
# A team is worth its barriers where a step takes one thread this long; estimated from the weights and these rates.
TEAM_STEP_SECONDS = 2e-6
CORE_BYTES_PER_SECOND = 5e10
CORE_FLOPS = 1e11


class CpuExecutor:
    """Plans on the CPU in float32, with `torch.get_num_threads()` threads."""

    def __init__(self, plan: Plan):
        self.plan = plan
        tables = _Tables(plan)
        self._tables = tables
        self._offsets = [row[7] for row in tables.planes]
        self._pitches = [row[1] for row in tables.planes]
        self._keep = tables.tensors()
        self._native = backends.native_cpu().PlanExecutor(**tables.arguments(self._keep))

    def sample(self, batch: Batch) -> Tensor:
        """uint8 levels [count, C, H, W]."""
        plan = self.plan
        levels = torch.zeros(batch.count, *plan.image_shape, dtype=torch.uint8)
        groups, team = self.split(batch.count, torch.get_num_threads())
        spaces = [self._workspace(batch, first, count) for first, count in groups]
        scratch = torch.empty(len(groups) * team * self._native.scratch())
        known = None if batch.known is None else batch.known.contiguous()
        mask = None if batch.mask is None else batch.mask.contiguous()
        height = plan.image_shape[1]
        edges = [plan.first_row, *(height * i // CHUNKS for i in range(1, CHUNKS + 1))]
        alone_until = 0.0
        for begin, end in zip(edges[:-1], edges[1:], strict=True):
            if begin == end:
                continue
            together = self._native.run(
                groups=[(first, count, s.data_ptr()) for (first, count), s in zip(groups, spaces, strict=True)],
                team=team if time.monotonic() >= alone_until else 1,
                scratch=scratch.data_ptr(),
                seed=batch.seed,
                start=batch.start,
                temperature=batch.temperature,
                levels=levels.data_ptr(),
                known=0 if known is None else known.data_ptr(),
                mask=0 if mask is None else mask.data_ptr(),
                row_begin=begin,
                row_end=end,
            )
            if not together:
                alone_until = time.monotonic() + ALONE_SECONDS
            batch.on_rows(end - max(begin, 0))
        return levels

    def split(self, count: int, threads: int) -> tuple[list[tuple[int, int]], int]:
        """How the threads share the work: ((first sample, count) of each group of samples, threads per group).

        Groups are independent, without barriers, but each reads all weights.  Where there are too few samples for that,
        the threads of a group share the weights and meet at barriers, if the steps between are long enough.  Changes no
        sample.
        """
        size = self._tables.pixel_weight_bytes()
        needed = next(samples for limit, samples in SAMPLES_PER_THREAD if size <= limit)
        parts = max(1, min(threads, count // needed))
        team = threads // parts
        pixel_seconds = max(size / CORE_BYTES_PER_SECOND, count / parts * size / 2 / CORE_FLOPS)
        if team > 1 and pixel_seconds < TEAM_STEP_SECONDS * self._tables.barriers:
            parts, team = min(threads, count), 1
        edges = [count * i // parts for i in range(parts + 1)]
        return [(a, b - a) for a, b in zip(edges[:-1], edges[1:], strict=True)], team

    def _workspace(self, batch: Batch, first: int, count: int) -> Tensor:
        """The planes of a group of samples: zeros, but for what is given."""
        space = torch.zeros(count * self._tables.workspace + PANEL)  # programs may read a panel past the last channel
        given = dict(zip(self.plan.conditions, batch.conditions, strict=True))
        for i, plane in enumerate(self.plan.planes):
            if plane.given:
                data = (
                    plane.data[None].expand(count, -1, -1, -1)
                    if plane.data is not None
                    else given[i][first : first + count]
                )
                row = (plane.left + plane.width + plane.right) * count * self._pitches[i]
                strides = (row, count * self._pitches[i], self._pitches[i], 1)
                origin = (self._offsets[i] + plane.left * self._pitches[i]) * count
                size = (plane.height, plane.width, count, plane.channels)
                space.as_strided(size, strides, origin).copy_(data.permute(2, 3, 0, 1))
        return space


class _Tables:
    """The plan as rows of integers, column by column as in csrc/cpu/plan_executor.h."""

    def __init__(self, plan: Plan):
        self.plan = plan
        # The row stage leaves partial sums in the order in which the columns of the step that goes on from them are
        # packed.
        self.partial = {s.init.plane: s for s in plan.steps if s.init is not None}
        self.taps: list[tuple[int, ...]] = []
        self.instrs: list[tuple[int, ...]] = []
        self.constants: list[float] = []
        self.biases: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.buffers = 0
        self.workspace = 0
        self.planes = [self._plane(i) for i in range(len(plan.planes))]
        self.ordered = sorted(plan.steps, key=lambda s: (s.stage, s.rank))  # stable
        barriers = _barriers(self.ordered)
        pixel = [b for s, b in zip(self.ordered, barriers, strict=True) if s.stage == Stage.PIXEL]
        self.barriers = sum(pixel) + 2 * len(plan.draws)  # in a pixel: one before and one after each draw
        self.steps = [self._step(s, b) for s, b in zip(self.ordered, barriers, strict=True)]

    def pixel_weight_bytes(self) -> int:
        return sum(4 * w.numel() for s, w in zip(self.ordered, self.weights, strict=True) if s.stage == Stage.PIXEL)

    def tensors(self) -> dict[str, Tensor]:
        """Everything the native constructor reads; it keeps the weights by pointer and copies the rest."""
        integers: dict[str, list[tuple[int, ...]]] = {
            "planes": self.planes,
            "steps": self.steps,
            "taps": self.taps,
            "instrs": self.instrs,
            "draws": [(d.plane, d.channel, d.count) for d in self.plan.draws],
        }
        columns = {"planes": 10, "steps": 17, "taps": 5, "instrs": 8, "draws": 3}
        return {
            **{k: torch.tensor(v, dtype=torch.int64).view(len(v), columns[k]) for k, v in integers.items()},
            "biases": torch.cat([b.flatten() for b in self.biases] or [torch.zeros(0)]),
            "constants": torch.tensor(self.constants).repeat_interleave(PANEL),
            "encoding": self.plan.head.encoding(),
            "weights": torch.cat([w.flatten() for w in self.weights] or [torch.zeros(0)]),
        }

    def arguments(self, tensors: dict[str, Tensor]) -> dict[str, object]:
        plan = self.plan
        arguments: dict[str, object] = {k: (t.data_ptr(), *t.shape) for k, t in tensors.items() if k != "weights"}
        columns = plan.columns()
        return {
            **arguments,
            "weights": tensors["weights"].data_ptr(),
            "head": type(plan.head).__name__.lower(),
            "row_steps": len(plan.row_steps()),
            "height": plan.image_shape[1],
            "width": plan.image_shape[2],
            "image": plan.image,
            "first_row": plan.first_row,
            "first_column": columns.start,
            "end_column": columns.stop,
            "workspace": self.workspace,
            "buffers": self.buffers,
        }

    def _plane(self, index: int) -> tuple[int, ...]:
        plane = self.plan.planes[index]
        consumer = self.partial.get(index)
        channels = plane.channels if consumer is None else _packed_columns(consumer)
        pitch = channels if channels < PANEL else _round_up(channels)
        offset = self.workspace
        self.workspace += plane.rows * (plane.left + plane.width + plane.right) * pitch
        flags = (int(plane.broadcast), int(plane.kind != "constant"))
        return (channels, pitch, plane.width, plane.height, plane.rows, plane.left, plane.right, offset, *flags)

    def _step(self, step: Step, barrier: bool) -> tuple[int, ...]:
        layout = self.partial.get(step.out, step)  # the step in whose order the columns are packed
        width, groups = (_packed_columns(layout), 1) if layout is not step else (step.width, step.groups)
        weight_offset = sum(w.numel() for w in self.weights)
        bias_offset = sum(b.numel() for b in self.biases) if step.bias is not None else -1
        weight = step.weight if step.weight is not None else torch.zeros(0, layout.groups * layout.width)
        self.weights.append(_pack(weight, layout))
        if step.bias is not None:
            rows = _pack(step.bias[None], layout)
            self.biases.append(rows)
        first_tap, first_instr = len(self.taps), len(self.instrs)
        self.taps += [(t.plane, t.dy, t.dx, t.channel, t.count) for t in step.taps]
        self._program(step.program)
        return (
            *(int(step.stage == Stage.ROW), step.lag_y, step.lag_x, step.rank),
            *(step.out, step.out_channel, width, groups),
            *(first_tap, len(step.taps), first_instr, len(step.program)),
            *(weight_offset, len(weight), bias_offset, -1 if step.init is None else step.init.plane, int(barrier)),
        )

    def _program(self, program: Sequence[Instr]) -> None:
        buffers = _assign_buffers(program)
        self.buffers = max([self.buffers, *(b + 1 for b in buffers)])
        for instr, buffer in zip(program, buffers, strict=True):
            a, b = instr.a, instr.b
            if instr.op == "const":
                a = len(self.constants)
                self.constants.append(instr.value)
            read = NO_READ if instr.read is None else _read(instr.read)
            self.instrs.append((OPS[instr.op], a, b, buffer, *read))


def _read(read: Read) -> tuple[int, int, int, int]:
    return (read.plane, read.dy, read.dx, read.channel)


def _round_up(n: int) -> int:
    return math.ceil(n / PANEL) * PANEL


def _packed_columns(step: Step) -> int:
    return step.groups * _round_up(step.width)


def _pack(weight: Tensor, step: Step) -> Tensor:
    """[K, groups * width] -> [panels * groups, K, PANEL], zeros in the last panel of each group."""
    panels = _round_up(step.width) // PANEL
    if step.groups == 0:
        return torch.zeros(0, len(weight), PANEL)
    columns = weight.view(len(weight), step.groups, step.width)
    columns = torch.nn.functional.pad(columns, (0, panels * PANEL - step.width))
    columns = columns.view(len(weight), step.groups, panels, PANEL)
    return columns.permute(2, 1, 0, 3).reshape(panels * step.groups, len(weight), PANEL).contiguous()


def _assign_buffers(program: Sequence[Instr]) -> list[int]:
    """A scratch tile for each instruction's result; a tile is taken again when its value has been used for the last
    time.
    """
    last_use = list(range(len(program)))
    for i, instr in enumerate(program):
        if instr.op not in ("acc", "load", "const"):
            for operand in (instr.a, instr.b):
                if operand >= 0:
                    last_use[operand] = i
    assigned: list[int] = []
    for i in range(len(program)):
        taken = {assigned[j] for j in range(i) if last_use[j] > i}
        assigned.append(next(b for b in range(i + 1) if b not in taken))
    return assigned


def _barriers(steps: Sequence[Step]) -> list[bool]:
    """Which steps read something written since the last barrier; there is one wherever stage or rank changes."""
    barriers = []
    written: set[int] = set()
    phase = None
    for step in steps:
        if phase != (step.stage, step.rank):
            phase, written = (step.stage, step.rank), set()
        reads = {t.plane for t in step.taps} | {r.plane for r in step.reads()}
        barriers.append(bool(reads & written))
        if barriers[-1]:
            written = set()
        written.add(step.out)
    return barriers
