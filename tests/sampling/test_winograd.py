"""Minimal filtering in the row stage: found where it pays, exact to rounding, the same bits for every batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastgen.models import PixelCNNpp
from fastgen.sampling import Categorical, Sampler, audit, naive_sample
from fastgen.sampling.executors import winograd
from fastgen.sampling.plan import Plan
from fastgen.sampling.precision import PRECISIONS
from tests.instruction_sets import FUSED, ISAS, chosen
from tests.sampling.parameters import errors, params_of_known

LEVELS = 5


class Columns(nn.Module):
    """Convolutions of `size` columns over the rows above, with a 1x1 convolution beside them."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        self.size = size
        self.first = nn.Conv2d(1, channels, 1)
        self.above = nn.ModuleList(nn.Conv2d(channels, channels, (2, size)) for _ in range(3))
        self.beside = nn.Conv2d(channels, channels, 1)
        self.last = nn.Conv2d(channels, LEVELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        sides = (self.size - 1) // 2
        hidden = functional.pad(self.first(x), (0, 0, 1, 0))[:, :, :-1]  # rows above alone
        start = hidden
        for conv in self.above:
            wide = functional.pad(hidden, (sides, self.size - 1 - sides, 1, 0))
            hidden = hidden + torch.tanh(conv(wide) + self.beside(start))
        return self.last(functional.elu(hidden))


def columns(channels: int, size: int) -> Columns:
    torch.manual_seed(3)
    return Columns(channels, size).eval()


def plan_of(model: nn.Module, shape: tuple[int, int, int]) -> Plan:
    return Sampler(model, shape, Categorical(LEVELS), backend="reference").plan


def sizes_of(plan: Plan) -> list[int]:
    found = [winograd.find_filters(plan, step) for step in plan.steps]
    return [f.size for f in found if f is not None]


@pytest.mark.parametrize(("channels", "width", "expected"), [(64, 6, 3), (63, 6, 0), (64, 7, 0)])
@pytest.mark.parametrize("size", [2, 3])
def test_filters_are_found_where_they_pay(size: int, channels: int, width: int, expected: int) -> None:
    assert sizes_of(plan_of(columns(channels, size), (1, 4, width))) == [size] * expected


def test_rounded_weights_are_filtered_in_wide_rows_alone() -> None:
    for width, expected in [(30, 0), (32, 3)]:
        plan = Sampler(columns(64, 3), (1, 2, width), Categorical(LEVELS), precision="bf16", backend="reference").plan
        assert len(sizes_of(plan)) == expected


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [2, 3])
def test_error_is_at_most_twice_that_of_pytorch(size: int, isa: str) -> None:
    model = columns(72, size)
    images = torch.randint(LEVELS, (3, 1, 6, 8), dtype=torch.uint8)
    with chosen(isa):
        found = params_of_known(plan_of(model, (1, 6, 8)), images)
    inputs = Categorical(LEVELS).encode(images)
    with torch.no_grad():
        pytorch = model(inputs)
        truth = model.double()(inputs.double())
    for ours, theirs in zip(errors(found, truth), errors(pytorch, truth), strict=True):
        assert ours <= 2 * theirs


@pytest.mark.parametrize("size", [2, 3])
def test_bits_depend_on_no_batch_thread_or_instruction_set(size: int) -> None:
    plan = plan_of(columns(72, size), (1, 5, 8))
    images = torch.randint(LEVELS, (37, 1, 5, 8), dtype=torch.uint8)
    whole = params_of_known(plan, images)
    for first, last in [(0, 1), (1, 4), (4, 9), (9, 37)]:  # runs along columns and along samples
        assert torch.equal(params_of_known(plan, images[first:last]), whole[first:last])
    torch.set_num_threads(2)
    assert torch.equal(params_of_known(plan, images), whole)
    for isa in FUSED:
        with chosen(isa):
            assert torch.equal(params_of_known(plan, images[:5]), whole[:5])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("shape", [(3, 6, 8), (1, 4, 12)])
def test_samples_of_small_networks(
    shape: tuple[int, int, int], precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With channels that fill no panel, class labels, and levels of several strides."""
    monkeypatch.setattr(winograd, "LEAST_CHANNELS", 1)
    monkeypatch.setattr(winograd, "LEAST_WIDTH", dict.fromkeys(PRECISIONS, 2))
    torch.manual_seed(1)
    model = PixelCNNpp(image_shape=shape, levels=16, num_filters=7, num_blocks=1, num_mixtures=2, num_classes=3).eval()
    model.initialize(torch.randint(16, (8, *shape), dtype=torch.uint8), torch.arange(8) % 3)
    assert {2, 3} <= set(sizes_of(Sampler(model, backend="reference").plan))
    labels = torch.arange(5) % 3
    images = Sampler(model, precision=precision, backend="cpu").sample(5, labels=labels)
    if precision == "fp32":
        assert torch.equal(images, naive_sample(model, 5, labels=labels))
    assert audit(model, images, labels=labels, precision=precision).ok
