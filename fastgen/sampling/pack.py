"""Second half of pass 4, pack: stored planes become steps.

The channels of a stored plane are cut into runs that are computed alike: same time, same program, contiguous sources.
A run becomes one step.  The taps of a pixel step that read finished rows alone are hoisted: a row step sums them for
the whole row into a partial plane, from which the pixel step starts.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastgen.sampling.arrange import arrange
from fastgen.sampling.fuse import crop, merge_sums, roots, settle_output, share, trim
from fastgen.sampling.graph import (
    Attention,
    Condition,
    Constant,
    Embedding,
    Graph,
    Image,
    Linear,
    NotCausal,
    Pointwise,
    Ref,
)
from fastgen.sampling.heads import Group, Head
from fastgen.sampling.join import join_steps
from fastgen.sampling.plan import Attention as Attend
from fastgen.sampling.plan import Draw, Encoding, Instr, Plan, Plane, Read, Step, StepTap, Store
from fastgen.sampling.schedule import Part, Schedule, Stage, schedule
from fastgen.sampling.spread import spread


def compile_graph(graph: Graph, head: Head) -> tuple[Plan, list[Tensor]]:
    """Schedule and pack a traced graph, which is changed.

    Returns:
        the plan, and the traced tensors whose values for the labels at hand are its conditions.

    Raises:
        NotCausal: see `schedule`.
        ValueError: the number of output channels does not fit the head.
    """
    colours = graph.image.channels
    assert graph.output is not None
    needed = head.num_params(colours)
    if len(graph.output.plane) != needed:
        raise ValueError(
            f"the network gives {len(graph.output.plane)} output channels; {head} needs {needed} for "
            f"{colours}-channel images"
        )
    groups = head.groups(colours)
    try:
        schedule(graph, groups)  # on the graph as traced: errors name the user's modules
    except NotCausal as error:
        raise NotCausal(f"{error}{_order_that_is_causal(graph, groups)}{_next_token(graph)}") from None
    trim(graph)
    arrange(graph)
    spread(graph)
    share(graph)
    crop(graph)
    settle_output(graph)
    merge_sums(graph)
    packer = _Packer(graph, schedule(graph, groups), head)
    return packer.plan(), packer.conditions


def _order_that_is_causal(graph: Graph, groups: list[Group]) -> str:
    """What to say of a network whose output would be causal with levels and colours the other way round."""
    colours, levels = len(groups), len(groups[0].params)
    output = graph.output
    assert output is not None
    if colours == 1 or levels == 1 or any(len(g.params) != levels for g in groups):
        return ""
    index = np.arange(colours * levels)
    for order, what in (
        (index.reshape(levels, colours).T, f"levels before colours: return y.unflatten(1, ({levels}, {colours}))"),
        (index.reshape(colours, levels).T, "colours before levels: return y.flatten(1, 2)"),
    ):
        graph.output = output.take(order.flatten())
        with contextlib.suppress(NotCausal):
            schedule(graph, groups)
            return f". The output y would be causal with its channels read as {what}"
    return ""


def _next_token(graph: Graph) -> str:
    """What to say of a transformer whose logits may be those of the token behind."""
    if not any(isinstance(node, Attention) for node in graph.nodes):
        return ""
    return ". A language model, whose logits are of the next token, is wrapped: fastgen.sampling.NextToken"


class _Packer:
    def __init__(self, graph: Graph, times: Schedule, head: Head):
        self.graph, self.times, self.head = graph, times, head
        self.root = roots(graph)
        self.planes: list[Plane] = []
        self.index: dict[int, int] = {}  # node -> plane
        self.steps: list[Step] = []
        self.conditions: list[Tensor] = []

    def plan(self) -> Plan:
        kinds = {Image: "image", Embedding: "image", Constant: "constant", Condition: "condition"}
        encodings = []
        condition_planes = []
        stored = [n for n in self.graph.nodes if self.root[n.id] == n.id]
        for node in stored:
            kind = kinds.get(type(node), "cache")
            data = node.data if isinstance(node, Constant) else None
            plane = Plane(node.name, kind, node.channels, node.height, node.width, data, node.stride)
            index = self.index[node.id] = self._add_plane(plane)
            if isinstance(node, Image):
                table = self.head.encoding().view(-1, 1)
                encodings += [Encoding(index, c, c, table) for c in range(node.channels)]
            elif isinstance(node, Embedding):
                if len(node.table) < self.head.levels:
                    raise ValueError(
                        f"module {node.name!r} embeds {len(node.table)} levels; {self.head} has {self.head.levels}"
                    )
                encodings.append(Encoding(index, 0, node.colour, node.table[: self.head.levels]))
            elif isinstance(node, Condition):
                condition_planes.append(index)
                self.conditions.append(node.tensor)
        for node in stored:  # now that all planes are there: recurrent layers read later ones
            for part in self.times.parts[node.id] if type(node) not in kinds else ():
                for start, stop in self._runs(node.id, part):
                    self._add_steps(node.id, part, start, stop)
        image = self.graph.image
        output = self.graph.output
        assert output is not None
        params = self.index[int(output.plane[0])]
        draws = [Draw(params, g.params.start, len(g.params)) for g in self.head.groups(image.channels)]
        shape = (image.channels, image.height, image.width)
        plan = Plan(shape, self.head, self.planes, self.steps, draws, encodings, condition_planes)
        join_steps(plan)
        size_planes(plan)
        return plan

    def _add_plane(self, plane: Plane) -> int:
        self.planes.append(plane)
        return len(self.planes) - 1

    # Runs.

    def _runs(self, node: int, part: Part) -> list[tuple[int, int]]:
        """Ranges of channels of a stored plane that one step can compute."""
        slots = self.times.slots(part)
        cuts = (np.diff(slots, axis=0) != 0).any(1) | self._breaks(node, np.arange(len(slots)))
        edges = [0, *(np.flatnonzero(cuts) + 1).tolist(), len(slots)]
        return list(zip(edges[:-1], edges[1:], strict=True))

    def _breaks(self, node: int, channels: np.ndarray) -> np.ndarray:
        """Where the sources of consecutive channels of a node, followed into what is evaluated inside it, do not
        continue.
        """
        cuts = np.zeros(len(channels) - 1, dtype=bool)
        here = self.graph.nodes[node]
        if not isinstance(here, Pointwise):
            return cuts
        for ref in here.sources():
            part = ref.take(channels)
            cuts |= part.breaks()
            for plane in np.unique(part.plane[part.plane >= 0]):
                if self.root[plane] != plane:
                    at = np.flatnonzero(part.plane == plane)
                    inner = self._breaks(int(plane), part.channel[at])
                    adjacent = np.diff(at) == 1
                    cuts[at[:-1][adjacent]] |= inner[adjacent]
        return cuts

    # Steps.

    def _add_steps(self, node: int, part: Part, start: int, stop: int) -> None:
        stage, lag_y, lag_x, rank = (int(v) for v in self.times.slots(part)[start])
        program = _Program(self, node, start, stop)
        step = Step(
            name=self.graph.nodes[node].name,
            stage=Stage(stage),
            lag_y=lag_y,
            lag_x=lag_x,
            rank=rank,
            width=stop - start,
            program=tuple(program.instrs),
            stores=(Store(self.index[node], start, len(program.instrs) - 1),),
        )
        if program.attention is not None:
            step.attention = self._attention(program.attention)
            step.groups, step.name = 1, program.attention.name
        if program.product is not None:
            if part.phase is not None:
                step.period, step.phase = program.product.period, part.phase
            self._add_product(step, program.product, program.columns())
        self.steps.append(step)

    def _add_product(self, step: Step, node: Linear, columns: np.ndarray) -> None:
        """Give the step its taps, and split off the part that the row stage can do."""
        step.groups = len(columns) // step.width
        step.name = node.name
        bias = torch.zeros(len(columns)) if node.bias is None else node.bias[columns]
        finished: list[tuple[StepTap, Tensor]] = []
        current: list[tuple[StepTap, Tensor]] = []
        for tap, ref in node.taps_at(step.phase):
            weight = tap.weight[:, columns]
            open_rows = weight.any(1).numpy()
            # What lies outside for most columns is not multiplied there pixel by pixel, as it is row by row.
            columns_inside = self.planes[step.out].width - abs(tap.dx)
            ready = self._finished(ref, step) & (2 * columns_inside >= self.planes[step.out].width)
            for part, chosen in ((finished, ready & open_rows), (current, ~ready & open_rows)):
                for a, b in _ranges(chosen):
                    read = StepTap(self.index[tap.plane], tap.dy, tap.dx, tap.channel + a, b - a)
                    part.append((read, weight[a:b]))
        if step.stage == Stage.PIXEL and finished:
            step.init = Read(self._add_partial(step, finished, bias), 0, 0, 0)
        else:
            step.bias = bias
        if step.stage == Stage.ROW:
            current = finished + current
        _set_taps(step, current)

    def _attention(self, node: Attention) -> Attend:
        sources = [r if len(r.plane) else node.values for r in node.sources()]
        query, keys, values, of_keys = (Read(self.index[int(r.plane[0])], 0, 0, int(r.channel[0])) for r in sources)
        depth, width = len(node.query.plane) // node.heads, node.channels // node.heads
        added = of_keys if len(node.of_keys.plane) else None, len(node.of_keys.plane) > 1
        seen = node.spans, node.bias, *added, node.cap, node.softmax
        return Attend(node.heads, depth, width, node.scale, query, keys, values, *seen)

    def _finished(self, ref: Ref, step: Step) -> np.ndarray:
        """Which channels of a tap's source are finished when the row of a pixel step begins."""
        if self.graph.nodes[ref.plane[0]].given:
            return np.ones(len(ref.plane), dtype=bool)
        return self.times.source_rows(ref) < step.lag_y

    def _add_partial(self, step: Step, taps: list[tuple[StepTap, torch.Tensor]], bias: torch.Tensor) -> int:
        out = self.planes[step.out]
        plane = self._add_plane(Plane(step.name, "cache", len(bias), out.height, out.width, stride=out.stride))
        row_step = replace(
            step,
            stage=Stage.ROW,
            lag_x=0,
            rank=0,
            width=len(bias),
            groups=1,
            program=(Instr("acc", 0),),
            stores=(Store(plane, 0, 0),),
            bias=bias,
        )
        _set_taps(row_step, taps)
        self.steps.append(row_step)
        return plane


