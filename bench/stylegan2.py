"""StyleGAN2's generator, accelerated: weights of each sample, blurs, noise, and images of all sizes summed.

Karras et al. 2020, from w to images of 3 channels, as most code has it: "eager" computes the weights of each sample and
convolves samples as groups, and blurs each channel of each sample as an image of its own. "eager, one weight" scales
the images instead and blurs channels as groups, which is how a user would make it faster by hand. Otherwise as
`bench.generator`. The floor counts the products of the convolutions as they are defined, in the inside of the image,
without those of filters, styles and scales.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.conv_transpose2d_bn_act import Config
from bench.generator import Makers, compiled, joined, make, measure
from bench.harness.case import Case, Work

TESTS = ("tests/acceleration/test_modulated.py", "tests/ops/test_upfirdn2d.py")
GAIN = math.sqrt(2)


def blur_planes(x: Tensor, kernel: Tensor, up: int, before: int, after: int) -> Tensor:
    channels, height, width = x.shape[1:]
    x = F.pad(x.reshape(-1, height, 1, width, 1), [0, up - 1, 0, 0, 0, up - 1])
    x = F.pad(x.reshape(-1, 1, height * up, width * up), [before, after, before, after])
    x = F.conv2d(x, torch.flip(kernel, [0, 1])[None, None])
    return x.reshape(-1, channels, x.shape[2], x.shape[3])


def blur_channels(x: Tensor, kernel: Tensor, up: int, before: int, after: int) -> Tensor:
    n, channels, height, width = x.shape
    if up > 1:
        x = F.pad(x.reshape(n, channels, height, 1, width, 1), [0, up - 1, 0, 0, 0, up - 1])
        x = x.reshape(n, channels, height * up, width * up)
    x = F.pad(x, [before, after, before, after])
    return F.conv2d(x, torch.flip(kernel, [0, 1])[None, None].expand(channels, -1, -1, -1), groups=channels)


class Blur(nn.Module):
    """By [1, 3, 3, 1] along either axis, of twice the pixels with `up` of 2."""

    def __init__(self, before: int, after: int, up: int = 1):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
        self.register_buffer("kernel", row[:, None] * row)
        self.up, self.before, self.after, self.one_weight = up, before, after, False

    def forward(self, x: Tensor) -> Tensor:
        blur = blur_channels if self.one_weight else blur_planes
        return blur(x, self.kernel, self.up, self.before, self.after)


class Linear(nn.Module):
    def __init__(self, inner: int, outer: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(outer, inner)), nn.Parameter(torch.ones(outer))
        self.scale = 1 / math.sqrt(inner)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.scale, self.bias)


class ModulatedConv(nn.Module):
    def __init__(self, inner: int, outer: int, kernel: int, style: int, normed: bool = True, up: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, outer, inner, kernel, kernel))
        self.style, self.blur = Linear(style, inner), Blur(1, 1) if up else None
        self.scale, self.kernel, self.normed = 1 / math.sqrt(inner * kernel**2), kernel, normed
        self.outer, self.one_weight = outer, False

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        batch, inner, height, width = x.shape
        style = self.style(w).view(batch, 1, inner, 1, 1)
        weight = self.scale * self.weight * style
        norm = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8) if self.normed else None
        if self.one_weight:
            return self.scaled(x * style.view(batch, inner, 1, 1), norm)
        if norm is not None:
            weight = weight * norm.view(batch, self.outer, 1, 1, 1)
        x = x.reshape(1, batch * inner, height, width)
        if self.blur is None:
            weight = weight.view(batch * self.outer, inner, self.kernel, self.kernel)
            x = F.conv2d(x, weight, padding=self.kernel // 2, groups=batch)
        else:
            weight = weight.transpose(1, 2).reshape(batch * inner, self.outer, self.kernel, self.kernel)
            x = F.conv_transpose2d(x, weight, stride=2, groups=batch)
        _, _, height, width = x.shape
        x = x.view(batch, self.outer, height, width)
        return x if self.blur is None else self.blur(x)

    def scaled(self, x: Tensor, norm: Tensor | None) -> Tensor:
        weight = self.weight[0] * self.scale
        if self.blur is None:
            x = F.conv2d(x, weight, padding=self.kernel // 2)
        else:
            x = F.conv_transpose2d(x, weight.transpose(0, 1), stride=2)
        x = x if norm is None else x * norm[:, :, None, None]
        return x if self.blur is None else self.blur(x)

    def products(self, side: int) -> int:
        config = Config(self.kernel, 1, self.kernel // 2) if self.blur is None else Config(self.kernel, 2, 0)
        return self.weight.shape[1] * self.weight.shape[2] * joined(config, side) ** 2


class StyledConv(nn.Module):
    def __init__(self, inner: int, outer: int, style: int, side: int, up: bool = False):
        super().__init__()
        self.conv = ModulatedConv(inner, outer, 3, style, up=up)
        self.register_buffer("noise", torch.randn(1, 1, side, side))
        self.strength, self.bias = nn.Parameter(torch.full((1,), 0.1)), nn.Parameter(torch.zeros(outer))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        x = self.conv(x, w) + self.strength * self.noise
        return F.leaky_relu(x + self.bias.view(1, -1, 1, 1), 0.2) * GAIN


class StyleGAN2(nn.Module):
    """`side` pixels across, of `width` channels at 4x4 and at most ``base / side`` of images of a side."""

    def __init__(self, side: int = 256, width: int = 512, base: int = 16384):
        super().__init__()
        sides = [2**i for i in range(2, side.bit_length())]
        widths = [min(width, base // size) for size in sides]
        self.constant, self.width = nn.Parameter(torch.randn(1, widths[0], 4, 4)), width
        self.first, self.first_rgb = StyledConv(widths[0], widths[0], width, 4), self.rgb(widths[0])
        self.ups, self.convs, self.rgbs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for size, inner, outer in zip(sides[1:], widths, widths[1:], strict=False):
            self.ups.append(StyledConv(inner, outer, width, size, up=True))
            self.convs.append(StyledConv(outer, outer, width, size))
            self.rgbs.append(self.rgb(outer))
        self.enlarge, self.format = Blur(2, 1, up=2), torch.contiguous_format

    def rgb(self, inner: int) -> ModulatedConv:
        return ModulatedConv(inner, 3, 1, self.width, normed=False)

    def forward(self, w: Tensor) -> Tensor:
        x = self.constant.repeat(w.shape[0], 1, 1, 1)
        x = self.first(x if self.format is torch.contiguous_format else x.contiguous(memory_format=self.format), w)
        image = self.first_rgb(x, w)
        for up, conv, rgb in zip(self.ups, self.convs, self.rgbs, strict=True):
            x = conv(up(x, w), w)
            image = self.enlarge(image) + rgb(x, w)
        return image

    def inputs(self, batch: int) -> tuple[Tensor, ...]:
        return (torch.randn(batch, self.width),)

    def flops(self, batch: int) -> int:
        total, side = self.first.conv.products(4) + self.first_rgb.products(4), 4
        for up, conv, rgb in zip(self.ups, self.convs, self.rgbs, strict=True):
            total += up.conv.products(side)  # type: ignore[operator, union-attr]
            side *= 2
            total += conv.conv.products(side) + rgb.products(side)  # type: ignore[operator, union-attr]
        return 2 * batch * total


def one_weight(network: StyleGAN2, format: torch.memory_format = torch.contiguous_format) -> StyleGAN2:
    """The same network, which scales images, of that format, instead of weights."""
    other = copy.deepcopy(network)
    other.format = format
    for module in other.modules():
        if isinstance(module, Blur | ModulatedConv):
            module.one_weight = True
    return other


def build(sizes: tuple[int, ...], batch: int, with_compile: bool) -> Work:
    import fastgen

    network = make(StyleGAN2, *sizes)
    inputs = network.inputs(batch)
    peers: Makers = {
        "eager": (lambda: network, inputs),
        "eager, one weight": (lambda: one_weight(network), inputs),
        "eager, one weight, channels_last": (lambda: one_weight(network, torch.channels_last), inputs),
    }
    if with_compile:
        peers["compile"] = (partial(compiled, network, False, *inputs), inputs)
        peers["compile freezing, one weight"] = (lambda: compiled(one_weight(network), True, *inputs), inputs)
    ours: Makers = {"fastgen": (lambda: fastgen.accelerate(network), inputs)}
    return measure(network, inputs, peers, ours, network.flops(batch))


def cases(quick: bool) -> list[Case]:
    kinds = [((8, 4, 32), 2)] if quick else [((256,), 1), ((256,), 4), ((64, 128, 4096), 1), ((64, 128, 4096), 16)]
    return [
        Case(
            f"StyleGAN2 3x{sizes[0]}x{sizes[0]}, batch {batch}",
            {"batch": batch},
            partial(build, sizes, batch, not quick),
        )
        for sizes, batch in kinds
    ]
