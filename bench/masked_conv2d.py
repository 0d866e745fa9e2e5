"""masked_conv2d against a convolution with masked weights, as PyTorch users write it.

A masked weight still multiplies by its zeros; the floor counts the taps that the mask leaves open and that fall inside
the image (3x3 type B: 5 of 9, less at the border), each multiplied: minimal filtering can go below it. The memory
format of inputs, weights and incoming gradients is in the name of the provider; plain "fastgen" and "compile" get
channels_last.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.case import Case, Work
from bench.harness.layers import competitors

TESTS = ("tests/ops/test_masked_conv2d.py",)


@dataclass(frozen=True)
class Size:
    """One layer: batch, channels, image, kernel, mask."""

    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    kernel: int
    mask_type: str
    colors: int = 1

    @property
    def name(self) -> str:
        colors = f" {self.colors} colours" if self.colors > 1 else ""
        return (
            f"{self.kernel}x{self.kernel} {self.mask_type}{colors} {self.inputs}->{self.outputs} "
            f"{self.batch}x{self.height}x{self.width}"
        )


SIZES = [
    Size(16, 128, 128, 32, 32, 3, "B"),  # the bar of the project
    Size(1, 128, 128, 32, 32, 3, "B"),
    Size(64, 128, 128, 28, 28, 3, "B"),
    Size(16, 3, 128, 32, 32, 7, "A", colors=3),
    Size(16, 256, 128, 32, 32, 1, "B"),
    Size(16, 128, 128, 32, 32, 3, "B", colors=3),
    Size(16, 64, 128, 28, 28, 5, "B"),
    Size(16, 32, 32, 8, 8, 3, "B"),
]
QUICK_SIZES = [Size(2, 8, 8, 8, 8, 3, "B"), Size(2, 3, 6, 7, 5, 5, "A", colors=3)]


def useful_flops(mask: Tensor, batch: int, height: int, width: int) -> int:
    """2 per image, open weight [Cout, Cin, kh, kw] and position at which its tap falls inside the image."""
    _, _, kh, kw = mask.shape
    open_weights = mask.sum(dim=(0, 1)).tolist()
    per_image = sum(
        open_weights[y][x] * max(0, height - abs(y - kh // 2)) * max(0, width - abs(x - kw // 2))
        for y in range(kh)
        for x in range(kw)
    )
    return 2 * batch * per_image


def masked_weights(x: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
    """What `masked_conv2d` replaces."""
    return F.conv2d(x, weight * mask, bias, padding=(mask.shape[2] // 2, mask.shape[3] // 2))


def build(size: Size, train: bool, with_compile: bool) -> Work:
    """Inputs and providers of one size; `train` adds the backward pass."""
    from fastgen import ops

    torch.manual_seed(0)
    x = torch.randn(size.batch, size.inputs, size.height, size.width)
    weight = torch.randn(size.outputs, size.inputs, size.kernel, size.kernel) * 0.05
    bias = torch.randn(size.outputs)
    grad = torch.randn(size.batch, size.outputs, size.height, size.width)
    mask = ops.conv_mask(weight.shape, size.mask_type, size.colors, 1)
    input_grad = size.inputs > 3  # the first layer reads the image, which needs no gradient

    dense = partial(masked_weights, mask=mask)
    fast = partial(ops.masked_conv2d, mask_type=size.mask_type, colors=size.colors)
    with_grad = (input_grad, True, True)
    providers, skipped = competitors(dense, fast, (x, weight, bias), with_grad, grad if train else None, with_compile)

    products = (2 + input_grad) if train else 1
    tensors = x.numel() + grad.numel() + int(mask.sum()) + bias.numel()
    if train:  # forward as above; then read x, weight and the output's gradient, write the gradients
        tensors += x.numel() * (1 + input_grad) + grad.numel() + 2 * int(mask.sum()) + bias.numel()
    return Work(providers, products * useful_flops(mask, size.batch, size.height, size.width), 4 * tensors, skipped)


def cases(quick: bool) -> list[Case]:
    """Forward, and forward with backward, of every size."""
    result = []
    for size in QUICK_SIZES if quick else SIZES:
        shapes = {
            "x": [size.batch, size.inputs, size.height, size.width],
            "weight": [size.outputs, size.inputs, size.kernel, size.kernel],
        }
        for train in (False, True):
            name = f"{size.name} {'forward+backward' if train else 'forward'}"
            with_compile = not quick and size is SIZES[0]
            result.append(Case(name, shapes, partial(build, size, train, with_compile)))
    return result