def _ranges(chosen: np.ndarray) -> list[tuple[int, int]]:
    """Maximal ranges of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _set_taps(step: Step, taps: list[tuple[StepTap, torch.Tensor]]) -> None:
    step.taps = tuple(tap for tap, _ in taps)
    columns = step.groups * step.width
    step.weight = torch.cat([w for _, w in taps]).contiguous() if taps else torch.zeros(0, columns)


class _Program:
    """The elementwise program of channels [start, stop) of a stored plane, and the product that it starts from."""

    def __init__(self, packer: _Packer, node: int, start: int, stop: int):
        self.packer = packer
        self.width = stop - start
        self.product: Linear | None = None
        self.attention: Attention | None = None
        self.instrs: list[Instr] = []
        self._groups: list[int] = []  # first column of each group
        self._done: dict[object, int] = {}
        self._evaluate(node, start)

    def columns(self) -> np.ndarray:
        """Columns of the product's weight, group by group."""
        return np.concatenate([np.arange(c, c + self.width) for c in self._groups])

    def _emit(self, instr: Instr) -> int:
        if instr not in self._done:
            self._done[instr] = len(self.instrs)
            self.instrs.append(instr)
        return self._done[instr]

    def _evaluate(self, plane: int, channel: int) -> int:
        """Register with channels [channel, channel + width) of a plane that is evaluated here."""
        node = self.packer.graph.nodes[plane]
        if isinstance(node, Linear):
            self.product = node
            if channel not in self._groups:
                self._groups.append(channel)
            return self._emit(Instr("acc", self._groups.index(channel)))
        if isinstance(node, Attention):
            self.attention = node
            return self._emit(Instr("acc", 0))
        assert isinstance(node, Pointwise)
        registers = [self._operand(o, channel) for o in node.operands]
        return self._emit(Instr(node.op, registers[0], registers[1] if len(registers) > 1 else -1))

    def _operand(self, operand: Ref | float, channel: int) -> int:
        if not isinstance(operand, Ref):
            return self._emit(Instr("const", value=operand))
        plane, first = int(operand.plane[channel]), int(operand.channel[channel])
        if plane < 0:
            return self._emit(Instr("const", value=0.0))
        if self.packer.root[plane] != plane:
            return self._evaluate(plane, first)
        read = Read(self.packer.index[plane], int(operand.dy[channel]), int(operand.dx[channel]), first)
        return self._emit(Instr("load", read=read))


