"""Minimal filtering for row steps: two neighbouring outputs of a filter take r + 1 products in place of 2 r.

Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", section 4.1, along a row d.  For a filter g of
r = 3 taps,

    y0 = (m1 + m2) + (d0 - d2) g0          m1 = (d1 + d2) (g0 + g1 + g2) / 2
    y1 = (m1 - m2) - (d1 - d3) g2          m2 = (d2 - d1) (g0 - g1 + g2) / 2

and for r = 2,

    y0 = m1 + (d0 - d1) g0                 m1 = d1 (g0 + g1)
    y1 = m1 - (d1 - d2) g1

Image rows come one after the other in time, so the vertical direction has nothing to gain.  csrc/cpu/plan_winograd.h
computes the products.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgen.sampling.plan import Plan, Step, StepTap
from fastgen.sampling.schedule import Stage

LEAST_CHANNELS = 64  # of taps and outputs: below, transforming the data costs more than is saved
# The weights of these products are float32, and more. In place of bfloat16 they gain where the multiplications of one
# image's row take longer than fetching the weights: in rows this wide.
LEAST_WIDTH = {"fp32": 2, "bf16": 32, "int8": 32}

# By r, what the products multiply the data by: factors of the taps of g, with the sign that the product has in y. First
# those that both outputs share, then that of y0, then that of y1.
FACTORS: dict[int, tuple[tuple[float, ...], ...]] = {
    2: ((1, 1), (1, 0), (0, -1)),
    3: ((0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (1, 0, 0), (0, 0, -1)),
}


@dataclass(frozen=True)
class Filters:
    """A step's taps, parted.

    size: r, of all filters.
    taps: the first of each filter.
    weights: of each product, float32 [sum of counts, columns].
    rest, rest_weight: the taps that are of no filter.
    """

    size: int
    taps: list[StepTap]
    weights: list[Tensor]
    rest: list[StepTap]
    rest_weight: Tensor

    @property
    def macs(self) -> float:
        """Multiply-adds per output position."""
        return sum(w.numel() for w in self.weights) / 2 + self.rest_weight.numel()


def find_filters(plan: Plan, step: Step) -> Filters | None:
    """The filters of a step, where it is worthwhile: a row step of an even number of columns, whose reads all have the
    stride of its frame along the row.
    """
    out = plan.planes[step.out]
    if step.stage != Stage.ROW or step.init is not None or step.weight is None:
        return None
    if out.width % 2 or out.width < LEAST_WIDTH[plan.precision]:
        return None
    if step.period[1] != 1 or any(plan.ratio(step, read.plane, 1) != (1, 1) for read, _ in step.reads_here()):
        return None
    found = _consecutive(plan, step)
    if not found or step.groups * step.width < LEAST_CHANNELS:
        return None
    size = max(found, key=lambda r: r * sum(step.taps[f[0]].count for f in found[r]))
    filters = found[size]
    weights = step.weight.split([t.count for t in step.taps])
    rest = [i for i in range(len(step.taps)) if not any(i in f for f in filters)]
    return Filters(
        size=size,
        taps=[step.taps[f[0]] for f in filters],
        weights=[torch.cat([_combined(c, [weights[i] for i in f]) for f in filters]) for c in FACTORS[size]],
        rest=[step.taps[i] for i in rest],
        rest_weight=torch.cat([step.weight[:0], *(weights[i] for i in rest)]),
    )


def _consecutive(plan: Plan, step: Step) -> dict[int, list[list[int]]]:
    """Taps that read the same channels at consecutive columns, in order of dx, by their number r."""
    rows: dict[tuple[int, int, int, int], list[int]] = defaultdict(list)
    for i, tap in enumerate(step.taps):
        if tap.count >= LEAST_CHANNELS and not plan.planes[tap.plane].broadcast:
            rows[tap.plane, tap.channel, tap.count, tap.dy].append(i)
    found: dict[int, list[list[int]]] = defaultdict(list)
    for taps in rows.values():
        taps.sort(key=lambda i: step.taps[i].dx)
        first = step.taps[taps[0]].dx
        if len(taps) in FACTORS and [step.taps[i].dx for i in taps] == list(range(first, first + len(taps))):
            found[len(taps)].append(taps)
    return found


def _combined(factors: tuple[float, ...], weights: list[Tensor]) -> Tensor:
    """The sum of weights times factors, rounded once."""
    terms = [f * w.double() for f, w in zip(factors, weights, strict=True)]
    return torch.stack(terms).sum(0).float()
