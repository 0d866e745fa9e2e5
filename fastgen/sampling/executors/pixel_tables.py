"""The pixel stage of a plan as the tables of csrc/cuda/pixel_stage.h, column by column as there."""

from __future__ import annotations

import torch
from torch import Tensor

from fastgen.sampling.executors.operands import Operands
from fastgen.sampling.executors.tables import OPS
from fastgen.sampling.executors.triton import Pattern
from fastgen.sampling.heads import LogisticMixture
from fastgen.sampling.plan import Plan, Step

HEADS = ("categorical", "bernoulli", "logisticmixture")  # enum PlanHead
DEPTH, COLUMNS = 16, 16  # kPixelDepth, kPixelColumns
DRAW = 0x8000  # kPixelDraw
_ALIGNED = 4  # channels that are read at once


class PixelTables:
    """Built upon the operands that the kernels of kernels/sample_plan.py have for the same plan.

    Raises:
        RuntimeError: the plan has attention among its pixel steps, or more steps, columns or groups than the tables
            can tell.
    """

    def __init__(self, plan: Plan, operands: Operands):
        self.plan, self._operands = plan, operands
        self._steps = [s for rank, _ in enumerate(plan.draws) for s in plan.pixel_steps(rank)]
        self._index = {id(step): i for i, step in enumerate(self._steps)}
        if any(step.attention for step in self._steps):
            raise RuntimeError("the cuda executor has no attention: backend='triton' has")
        most = max((max(s.groups, len(s.program), len(s.reads()), len(s.stores)) for s in self._steps), default=0)
        if len(self._steps) >= DRAW or plan.columns().stop >= DRAW or most > 100 or self._groups() > COLUMNS:
            raise RuntimeError("the plan has too many steps, columns, groups or instructions for the cuda executor")
        self._blocks: list[tuple[int, ...]] = []
        self._instrs: list[tuple[int, ...]] = []
        self._stores: list[tuple[int, ...]] = []
        self._num_biases = self._num_weights = 0
        no_bias = torch.zeros(max((s.groups * s.width for s in self._steps), default=0) + 1)
        self._biases = [no_bias]
        self._weights: list[Tensor] = []
        self._num_biases = no_bias.numel()
        self.rows = [self._step(step) for step in self._steps]
        first, count = operands.encodings
        colours, height, width = plan.image_shape
        head = plan.head
        self.sizes = {
            "first_operand": operands.of_pixels,
            "num_operands": len(operands.fields),
            "num_steps": len(self.rows),
            "num_instrs": len(self._instrs),
            "num_stores": len(self._stores),
            "registers": max((len(s.program) for s in self._steps), default=0),
            "first_encoding": first,
            "num_encodings": count,
            "colours": colours,
            "height": height,
            "width": width,
            "num_levels": head.levels,
            "components": head.components if isinstance(head, LogisticMixture) else 0,
            "bfloat16": int(plan.precision != "fp32"),
            "head": HEADS.index(type(head).__name__.lower()),
        }

    def tensors(self) -> dict[str, Tensor]:
        """All tables by their names; they can be made once, for the weights leave this object."""
        plan, integers = self.plan, self._operands.integers
        groups = zip(plan.draws, plan.head.groups(plan.image_shape[0]), self._operands.draws, strict=True)
        draws: list[tuple[int, ...]] = [
            (operand, d.count, g.colours.start, len(g.colours), g.uniforms.start, len(g.uniforms))
            for d, g, operand in groups
        ]
        dtype = torch.float32 if plan.precision == "fp32" else torch.bfloat16
        weights = torch.cat([w.flatten().to(dtype) for w in self._weights] or [torch.zeros(1, dtype=dtype)])
        self._weights.clear()
        return {
            "operands": integers(self._operands.fields, torch.int32),
            "steps": integers(self.rows, torch.int32),
            "blocks": integers(self._blocks or [(0, 0, 0, 0)], torch.int32),
            "instrs": integers(self._instrs, torch.uint8),
            "stores": integers(self._stores, torch.int16),
            "draws": integers(draws, torch.int32),
            "weights": weights,
            "biases": torch.cat(self._biases),
            "constants": torch.tensor(self._operands.constants or [0.0]),
            "encoded": torch.cat(
                [e.table.detach().flatten().float().cpu() for e in plan.encodings] or [torch.zeros(1)]
            ),
            "values": plan.head.encoding().float(),
        }

    def actions(self, pattern: Pattern) -> Tensor:
        """int32 [actions, 2]: what the pixel stage does in image rows with these steps."""
        plan, (_, steps, drawn) = self.plan, pattern
        actions: list[list[int]] = []  # column, what, waits, fetches
        written: set[int] = set()  # planes, since the cluster has waited

        def add(column: int, what: int, reads: set[int], writes: set[int]) -> None:
            waits = bool(reads & written)
            if waits:
                written.clear()
            written.update(writes)
            actions.append([column, what, int(waits), DRAW])

        for x in plan.columns():
            for rank, draw in enumerate(plan.draws):
                for step in steps:
                    column = plan.position(step, 1, x) if step.rank == rank else None
                    if column is not None:
                        reads = {read.plane for read, _ in step.reads_here()}
                        add(column, self._index[id(step)], reads, {store.plane for store in step.stores})
                if drawn and 0 <= x < plan.image_shape[2]:
                    add(x, DRAW + rank, {draw.plane}, {e.plane for e in plan.encodings})
        last = None
        for action in reversed(actions):
            what = action[1]
            if what < DRAW and self.rows[what][9] > 0:  # it has a product
                action[3] = DRAW if last is None else last
                last = what
        rows = [(column << 16 | what, waits << 16 | fetches) for column, what, waits, fetches in actions]
        return torch.tensor(rows, dtype=torch.int64).to(torch.int32).view(-1, 2)

    def _groups(self) -> int:
        return max((step.groups for step in self._steps), default=0)

    def _step(self, step: Step) -> tuple[int, ...]:
        launch = self._operands.launches[id(step)]
        per_tile = COLUMNS // max(1, step.groups)
        first_block, first_instr, first_store = len(self._blocks), len(self._instrs), len(self._stores)
        loads = 0
        for op, a, b, operand in launch.program:
            self._instrs.append((OPS[op], loads if op == "load" else a, b, operand))
            loads += op == "load"
        self._stores += launch.stores
        for i, tap in enumerate(step.taps):
            for channel in range(0, tap.count, DEPTH):
                count = min(DEPTH, tap.count - channel)
                fast = count == DEPTH and tap.channel % _ALIGNED == 0
                self._blocks.append((launch.first + i, channel, count, int(fast)))
        bias, weight = 0, self._num_weights
        if step.bias is not None:
            bias = self._num_biases
            self._biases.append(step.bias.detach().flatten())
            self._num_biases += step.bias.numel()
        if step.weight is not None and step.taps:
            packed = _packed(step, per_tile)
            self._weights.append(packed)
            self._num_weights += packed.shape[0] * packed.shape[1]
        return (
            step.width, step.groups, per_tile, launch.operand, launch.init, bias, launch.constant, weight,
            first_block, len(self._blocks) - first_block, first_instr, len(launch.program), first_store,
            len(launch.stores),
        )  # fmt: skip


def _packed(step: Step, per_tile: int) -> Tensor:
    """The weight as [tiles, blocks, lanes, 2, 4], see PixelStage::weights."""
    assert step.weight is not None
    weight = step.weight.detach()
    taps = weight.split([tap.count for tap in step.taps])
    rows = torch.cat([torch.nn.functional.pad(tap, (0, 0, 0, -len(tap) % DEPTH)) for tap in taps])
    rows = rows.unflatten(1, (step.groups, step.width))
    rows = torch.nn.functional.pad(rows, (0, -step.width % per_tile)).unflatten(2, (-1, per_tile))
    rows = rows.transpose(1, 2).flatten(2)  # [K, tiles, groups * per_tile]
    rows = torch.nn.functional.pad(rows, (0, COLUMNS - rows.shape[2]))
    rows = rows.view(-1, 4, 4, rows.shape[1], 2, 8)  # block, t, row of t, tile, half, column
    return rows.permute(3, 0, 5, 1, 4, 2).flatten(2, 3)
