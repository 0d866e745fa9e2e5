"""Where the CPU keeps the elements of planes that pixel steps alone use."""

from __future__ import annotations

from collections import defaultdict
from enum import IntEnum

from fastgen.sampling.plan import Plan, Plane, Read, Step, StepTap
from fastgen.sampling.schedule import Stage


class Layout(IntEnum):
    """`enum PlanLayout` of csrc/common/plan_tables.h.

    TOGETHER: the samples of a position side by side, for products of whole rows and of all samples.
    APART: the positions of a sample: attention reads them one after the other.
    MOMENT: only the position at hand, which nothing reads later.
    SHARED: one copy for all samples.
    """

    TOGETHER = 0
    APART = 1
    MOMENT = 2
    SHARED = 3


def layouts(plan: Plan) -> list[Layout]:
    """Of each plane."""
    written: dict[int, set[tuple[int, int]]] = defaultdict(set)  # with which lags
    for step in plan.steps:
        for store in step.stores:
            written[store.plane].add((step.lag_y, step.lag_x))
    of_rows, attended, kept = set[int](), set[int](), {e.plane for e in plan.encodings}
    kept |= {d.plane for d in plan.draws if written[d.plane] != {(0, 0)}}
    for step in plan.steps:
        here = [read for read, _ in step.reads_here()]
        touched = {read.plane for read in here} | {store.plane for store in step.stores}
        if step.attention is not None:
            keys = {read.plane for read, _ in step.attention.reads()[1:]}
            attended |= {step.attention.keys.plane, step.attention.values.plane}
            touched |= keys
            kept |= keys
        if step.stage == Stage.ROW:
            of_rows |= touched
        now = {(step.lag_y, step.lag_x)}
        kept |= {read.plane for read in here if written[read.plane] != now or not _in_place(plan, step, read)}
        if step.period != (1, 1):
            kept |= {store.plane for store in step.stores}
    return [_layout(i, plane, of_rows, attended, kept) for i, plane in enumerate(plan.planes)]


def _layout(index: int, plane: Plane, of_rows: set[int], attended: set[int], kept: set[int]) -> Layout:
    if plane.kind == "constant":
        return Layout.SHARED if plane.broadcast or index not in of_rows else Layout.TOGETHER
    if plane.kind != "cache" or index in of_rows:
        return Layout.TOGETHER
    if index not in kept:
        return Layout.MOMENT
    return Layout.APART if index in attended else Layout.TOGETHER


def _in_place(plan: Plan, step: Step, read: Read | StepTap) -> bool:
    """Whether a step reads the position that it works on."""

    def frame(index: int) -> tuple[object, ...]:
        plane = plan.planes[index]
        return plane.height, plane.width, plane.stride

    return frame(step.out) == frame(read.plane) and (read.dy, read.dx) == (0, 0)
