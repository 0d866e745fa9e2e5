"""The logistic mixture head: what it draws is distributed as its likelihood says, and C++ draws the same."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastgen import backends
from fastgen.ops import philox
from fastgen.sampling import LogisticMixture


class Pixel(NamedTuple):
    """Parameters of one pixel, per component: logits, then for each colour (means, log scales[, coefficients])."""

    levels: int
    logits: list[float]
    colours: list[list[list[float]]]

    @property
    def head(self) -> LogisticMixture:
        return LogisticMixture(len(self.logits), self.levels)

    @property
    def params(self) -> Tensor:
        return torch.cat([torch.tensor(self.logits), torch.tensor(self.colours).flatten()]).view(1, -1, 1, 1)

    def draw(self, count: int, temperature: float = 1.0) -> Tensor:
        """Levels [count, C]."""
        uniforms = philox.uniform(5, 0, torch.arange(count), 0)[:, : 1 + len(self.colours), None, None]
        return self.head.draw(self.params.expand(count, -1, -1, -1), uniforms, temperature).flatten(1)

    def probabilities(self, images: Tensor) -> Tensor:
        """float64 [n] of levels [n, C], from the likelihood."""
        images = images.to(torch.uint8).T[None, :, :, None]
        params = self.params.double().expand(-1, -1, *images.shape[2:])
        return self.head.log_prob(params, images).exp().flatten()


GREY = {
    "two levels": Pixel(2, [0.3, -0.5], [[[-0.2, 0.4], [-1.0, 0.5]]]),
    "17 levels": Pixel(17, [0.0, 1.0, -1.0], [[[-0.5, 0.1, 0.7], [-2.0, -1.0, -3.0]]]),
    "256 levels": Pixel(256, [0.0, 0.5], [[[-0.4, 0.3], [-2.5, -4.0]]]),
    "tails beyond the edges": Pixel(256, [0.0, 0.0], [[[-1.05, 1.1], [-3.0, -2.0]]]),
    "tiny scales": Pixel(256, [0.0, 0.7], [[[0.002, 0.5], [-7.0, -50.0]]]),
    "tiny scales between two bins": Pixel(17, [0.0], [[[0.0625], [-7.0]]]),
    "huge scales": Pixel(17, [0.0, 0.2], [[[0.3, 0.0], [3.0, 6.0]]]),
    "nothing but the edges": Pixel(256, [0.0], [[[1e30], [75.0]]]),
}
COLOUR = {
    "two levels": Pixel(
        2,
        [0.0, 1.0],
        [
            [[0.2, -0.3], [-1.0, 0.0], [1.0, -2.0]],
            [[0.1, 0.4], [-1.5, -0.5], [0.7, 0.2]],
            [[0.0, -0.6], [-0.5, -2.0], [-0.4, 0.9]],
        ],
    ),
    "17 levels": Pixel(
        17,
        [0.0, -0.7, 0.4],
        [
            [[0.2, -0.9, 0.5], [-2.0, -2.5, -4.0], [1.0, -2.0, 0.5]],
            [[0.1, 0.4, -0.2], [-2.5, -1.0, -3.0], [0.7, 0.2, -3.0]],
            [[0.0, -0.6, 0.3], [-3.0, -2.0, -1.5], [-0.4, 0.9, 0.6]],
        ],
    ),
    "256 levels": Pixel(
        256,
        [0.0, 1.0],
        [
            [[0.5, 0.52], [-5.8, -6.5], [1.0, 1.1]],
            [[-0.4, -0.41], [-5.5, -6.0], [0.5, 0.6]],
            [[0.0, 0.2], [-3.0, -4.5], [-0.8, 0.9]],
        ],
    ),
}


def surprise(observed: Tensor, expected: Tensor) -> float:
    """Pearson's chi-square as a standard normal (Wilson and Hilferty 1931); rare cells are put together."""
    order = expected.argsort()
    group = (expected[order].cumsum(0) / 12).floor().long()
    cells = int(group.max()) + 1
    o = torch.zeros(cells, dtype=torch.float64).index_add_(0, group, observed[order].double())
    e = torch.zeros(cells, dtype=torch.float64).index_add_(0, group, expected[order])
    o, e = o[e > 0], e[e > 0]
    freedom = len(e) - 1
    if freedom == 0:
        return 0.0
    square = float(((o - e) ** 2 / e).sum()) / freedom
    return (square ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


@pytest.mark.parametrize("pixel", GREY.values(), ids=GREY.keys())
def test_draws_of_one_channel_follow_the_likelihood(pixel: Pixel) -> None:
    count = 200_000
    expected = count * pixel.probabilities(torch.arange(pixel.levels)[:, None])
    assert expected.sum().item() == pytest.approx(count, rel=1e-9)
    observed = torch.bincount(pixel.draw(count)[:, 0].long(), minlength=pixel.levels)
    assert (observed[expected < 1e-3] == 0).all()
    assert abs(surprise(observed, expected)) < 4


@pytest.mark.parametrize("pixel", COLOUR.values(), ids=COLOUR.keys())
def test_draws_of_three_channels_follow_the_likelihood(pixel: Pixel) -> None:
    """The joint distribution, over the box that all draws fall into."""
    count = 200_000
    drawn = pixel.draw(count).long()
    low, high = drawn.amin(0).sub(3).clamp(min=0), drawn.amax(0).add(3).clamp(max=pixel.levels - 1)
    box = torch.cartesian_prod(*(torch.arange(int(a), int(b) + 1) for a, b in zip(low, high, strict=True)))
    expected = count * pixel.probabilities(box)
    assert expected.sum().item() == pytest.approx(count, rel=1e-4)
    strides = torch.tensor([(high - low + 1)[1:].prod(), (high - low + 1)[2], 1])
    observed = torch.bincount(((drawn - low) * strides).sum(1), minlength=len(box))
    assert abs(surprise(observed, expected)) < 4


def test_temperature_scales_logits_and_scales() -> None:
    warm = Pixel(17, [1.0, -0.6], [[[-0.5, 0.3], [-1.5, -2.0]]])
    cool = Pixel(17, [2.0, -1.2], [[[-0.5, 0.3], [-1.5 - math.log(2), -2.0 - math.log(2)]]])
    assert torch.equal(warm.draw(5000, 0.5), cool.draw(5000))


def draw_in_cpp(head: LogisticMixture, params: Tensor, uniforms: Tensor, temperature: float) -> Tensor:
    """[n, P] and [n, 1 + C] -> levels [n, C]."""
    encoding, drawn = head.encoding(), torch.empty(len(params), uniforms.shape[1] - 1, dtype=torch.int32)
    params, uniforms = params.contiguous(), uniforms.contiguous()
    backends.native_cpu().logistic_mixture_draw(
        params.data_ptr(),
        len(params),
        head.components,
        drawn.shape[1],
        head.levels,
        uniforms.data_ptr(),
        1 / temperature,
        encoding.data_ptr(),
        drawn.data_ptr(),
    )
    return drawn


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("components", [1, 10])
def test_cpp_draws_the_same(channels: int, levels: int, temperature: float, components: int) -> None:
    head, count = LogisticMixture(components, levels), 4000
    params = (
        torch.randn(count, head.num_params(channels)) * torch.tensor([0.3, 1.0, 3.0, 30.0]).repeat(count // 4)[:, None]
    )
    extreme = torch.tensor([-3e38, -1e30, -1e4, -1.0, 0.0, 1.0, 1e4, 1e30, 3e38])
    wild = torch.rand_like(params) < 0.1
    params[wild] = extreme[torch.randint(len(extreme), (int(wild.sum()),))]
    uniforms = philox.uniform(1, 0, torch.arange(count), 0)[:, : 1 + channels].clone()
    uniforms[: count // 4, 0], uniforms[count // 4 : count // 2, -1] = 2.0**-24, 1 - 2.0**-24
    expected = head.draw(params, uniforms, temperature)
    assert torch.equal(draw_in_cpp(head, params, uniforms, temperature), expected.int())
    assert len(expected.unique()) > levels // 2


def test_cpp_survives_nan() -> None:
    head = LogisticMixture(2, 5)
    params = torch.full((1, head.num_params(3)), float("nan"))
    assert ((draw_in_cpp(head, params, torch.full((1, 4), 0.5), 1.0) >= 0).all()).item()


def test_bad_arguments() -> None:
    for components in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match=f"components must be a positive integer, got {components}"):
            LogisticMixture(components)
    head = LogisticMixture(4)
    with pytest.raises(ValueError, match="1 or 3 channels, got 2"):
        head.num_params(2)
    with pytest.raises(ValueError, match=r"gives 41 output channels.* needs 40"):
        head.log_prob(torch.zeros(1, 41, 2, 2), torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
