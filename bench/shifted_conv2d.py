"""shifted_conv2d against a convolution of a padded image, as PyTorch users write it.

The floor counts the taps that fall inside the image, each multiplied: minimal filtering can go below it. Providers are
those of masked_conv2d.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.case import Case, Work
from bench.harness.layers import competitors

TESTS = ("tests/ops/test_shifted_conv2d.py",)


@dataclass(frozen=True)
class Size:
    """One layer: batch, channels, image side, kernel (height, width), its columns to the left of the pixel."""

    batch: int
    inputs: int
    outputs: int
    side: int
    kernel: tuple[int, int]
    left: int

    @property
    def name(self) -> str:
        kernel = f"{self.kernel[0]}x{self.kernel[1]}"
        return f"{kernel} {self.inputs}->{self.outputs} {self.batch}x{self.side}x{self.side}"


DOWN, DOWN_RIGHT, GATED = ((2, 3), 1), ((2, 2), 1), ((3, 5), 2)
SIZES = [
    Size(16, 320, 160, 32, *DOWN),  # both streams of PixelCNN++, at its three resolutions
    Size(16, 320, 160, 32, *DOWN_RIGHT),
    Size(16, 320, 320, 16, *DOWN),
    Size(16, 320, 320, 8, *DOWN_RIGHT),
    Size(1, 320, 160, 32, *DOWN_RIGHT),
    Size(16, 64, 128, 28, *GATED),
    Size(32, 64, 32, 8, *DOWN),
]
QUICK_SIZES = [Size(2, 8, 8, 8, *DOWN), Size(2, 3, 6, 5, *GATED)]


def useful_flops(size: Size) -> int:
    """2 per weight and position at which its tap falls inside the image."""
    rows = sum(max(0, size.side - y) for y in range(size.kernel[0]))
    columns = sum(max(0, size.side - abs(x - size.left)) for x in range(size.kernel[1]))
    return 2 * size.batch * size.inputs * size.outputs * rows * columns


def padded(x: Tensor, weight: Tensor, bias: Tensor, left: int) -> Tensor:
    """What `shifted_conv2d` replaces."""
    return F.conv2d(F.pad(x, (left, weight.shape[3] - 1 - left, weight.shape[2] - 1, 0)), weight, bias)


def build(size: Size, train: bool, with_compile: bool) -> Work:
    """Inputs and providers of one size; `train` adds the backward pass."""
    from fastgen import ops

    torch.manual_seed(0)
    x = torch.randn(size.batch, size.inputs, size.side, size.side)
    weight = torch.randn(size.outputs, size.inputs, *size.kernel) * 0.05
    bias = torch.randn(size.outputs)
    grad = torch.randn(size.batch, size.outputs, size.side, size.side)
    layers = partial(padded, left=size.left), partial(ops.shifted_conv2d, left=size.left)
    inputs, with_grad = (x, weight, bias), (True, True, True)
    providers, skipped = competitors(*layers, inputs, with_grad, grad if train else None, with_compile)
    tensors = x.numel() + grad.numel() + weight.numel() + bias.numel()
    if train:  # then read x, weight and the output's gradient, write the gradients
        tensors += 2 * x.numel() + grad.numel() + 2 * weight.numel() + bias.numel()
    return Work(providers, (3 if train else 1) * useful_flops(size), 4 * tensors, skipped)


def cases(quick: bool) -> list[Case]:
    """Forward, and forward with backward, of every size."""
    result = []
    for size in QUICK_SIZES if quick else SIZES:
        shapes = {
            "x": [size.batch, size.inputs, size.side, size.side],
            "weight": [size.outputs, size.inputs, *size.kernel],
        }
        for train in (False, True):
            name = f"{size.name} {'forward+backward' if train else 'forward'}"
            result.append(Case(name, shapes, partial(build, size, train, not quick and size is SIZES[0])))
    return result