def size_planes(plan: Plan) -> None:
    """How many rows of each plane are needed at a time, and how far readers look over its sides."""
    newest = dict.fromkeys((e.plane for e in plan.encodings), 0)  # image row of the last row written at time y = 0
    for step in plan.steps:
        for store in step.stores:
            newest[store.plane] = max(newest.get(store.plane, -step.lag_y), -step.lag_y)
    for plane in plan.planes:
        plane.rows = plane.height if plane.given else 1
    over: dict[int, tuple[int, int]] = {}  # how far readers look over top and bottom of given planes
    for step in plan.steps:
        out = plan.planes[step.out]
        for index, dy, dx in ((r.plane, r.dy, r.dx) for r, _ in step.reads_here()):
            plane = plan.planes[index]
            if plane.broadcast:
                continue
            plane.left = max(plane.left, -plan.source(step, index, 1, 0, dx))
            plane.right = max(plane.right, plan.source(step, index, 1, out.width - 1, dx) - plane.width + 1)
            if plane.given:
                top, bottom = over.get(index, (0, 0))
                over[index] = (max(top, -dy), max(bottom, out.height + dy - plane.height))
                plane.rows = plane.height + sum(over[index])
            else:
                coarser = plane.stride[0] - min(plane.stride[0], out.stride[0])  # rows may begin this far above
                oldest = min(plane.stride[0], out.stride[0]) * dy - coarser - step.lag_y
                plane.rows = max(plane.rows, (newest[index] - oldest) // plane.stride[0] + 1)
        for read, _ in step.attention.reads()[1:] if step.attention else ():
            plan.planes[read.plane].rows = max(plan.planes[read.plane].rows, plan.planes[read.plane].height)
    for draw in plan.draws:  # of parameters that may have been computed some rows ahead
        plan.planes[draw.plane].rows = max(plan.planes[draw.plane].rows, newest[draw.plane] + 1)
