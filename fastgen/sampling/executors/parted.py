"""Queries, keys and values of one product as planes of their own.

Attention reads the keys of one position after another, then the values. As channels of one plane with the queries they
lie so far apart that the processor's prefetchers lose them, and all positions of the queries are kept for nothing. The
step that computes them becomes a step for each; no sum changes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from typing import TypeVar

from fastgen.sampling.pack import size_planes
from fastgen.sampling.plan import Instr, Plan, Read, Step, StepTap, Store
from fastgen.sampling.schedule import Stage

_Address = TypeVar("_Address", Read, StepTap)
Ranges = list[tuple[int, int]]


def part_planes(plan: Plan) -> Plan:
    """The plan, or one with steps and planes of its own: in it no pixel step computes several operands of an attention
    that nothing else reads together.
    """
    parts = _parts(plan)
    if not parts:
        return plan
    planes = [replace(plane) for plane in plan.planes]
    index: dict[tuple[int, int], int] = {}  # plane, first channel of a part -> its plane
    for plane, ranges in parts.items():
        for start, stop in ranges:
            index[plane, start] = plane if start == 0 else len(planes)
            if start == 0:
                planes[plane].channels = stop
            else:
                planes.append(replace(planes[plane], channels=stop - start))

    def moved(at: _Address) -> _Address:
        start = max((a for a, _ in parts.get(at.plane, []) if a <= at.channel), default=0)
        return replace(at, plane=index.get((at.plane, start), at.plane), channel=at.channel - start)

    steps = []
    for step in plan.steps:
        step = replace(step, init=step.init and moved(step.init), taps=tuple(moved(tap) for tap in step.taps))
        step.program = tuple(replace(i, read=i.read and moved(i.read)) for i in step.program)
        if step.attention is not None:
            of = step.attention
            step.attention = replace(of, query=moved(of.query), keys=moved(of.keys), values=moved(of.values))
            step.attention.of_keys = of.of_keys and moved(of.of_keys)
        for start, stop in parts.get(step.out, [(0, step.width)]):
            steps.append(_channels(step, start, stop, index.get((step.out, start), step.out)))
    result = replace(plan, planes=planes, steps=steps)
    size_planes(result)
    return result


def _parts(plan: Plan) -> dict[int, Ranges]:
    """The planes to be parted, and the ranges of channels that are read together."""
    reads: dict[int, Ranges] = defaultdict(list)
    for step in plan.steps:
        for read, count in step.all_reads():
            if count:  # attention by biases alone reads no queries
                reads[read.plane].append((read.channel, read.channel + count))
    whole = {d.plane for d in plan.draws} | {e.plane for e in plan.encodings}
    attended = {read.plane for step in plan.steps if step.attention for read, _ in step.attention.reads()}
    writers = Counter(store.plane for step in plan.steps for store in step.stores)
    parts = {}
    for step in plan.steps:
        plane = step.out
        alone = len(step.stores) == writers[plane] == 1 and step.width == plan.planes[plane].channels
        simple = step.stage == Stage.PIXEL and step.attention is None and step.init is None
        if simple and alone and plane in attended - whole:
            ranges = _apart(reads[plane], step.width)
            if len(ranges) > 1:
                parts[plane] = ranges
    return parts


def _apart(ranges: Ranges, width: int) -> Ranges:
    """[0, width) in as many parts as none of the ranges has channels of two of them."""
    parts: Ranges = []
    for start, stop in sorted(ranges):
        if parts and start < parts[-1][1]:
            parts[-1] = (parts[-1][0], max(parts[-1][1], stop))
        else:
            parts.append((start, stop))
    edges = [0, *(start for start, _ in parts[1:]), width]
    return list(zip(edges[:-1], edges[1:], strict=True))


def _channels(step: Step, start: int, stop: int, plane: int) -> Step:
    """The part of a step that computes channels [start, stop) of its result, as the first of a plane."""

    def along(instr: Instr) -> Instr:
        read = instr.read
        return instr if read is None else replace(instr, read=replace(read, channel=read.channel + start))

    part = replace(step, width=stop - start)
    if start == 0 and stop == step.width:
        return part
    part.program = tuple(along(instr) for instr in step.program)
    part.stores = (Store(plane, 0, step.stores[0].register),)
    for name in ("weight", "bias"):
        values = getattr(step, name)
        if values is not None:
            columns = values.unflatten(-1, (step.groups, step.width))[..., start:stop]
            setattr(part, name, columns.flatten(-2))
    return part
