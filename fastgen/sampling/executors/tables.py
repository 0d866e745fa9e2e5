"""The plan as tables that native executors read: csrc/common/plan_tables.h."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen._memory import empty_in_large_pages, zeros
from fastgen.sampling.executors import Batch
from fastgen.sampling.executors.layouts import Layout, layouts
from fastgen.sampling.executors.winograd import find_filters
from fastgen.sampling.heads import LogisticMixture
from fastgen.sampling.plan import PRIMITIVES, Attention, Plan, Read, Step, StepTap, Store
from fastgen.sampling.precision import LARGEST, powers
from fastgen.sampling.schedule import Stage

PANEL = 16  # columns that are packed together
PACKINGS = ("floats", "bfloat16", "int8")  # enum PlanPacking
OPS = {op: i for i, op in enumerate(("acc", "load", "const", *PRIMITIVES))}  # enum PlanOp
COLUMNS = {
    "planes": 10,
    "addresses": 8,
    "steps": 35,
    "taps": 2,
    "instrs": 6,
    "stores": 2,
    "sources": 1,
    "attentions": 15,
    "spans": 1,
    "draws": 7,
    "encodings": 5,
}


class PlanTables:
    """The plan as rows of integers, column by column as in csrc/common/plan_tables.h; packed weights; memory.

    Rows are filtered with fewer multiplications where that is worthwhile (`winograd`).
    """

    def __init__(self, plan: Plan):
        self.plan = plan
        # The row stage leaves partial sums in the order in which the columns of the step that goes on from them are
        # packed.
        self.partial = {s.init.plane: s for s in plan.steps if s.init is not None}
        self.addresses: list[tuple[int, ...]] = []
        self.taps: list[tuple[int, ...]] = []
        self.instrs: list[tuple[int, ...]] = []
        self.stores: list[tuple[int, ...]] = []
        self.sources: list[tuple[int, ...]] = []
        self.attentions: list[tuple[int, ...]] = []
        self.spans: list[Tensor] = []
        self.attention_floats: list[Tensor] = []
        self.num_spans = self.num_attention_floats = 0
        self.constants: list[float] = []
        self.biases: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.num_biases = self.num_weights = 0
        self.flops = 0
        self.buffers = 0
        self.workspace = 0
        self.shared = 0
        self.layouts = layouts(plan)
        self.planes = [self._plane(i) for i in range(len(plan.planes))]
        self.ordered = sorted(plan.steps, key=lambda s: (s.stage, s.rank))  # stable
        written = _sources(self.ordered)
        pixel = [w for s, w in zip(self.ordered, written, strict=True) if s.stage == Stage.PIXEL]
        # In a pixel; besides those before steps, one before and one after each draw. An estimate: steps of coarser
        # levels run in some pixels only.
        self.barriers = sum(bool(w) for w in pixel) + 2 * len(plan.draws)
        self.steps = [self._step(s, w) for s, w in zip(self.ordered, written, strict=True)]
        weights = zip(self.ordered, self.weights, strict=True)
        self.pixel_weight_bytes = sum(4 * w.numel() for s, w in weights if s.stage == Stage.PIXEL)
        self.pixel_weights = sum(s.macs for s in plan.steps if s.stage == Stage.PIXEL)
        self.row_flops = sum(round(2 * s.all_macs * plan.positions(s)) for s in plan.row_steps())  # of a sample

    def packed_weights(self) -> Tensor:
        """All weights in one piece, 4 bytes each element; they leave the tables."""
        flat = empty_in_large_pages(self.num_weights, torch.int32)
        for part in flat.split([w.numel() for w in self.weights]):
            part.copy_(self.weights.pop(0).flatten().view(torch.int32))
        return flat

    def integers(self) -> dict[str, Tensor]:
        plan = self.plan
        groups = plan.head.groups(plan.image_shape[0])
        tables: dict[str, list[tuple[int, ...]]] = {
            "planes": self.planes,
            "addresses": self.addresses,
            "steps": self.steps,
            "taps": self.taps,
            "instrs": self.instrs,
            "stores": self.stores,
            "sources": self.sources,
            "attentions": self.attentions,
            "draws": [
                (d.plane, d.channel, d.count, g.colours.start, len(g.colours), g.uniforms.start, len(g.uniforms))
                for d, g in zip(plan.draws, groups, strict=True)
            ],
            "encodings": [],
        }
        offset = 0
        for e in plan.encodings:
            tables["encodings"].append((e.plane, e.channel, e.colour, e.table.shape[1], offset))
            offset += e.table.numel()
        integers = {k: torch.tensor(v, dtype=torch.int64).view(len(v), COLUMNS[k]) for k, v in tables.items()}
        spans = torch.cat([s.flatten() for s in self.spans] or [torch.zeros(0)])
        return integers | {"spans": spans.long().view(-1, COLUMNS["spans"])}

    def floats(self) -> dict[str, Tensor]:
        return {
            "biases": torch.cat([b.flatten() for b in self.biases] or [torch.zeros(0)]),
            "constants": torch.tensor(self.constants).repeat_interleave(PANEL),
            "tables": torch.cat([e.table.flatten() for e in self.plan.encodings] or [torch.zeros(0)]),
            "levels": self.plan.head.encoding(),
            "attentions": torch.cat(self.attention_floats or [torch.zeros(0)]),
        }

    def sizes(self) -> dict[str, int]:
        plan = self.plan
        columns = plan.columns()
        return {
            "row_steps": len(plan.row_steps()),
            "colours": plan.image_shape[0],
            "height": plan.image_shape[1],
            "width": plan.image_shape[2],
            "components": plan.head.components if isinstance(plan.head, LogisticMixture) else 0,
            "first_column": columns.start,
            "end_column": columns.stop,
            "workspace": self.workspace,
            "buffers": self.buffers,
        }

    def fill(self, batch: Batch, first: int, count: int) -> Tensor:
        """The planes of samples [first, first + count) of a batch: zeros, but for what is given."""
        first, count = first * batch.streams, count * batch.streams  # rows
        space = zeros(count * self.workspace + PANEL)  # programs may read a panel past the end
        given = dict(zip(self.plan.conditions, batch.conditions, strict=True))
        for i, plane in enumerate(self.plan.planes):
            if i in given:
                self._write(space, i, given[i][first : first + count])
            elif plane.data is not None and self.layouts[i] != Layout.SHARED:
                self._write(space, i, plane.data[None].expand(count, -1, -1, -1))
        return space

    def shared_planes(self) -> Tensor:
        """What the constants have that are kept once."""
        space = torch.zeros(self.shared + PANEL)
        for i, plane in enumerate(self.plan.planes):
            if plane.data is not None and self.layouts[i] == Layout.SHARED:
                self._write(space, i, plane.data[None])
        return space

    def _write(self, space: Tensor, index: int, data: Tensor) -> None:
        """data [samples, channels, height, width] becomes a given plane."""
        plane, count = self.plan.planes[index], len(data)
        offset, pitch = self.planes[index][7], self.planes[index][1]
        row = (plane.left + plane.width + plane.right) * count * pitch
        origin = (offset + plane.left * pitch) * count
        size = (plane.height, plane.width, count, plane.channels)
        there = space.as_strided(size, (row, count * pitch, pitch, 1), origin)
        there.numpy()[...] = data.permute(2, 3, 0, 1).numpy()

    def _plane(self, index: int) -> tuple[int, ...]:
        plane = self.plan.planes[index]
        consumer = self.partial.get(index)
        channels = plane.channels if consumer is None else _packed_columns(consumer)
        pitch = channels if channels < PANEL else _round_up(channels)
        rows, width, layout = plane.rows, plane.left + plane.width + plane.right, self.layouts[index]
        if layout == Layout.MOMENT:
            rows = width = 1
        floats = _round_up(rows * width * pitch)  # planes begin with a cache line
        if layout == Layout.SHARED:
            offset, self.shared = self.shared, self.shared + floats
        else:
            offset, self.workspace = self.workspace, self.workspace + floats
        size = channels, pitch, plane.width, plane.height, plane.rows, plane.left, plane.right
        return (*size, offset, int(plane.broadcast), int(layout))

    def _step(self, step: Step, sources: list[int]) -> tuple[int, ...]:
        plan = self.plan
        out = plan.planes[step.out]
        layout = self.partial.get(step.out, step)  # the step in whose order the columns are packed
        channels, groups = (_packed_columns(layout), 1) if layout is not step else (step.width, step.groups)
        first_address, first_tap, first_source = len(self.addresses), len(self.taps), len(self.sources)
        first_instr, first_store = len(self.instrs), len(self.stores)
        self.sources += [(s,) for s in sources]
        init = -1 if step.init is None else self._address(step, step.init)
        attention = -1 if step.attention is None else self._attention(step, step.attention)
        self._program(step)
        weight_offset, bias_offset = self.num_weights, -1
        equal = layout is step and _equal_columns(step)
        filters = None if equal else find_filters(plan, step)
        if filters is None:
            taps = list(step.taps)
            weight = step.weight if step.weight is not None else torch.zeros(0, layout.groups * layout.width)
            packed, packing = self._pack(weight, step, layout)
            packed = packed[: 1 if equal else None]
            inner = packed.shape[1]
        else:
            taps = filters.taps + filters.rest
            parts = [_pack_columns(w, layout).flatten() for w in (*filters.weights, filters.rest_weight)]
            packed, inner, packing = torch.cat(parts), len(filters.weights[0]), "floats"
        self.taps += [(self._address(step, t), t.count) for t in taps]
        self.weights.append(packed)
        self.num_weights += packed.numel()
        macs = step.all_macs if filters is None else filters.macs
        macs = macs / step.width if equal else macs
        self.flops += round(2 * macs * plan.positions(step))
        if step.bias is not None:
            bias_offset = self.num_biases
            self.biases.append(_pack_columns(step.bias[None], layout))
            self.num_biases += self.biases[-1].numel()
        return (
            *(int(step.stage == Stage.ROW), step.rank, step.lag_y, step.lag_x),
            *(out.height, out.width, *out.stride, *step.period, *step.phase),
            *(channels, groups, first_address, len(self.addresses) - first_address),
            *(first_tap, len(taps), first_instr, len(step.program), first_store, len(step.stores)),
            *(first_source, len(sources), weight_offset, inner),
            *((0, 0) if filters is None else (filters.size, len(filters.taps))),
            *(bias_offset, init),
            *((0, 2) if filters else self._strides(step, first_address)),
            *(attention, int(equal), PACKINGS.index(packing)),
        )

    def _attention(self, step: Step, of: Attention) -> int:
        bias = torch.zeros(0) if of.bias is None else of.bias
        planes = of.keys.plane, of.keys.channel, of.values.plane, of.values.channel
        sizes = of.heads, of.depth, of.width
        places = self.num_spans, self.num_attention_floats, len(bias)
        of_keys = (-1, 0, 0) if of.of_keys is None else (of.of_keys.plane, of.of_keys.channel, int(of.each_query))
        self.attentions.append((self._address(step, of.query), *planes, *sizes, *places, int(of.softmax), *of_keys))
        self.spans.append(of.spans)
        self.num_spans += of.spans.numel()
        self.attention_floats.append(torch.cat([torch.tensor([of.scale, of.cap]), bias.flatten()]))
        self.num_attention_floats += len(self.attention_floats[-1])
        return len(self.attentions) - 1

    def _strides(self, step: Step, first_address: int) -> tuple[int, int]:
        """(uniform, cycle) of a row step."""
        cycle, uniform = step.period[1], step.period[1] == 1
        for plane, _, _, _, _, _, num, den in self.addresses[first_address:]:
            cycle = math.lcm(cycle, den)
            per_sample = self.plan.planes[plane].broadcast and self.plan.planes[plane].kind != "constant"
            uniform = uniform and num == den == 1 and not per_sample
        return int(uniform), cycle

    def _address(self, step: Step, read: Read | StepTap | Store) -> int:
        if isinstance(read, Store):
            read = Read(read.plane, 0, 0, read.channel)
        ratios = [self.plan.ratio(step, read.plane, axis) for axis in (0, 1)]
        self.addresses.append((read.plane, read.channel, read.dy, *ratios[0], read.dx, *ratios[1]))
        return len(self.addresses) - 1

    def _program(self, step: Step) -> None:
        buffers = _assign_buffers(step)
        self.buffers = max([self.buffers, *(b + 1 for b in buffers)])
        in_place: dict[int, int] = {}
        for i, store in enumerate(step.stores):
            in_place.setdefault(store.register, i)
            self.stores.append((self._address(step, store), store.register))
        for i, (instr, buffer) in enumerate(zip(step.program, buffers, strict=True)):
            a, address = instr.a, -1
            if instr.op == "const":
                a = len(self.constants)
                self.constants.append(instr.value)
            if instr.read is not None:
                address = self._address(step, instr.read)
            self.instrs.append((OPS[instr.op], a, instr.b, buffer, address, in_place.get(i, -1)))

    def _pack(self, weight: Tensor, step: Step, layout: Step) -> tuple[Tensor, str]:
        """[K, groups * width] -> [panels * groups, rows, PANEL] of 4 bytes, and what they are.

        Of integers bytes are packed for pixel steps alone: for a row's products it is multiplications that take long.
        """
        columns, counts, precision = _pack_columns(weight, layout), [t.count for t in step.taps], self.plan.precision
        if precision == "fp32":
            return columns, "floats"
        in_bytes = None
        if precision == "int8" and step.stage == Stage.PIXEL:
            in_bytes = _in_bytes(columns, counts)
        return (_pair_rows(columns, counts), "bfloat16") if in_bytes is None else (in_bytes, "int8")


def _equal_columns(step: Step) -> bool:
    """Whether a product has the same value for all channels, as a sum over channels does."""
    if step.weight is None or step.groups != 1 or step.width <= PANEL or step.init is not None:
        return False
    return bool((step.weight == step.weight[:, :1]).all()) and (step.bias is None or not step.bias.any())


def _round_up(n: int) -> int:
    return math.ceil(n / PANEL) * PANEL


def _packed_columns(step: Step) -> int:
    return step.groups * _round_up(step.width)


def _pack_columns(weight: Tensor, step: Step) -> Tensor:
    """[K, groups * width] -> [panels * groups, K, PANEL], zeros in the last panel of each group."""
    panels = _round_up(step.width) // PANEL
    if step.groups == 0:
        return torch.zeros(0, len(weight), PANEL)
    columns = weight.view(len(weight), step.groups, step.width)
    columns = torch.nn.functional.pad(columns, (0, panels * PANEL - step.width))
    columns = columns.view(len(weight), step.groups, panels, PANEL)
    return columns.permute(2, 1, 0, 3).reshape(panels * step.groups, len(weight), PANEL).contiguous()


def _pair_rows(packed: Tensor, counts: Sequence[int]) -> Tensor:
    """float32 [panels, K, PANEL] -> int32 [panels, words, PANEL]: two consecutive rows of a tap, rounded to bfloat16,
    in one word, the first in its low half; csrc/cpu/tap_gemm.h.
    """
    if not packed.numel():
        return torch.zeros(len(packed), 0, PANEL, dtype=torch.int32)
    taps = [torch.nn.functional.pad(tap, (0, 0, 0, tap.shape[1] % 2)) for tap in packed.split(list(counts), dim=1)]
    rows = torch.cat(taps, dim=1)
    pairs = rows.bfloat16().view(len(rows), rows.shape[1] // 2, 2, PANEL).permute(0, 1, 3, 2).contiguous()
    return pairs.view(torch.int32).squeeze(-1)


def _in_bytes(packed: Tensor, counts: Sequence[int]) -> Tensor | None:
    """float32 [panels, K, PANEL] -> int32 [panels, rows, PANEL], where each column of a tap is integers of a byte times
    a power of two: of each tap the powers and the bytes, row by row, up to a multiple of 64 bytes;
    csrc/cpu/tap_gemm.h.
    """
    if not packed.numel():
        return None
    parts = []
    for tap in packed.split(list(counts), dim=1):
        power = powers(tap.abs().amax(dim=1, keepdim=True))
        integers = tap / power
        if not torch.equal(integers, integers.round()) or integers.abs().max() > LARGEST:
            return None
        parts += [power.view(torch.uint8).flatten(1), integers.to(torch.int8).flatten(1).view(torch.uint8)]
    rows = torch.cat(parts, 1)
    rows = torch.nn.functional.pad(rows, (0, -rows.shape[1] % (4 * PANEL)))
    return rows.view(torch.int32).view(len(packed), -1, PANEL)


def _assign_buffers(step: Step) -> list[int]:
    """A scratch tile for each instruction's result; a tile is taken again when its value has been used for the last
    time.
    """
    program = step.program
    last_use = list(range(len(program)))
    for i, instr in enumerate(program):
        for operand in instr.operands:
            last_use[operand] = i
    for store in step.stores:
        last_use[store.register] = len(program)
    assigned: list[int] = []
    for i in range(len(program)):
        taken = {assigned[j] for j in range(i) if last_use[j] > i}
        assigned.append(next(b for b in range(i + 1) if b not in taken))
    return assigned


def _sources(steps: Sequence[Step]) -> list[list[int]]:
    """For each step the earlier ones of its stage and rank that write what it reads."""
    sources = []
    writers: dict[int, list[int]] = {}
    phase = None
    for i, step in enumerate(steps):
        if phase != (step.stage, step.rank):
            phase, writers = (step.stage, step.rank), {}
        reads = {read.plane for read, _ in step.all_reads()}
        sources.append(sorted({w for plane in reads for w in writers.get(plane, [])}))
        for store in step.stores:
            writers.setdefault(store.plane, []).append(i)
    return sources
