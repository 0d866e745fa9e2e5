"""Networks with feature maps of several strides, as anybody might write them: what they do to a shifted image, in every
size.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.sampling import Categorical, NotCausal, Sampler, naive_sample

from .networks import LEVELS

CLASSES = 3
SIZES = [(8, 8), (5, 7), (11, 6), (1, 9), (7, 1), (1, 1)]


def fit(x: Tensor, like: Tensor) -> Tensor:
    """Cropped or padded, below and to the right, to the height and width of another."""
    height, width = like.shape[2:]
    return F.pad(x, (0, max(0, width - x.shape[3]), 0, max(0, height - x.shape[2])))[:, :, :height, :width]


class Body(nn.Module):
    """Layers for the functions below, which map features [N, 4, H, W] to features of any size."""

    def __init__(self, run: Callable) -> None:
        super().__init__()
        self.run = run
        self.halve = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.third = nn.Conv2d(4, 4, (2, 4), stride=(3, 1), padding=(1, 2), groups=2)
        self.wide = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.mixed = nn.Conv2d(8, 4, 2, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.overlapping = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)
        self.dilated = nn.ConvTranspose2d(4, 4, (3, 2), stride=(1, 2), dilation=(2, 1))
        self.tall = nn.ConvTranspose2d(4, 4, (4, 1), stride=(3, 1), groups=2, bias=False)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm2d(4)
        self.norm.running_mean.normal_()
        self.labels = nn.Embedding(CLASSES, 4)
        self.channels = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return fit(self.run(self, x, labels), x)


def halved_and_back(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    return net.up(torch.tanh(net.halve(x)))


def overlapping_kernels(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    return net.overlapping(torch.tanh(net.halve(x)))


def three_levels(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    """Skips by addition and by concatenation."""
    half = torch.tanh(net.halve(x))
    quarter = net.norm(net.halve(half))
    half = half + fit(net.up(F.elu(quarter)), half)
    return torch.cat([fit(net.overlapping(half), x)[:, :2], x[:, 2:]], dim=1)


def strides_of_their_own(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    """Three along the rows and one along the columns, then two along both: six and two."""
    small = net.halve(F.silu(net.third(x)))
    return net.tall(fit(net.up(small), net.third(x)))


def nearest(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(torch.tanh(net.halve(x)), scale_factor=2)


def nearest_to_size(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    half = net.halve(F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2)))
    return F.interpolate(half, size=(2 * half.shape[2], 2 * half.shape[3]), mode="nearest-exact")


def nearest_of_every_third(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    return F.interpolate(F.pad(x, (0, 0, 0, 1))[:, :, 1::3], scale_factor=(3, 1))


def repeated(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    return net.halve(x).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def every_second(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    return net.up(x[:, :, ::2, ::2])


def unshuffled(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    even = F.pad(x[:, :1], (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    return net.up(torch.relu(F.pixel_unshuffle(even, 2)))


def unshuffled_shift(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    """In an image of six columns one is left of some channels: it does not tell their stride."""
    shift = 3 if x.shape[3] > 3 else 0
    shifted = fit(F.pad(x[:, :1], (shift, 0, 0, 0)), x)
    even = F.pad(shifted, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    return net.up(torch.relu(F.pixel_unshuffle(even, 2)) * net.channels.view(4, 1, 1))


def cropped_then_upsampled(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    """What was cut off is zero for the kernel that reaches over the edge, whatever the feature map holds there."""
    large = torch.sigmoid(net.third(F.pad(x, (3, 3, 3, 3))))
    return net.tall(large[:, :, 1:-1, 1:-1])


def dilated_kernels(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    return net.dilated(net.wide(x)[:, :, :, ::2])


def shifted_into_strides(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    """Zeros inside a crop that the strided convolution pads again."""
    return net.up(net.halve(fit(F.pad(x, (1, 0, 2, 0)), x)))


def masked_at_a_level(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    half = net.halve(x)
    checks = torch.arange(half[0, 0].numel()).view(half.shape[2:]) % 3 == 0
    return net.up(half[:, :, ::1].masked_fill(checks, 0.3) + fit(x[:, :, ::2, ::2].masked_fill(checks[0, 0], 0), half))


def linear_of_zeros(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    """Zeros around a feature map say nothing of their place."""
    padded = F.pad(net.halve(x), (1, 1, 1, 1))
    tokens = torch.tanh(padded.permute(0, 2, 3, 1).reshape(-1, 4)) * net.channels
    return net.up(net.linear(tokens).view(len(x), *padded.shape[2:], 4).permute(0, 3, 1, 2))


def wide_at_a_level(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    return net.up(net.wide(torch.tanh(net.halve(x))))


def labels_at_a_level(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    half = net.halve(x) * net.labels(labels)[:, :, None, None] + net.channels.view(4, 1, 1)
    return net.up(half)


def labels_as_channels(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    """A strided convolution over expanded labels, which its padding cuts off."""
    channels = net.labels(labels)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    return net.up(net.mixed(torch.cat([x, channels], dim=1)[:, torch.arange(8).view(2, 4).t().flatten()]))


def ones_as_channels(net: Body, x: Tensor, labels: Tensor) -> Tensor:
    return net.up(net.mixed(torch.cat([x, torch.ones_like(x)], dim=1)))


CASES = [
    halved_and_back,
    overlapping_kernels,
    three_levels,
    strides_of_their_own,
    nearest,
    nearest_to_size,
    nearest_of_every_third,
    repeated,
    every_second,
    unshuffled,
    unshuffled_shift,
    cropped_then_upsampled,
    dilated_kernels,
    shifted_into_strides,
    masked_at_a_level,
    linear_of_zeros,
    wide_at_a_level,
    labels_at_a_level,
    labels_as_channels,
    ones_as_channels,
]


class Shifted(nn.Module):
    """A body that reads the image shifted down and to the right."""

    def __init__(self, body: Body, down: int, right: int) -> None:
        super().__init__()
        self.first, self.body, self.out = nn.Conv2d(1, 4, 1), body, nn.Conv2d(5, LEVELS, 1)
        self.down, self.right = down, right

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        height, width = x.shape[2:]
        x = F.pad(x, (max(0, self.right), max(0, -self.right), max(0, self.down), max(0, -self.down)))
        x = x[:, :, max(0, -self.down) :, max(0, -self.right) :][:, :, :height, :width]
        return self.out(torch.cat([x, self.body(self.first(x), labels)], dim=1))


def reach(body: Body, height: int = 14, width: int = 15) -> tuple[int, int]:
    """The last position in raster order, relative to its own, that an output of a body depends on; by perturbation."""
    body = body.double()
    x = torch.randn(1, 4, height, width, dtype=torch.float64)
    each = torch.eye(height * width, dtype=torch.float64).view(-1, 1, height, width)
    label = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        changed = body(x + each * torch.randn(4, 1, 1), label.expand(len(each))) - body(x, label)
    source, y, x = (changed.abs().amax(1) > 1e-12).nonzero().T
    body.float()
    return max(zip((source // width - y).tolist(), (source % width - x).tolist(), strict=True))


def make(run: Callable, size: tuple[int, int], spare: int = 0) -> tuple[nn.Module, dict]:
    """(a network that sees up to the pixel before its own, or `spare` columns further back, what it needs)"""
    torch.manual_seed(5)
    body = Body(run).eval()
    with torch.no_grad():
        for p in body.parameters():
            p.mul_(1.5)
    dy, dx = max((0, 0), reach(body))
    network = Shifted(body, dy, dx + 1 + spare).eval()
    return network, {"image_shape": (1, *size), "head": Categorical(LEVELS), "num_classes": CLASSES}


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("run", CASES, ids=lambda f: f.__name__)
def test_equals_naive_loop(run: Callable, size: tuple[int, int], backend: str) -> None:
    network, given = make(run, size)
    labels = torch.tensor([2, 0, 1])
    images = Sampler(network, **given, backend=backend).sample(3, labels=labels)
    assert torch.equal(images, naive_sample(network, 3, **given, labels=labels))


@pytest.mark.parametrize("run", CASES, ids=lambda f: f.__name__)
def test_one_column_less_is_refused(run: Callable) -> None:
    network, given = make(run, (14, 15), spare=-1)
    with pytest.raises(NotCausal, match=r"depend on colour 0 at \(y\+0, x\+0\); the layers between: (first|body|out)"):
        Sampler(network, **given)
