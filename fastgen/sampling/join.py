"""Last part of pass 4: steps without a product are done by the step that computes what they read.

A residual sum and its activation, say, are one product with three results: the sum and both halves of its concatenated
ELU.  Each step less is a barrier less and a pass over memory less.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from fastgen.sampling.plan import Draw, Encoding, Instr, Plan, Plane, Read, Step, StepTap, Store

_Address = TypeVar("_Address", Read, StepTap, Store, Draw, Encoding)


def join_steps(plan: Plan) -> None:
    """Join steps, and drop the stores that nobody reads any more and the planes that nobody stores to."""
    kept: list[_Joined] = []
    for step in sorted(plan.steps, key=lambda s: (s.stage, s.rank)):  # stable: the order in which they run
        if step.groups or not _join_earlier(plan, kept, step):
            kept.append(_Joined(step))
    plan.steps = [joined.finished() for joined in kept]
    _drop_unread(plan)
    _drop_unread_channels(plan)


class _Joined:
    """A step, and those that were appended to it. There may be thousands, as where each channel has a program."""

    def __init__(self, step: Step):
        self.step = step
        self.program: dict[Instr, int] = {}  # equal instructions are one
        self.stores: list[Store] = []
        self.planes: set[int] = set()
        self._holds: dict[Read, int] = {}  # the register with what an instruction would load in place
        self.append(step)

    def holds(self, read: Read) -> bool:
        return read in self._holds

    def append(self, step: Step) -> None:
        place: list[int] = []  # register of each instruction of the step
        for instr in step.program:
            if instr.read is not None and instr.read in self._holds:
                place.append(self._holds[instr.read])
                continue
            if instr.operands:
                instr = replace(instr, a=place[instr.a], b=place[instr.b] if instr.b >= 0 else -1)
            place.append(self.program.setdefault(instr, len(self.program)))
        for store in (replace(s, register=place[s.register]) for s in step.stores):
            self.stores.append(store)
            self.planes.add(store.plane)
            self._holds.setdefault(Read(store.plane, 0, 0, store.channel), store.register)

    def finished(self) -> Step:
        self.step.program, self.step.stores = tuple(self.program), tuple(self.stores)
        return self.step


def _join_earlier(plan: Plan, earlier: list[_Joined], step: Step) -> bool:
    """Append a step to the one that computes an operand of it, if all its other operands are there by then."""
    reads = [i.read for i in step.program if i.read is not None]
    operands = {read.plane for read in reads}
    for candidate in reversed(earlier):
        if (candidate.step.stage, candidate.step.rank) != (step.stage, step.rank):
            return False
        shared = operands & candidate.planes
        if not shared:
            continue
        in_place = all(candidate.holds(read) for read in reads if read.plane in shared)
        if not in_place or not _same_positions(plan, candidate.step, step):
            return False
        candidate.append(step)
        return True
    return False


def _same_positions(plan: Plan, a: Step, b: Step) -> bool:
    def frame(step: Step) -> tuple[object, ...]:
        out = plan.planes[step.out]
        return out.height, out.width, out.stride, step.period, step.phase, step.lag_y, step.lag_x, step.width

    return frame(a) == frame(b)


def _drop_unread(plan: Plan) -> None:
    while True:
        read = _read_channels(plan)
        dropped = False
        for step in plan.steps:
            stores = [s for s in step.stores if any((s.plane, s.channel + c) in read for c in range(step.width))]
            dropped |= len(stores) < len(step.stores)
            step.stores = tuple(stores)
        plan.steps = [s for s in plan.steps if s.stores]
        if not dropped:
            break
    for step in plan.steps:
        _share_exponentials(step)
        _drop_unused_instructions(step)


def _read_channels(plan: Plan) -> set[tuple[int, int]]:
    """(plane, channel) of all that draws and steps read."""
    read = {(d.plane, d.channel + c) for d in plan.draws for c in range(d.count)}
    for step in plan.steps:
        read |= {(r.plane, r.channel + c) for r, count in step.all_reads() for c in range(count)}
    return read


def _drop_unread_channels(plan: Plan) -> None:
    """Close the gaps that dropped stores left in planes, and drop planes without a channel."""
    used = _read_channels(plan)
    for step in plan.steps:
        used |= {(s.plane, s.channel + c) for s in step.stores for c in range(step.width)}
    planes: list[Plane] = []
    index: dict[int, int] = {}
    channel: dict[tuple[int, int], int] = {}
    for i, plane in enumerate(plan.planes):
        kept = [c for c in range(plane.channels) if plane.kind != "cache" or (i, c) in used]
        if kept:
            index[i] = len(planes)
            channel.update({(i, old): new for new, old in enumerate(kept)})
            planes.append(replace(plane, channels=len(kept)))

    def moved(at: _Address) -> _Address:
        return replace(at, plane=index[at.plane], channel=channel[at.plane, at.channel])

    for step in plan.steps:
        step.taps = tuple(moved(t) for t in step.taps)
        step.init = step.init and moved(step.init)
        if step.attention:
            of = step.attention
            of = replace(of, query=moved(of.query), keys=moved(of.keys), values=moved(of.values))
            step.attention = replace(of, of_keys=of.of_keys and moved(of.of_keys))
        step.program = tuple(replace(i, read=i.read and moved(i.read)) for i in step.program)
        step.stores = tuple(moved(s) for s in step.stores)
    plan.planes = planes
    plan.draws = [moved(d) for d in plan.draws]
    plan.encodings = [moved(e) for e in plan.encodings]
    plan.conditions = [index[c] for c in plan.conditions]


def _share_exponentials(step: Step) -> None:
    """elu(x) and elu(-x), the halves of a concatenated ELU, need one exponential: each is exp(-|x|) - 1 where it is
    not positive.
    """
    elus = {i.a for i in step.program if i.op == "elu"}
    pairs = {i.a: r for r, i in enumerate(step.program) if i.op == "neg" and {r, i.a} <= elus}  # x -> -x
    root = {x: x for x in pairs} | {minus_x: x for x, minus_x in pairs.items()}
    program: list[Instr] = []
    place: list[int] = []
    tails: dict[int, int] = {}
    for instr in step.program:
        if instr.op == "elu" and instr.a in root:
            x = place[root[instr.a]]
            if x not in tails:
                tails[x] = len(program)
                program.append(Instr("expm1_of_minus_abs", x))
            instr = Instr("positive_or", place[instr.a], tails[x])
        elif instr.operands:
            instr = replace(instr, a=place[instr.a], b=place[instr.b] if instr.b >= 0 else -1)
        place.append(len(program))
        program.append(instr)
    step.program = tuple(program)
    step.stores = tuple(replace(s, register=place[s.register]) for s in step.stores)


def _drop_unused_instructions(step: Step) -> None:
    used = {s.register for s in step.stores}
    for register in reversed(range(len(step.program))):
        if register in used:
            used.update(step.program[register].operands)
    number = {old: new for new, old in enumerate(sorted(used))}

    def renumbered(instr: Instr) -> Instr:
        return replace(instr, a=number[instr.a], b=number.get(instr.b, -1)) if instr.operands else instr

    step.program = tuple(renumbered(step.program[r]) for r in sorted(used))
    step.stores = tuple(replace(s, register=number[s.register]) for s in step.stores)
