"""Where the CPU keeps planes: as much memory as positions that are read again, and no more. That samples are those of
the naive loop, the other files show, whose networks have planes of all layouts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import models
from fastgen.sampling import Categorical, Sampler, naive_sample
from fastgen.sampling.executors.layouts import Layout, layouts
from fastgen.sampling.executors.tables import PANEL, PlanTables
from fastgen.sampling.plan import Plane

from .attention_models import MODELS
from .networks import LEVELS
from .test_attention import built, sampler_of

HEADS, DEPTH, SIZE = 2, 8, (3, 4)


class Fused(nn.Module):
    """Queries, keys and values by one product, of which `turned` queries and keys go on to a program of their own."""

    def __init__(self, *, turned: bool = False):
        super().__init__()
        width, positions = HEADS * DEPTH, math.prod(SIZE)
        self.embedding = nn.Embedding(LEVELS, width)
        self.start = nn.Parameter(torch.randn(1, 1, width))
        self.position = nn.Parameter(torch.randn(1, positions, width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, LEVELS)
        self.turn = torch.rand(positions, DEPTH) if turned else None

    def forward(self, codes: Tensor) -> Tensor:
        x = torch.cat([self.start.expand(len(codes), -1, -1), self.embedding(codes.flatten(1))[:, :-1]], 1)
        x = x + self.position
        query, keys, values = (t.unflatten(2, (HEADS, DEPTH)).transpose(1, 2) for t in self.qkv(x).chunk(3, 2))
        if self.turn is not None:
            query, keys = query * self.turn, keys * self.turn
        y = F.scaled_dot_product_attention(query, keys, values, is_causal=True).transpose(1, 2).flatten(2)
        return self.out(x + y).transpose(1, 2).unflatten(2, codes.shape[1:])


def tables_of(sampler: Sampler) -> PlanTables:
    return sampler._executor._tables


def planes_by(tables: PlanTables, layout: Layout) -> list[Plane]:
    return [plane for plane, its in zip(tables.plan.planes, tables.layouts, strict=True) if its == layout]


@pytest.mark.parametrize("turned", [False, True])
def test_keys_and_values_of_one_product(turned: bool) -> None:
    torch.manual_seed(0)
    network = Fused(turned=turned).eval()
    given: dict[str, Any] = {"image_shape": SIZE, "head": Categorical(LEVELS, input_range=None)}
    sampler = Sampler(network, **given, backend="cpu")
    assert torch.equal(sampler.sample(5), naive_sample(network, 5, **given))

    tables, width, positions = tables_of(sampler), HEADS * DEPTH, math.prod(SIZE)
    (attention,) = (step.attention for step in tables.plan.steps if step.attention is not None)
    for read in (attention.keys, attention.values):
        assert tables.layouts[read.plane] == Layout.APART
        assert (read.channel, tables.plan.planes[read.plane].channels) == (0, width)
    assert tables.layouts[attention.query.plane] == Layout.MOMENT
    moments = len(planes_by(tables, Layout.MOMENT)) * width
    images = sum(p.rows * (p.left + p.width + p.right) * width for p in planes_by(tables, Layout.TOGETHER))
    assert sampler.sample_bytes <= 4 * (2 * positions * width + moments + images)
    assert len(planes_by(tables, Layout.SHARED)) > 0
    assert tables.shared >= positions * width


@pytest.mark.parametrize(("name", "read_by_rows"), [("shifted logits", False), ("pooled", True)])
def test_samples_lie_apart_where_attention_reads(name: str, read_by_rows: bool) -> None:
    """But not in planes of row steps, which take the samples of a column together."""
    tables = tables_of(sampler_of(MODELS[name], *built(MODELS[name])[:2], backend="cpu"))
    of_rows = {store.plane for step in tables.plan.row_steps() for store in step.stores}
    keys = {step.attention.keys.plane for step in tables.plan.steps if step.attention is not None}
    assert bool(keys & of_rows) == read_by_rows
    assert all((tables.layouts[plane] == Layout.APART) == (plane not in of_rows) for plane in keys)


def test_positions_that_are_read_again_are_kept() -> None:
    model = models.PixelCNN(image_shape=(1, 5, 6), levels=LEVELS, num_filters=PANEL, num_blocks=1, num_features=PANEL)
    tables = tables_of(Sampler(model.eval(), backend="cpu"))
    reads: dict[int, set[int]] = {}
    for step in tables.plan.pixel_steps(0):
        for tap in step.taps:
            reads.setdefault(tap.plane, set()).add(tap.dx)
    before = {plane for plane, shifts in reads.items() if min(shifts) < 0}
    assert before
    assert all(tables.layouts[plane] == Layout.TOGETHER for plane in before)
    of_rows = {tap.plane for step in tables.plan.row_steps() for tap in step.taps}
    now = {p for p in reads if p not in before | of_rows and tables.plan.planes[p].kind == "cache"}
    assert now
    assert all(tables.layouts[plane] == Layout.MOMENT for plane in now)


@pytest.mark.parametrize("change", [{"lag_x": -1}, {"lag_y": -1}, {"period": (1, 2)}, {"period": (2, 1)}])
def test_what_is_written_at_other_times_is_kept(change: dict[str, Any]) -> None:
    model = models.PixelCNN(image_shape=(1, 5, 6), levels=LEVELS, num_filters=PANEL, num_blocks=1, num_features=PANEL)
    plan = Sampler(model.eval(), backend="cpu").plan
    moments = [i for i, layout in enumerate(layouts(plan)) if layout == Layout.MOMENT]
    for index in moments:
        writers = [s for s in plan.steps if index in {store.plane for store in s.stores}]
        steps = [replace(s, **change) if s in writers else s for s in plan.steps]
        assert layouts(replace(plan, steps=steps))[index] == Layout.TOGETHER
    assert moments
