"""Encoders and decoders: perceptrons, and convolutions that halve or double the size with every block.

Encoders take images [N, C, H, W], with planes of conditions beside them, to features [N, F].  Decoders take latents
[N, D], with labels beside them, and planes of a condition or None, to parameters [N, P, H, W].
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn import ConvBNAct, ConvTransposeBNAct

SMALLEST = 4  # pixels a side of the innermost feature map, or more where a size is odd


class PerceptronEncoder(nn.Module):
    def __init__(self, channels: int, height: int, width: int, units: list[int]) -> None:
        super().__init__()
        self.layers = _perceptron([channels * height * width, *units])
        self.features = units[-1]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.flatten(1))


class PerceptronDecoder(nn.Module):
    def __init__(self, inputs: int, planes: int, shape: tuple[int, int, int], units: list[int]) -> None:
        super().__init__()
        self.layers = _perceptron([inputs + planes * shape[1] * shape[2], *units])
        self.last = nn.Linear(units[-1], math.prod(shape))
        self.shape = shape

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        inputs = z if condition is None else torch.cat((z, condition.flatten(1)), dim=1)
        return self.last(self.layers(inputs)).unflatten(1, self.shape)


def _perceptron(sizes: list[int]) -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in itertools.pairwise(sizes)))


class ConvolutionalEncoder(nn.Module):
    """4x4 convolutions of stride 2, BatchNorm and ReLU; the feature maps double in number where they halve in size."""

    def __init__(self, channels: int, height: int, width: int, num_filters: int) -> None:
        super().__init__()
        widths = filters(height, width, num_filters)
        self.blocks = nn.Sequential(
            *(ConvBNAct(a, b, 4, 2, 1, bias=False) for a, b in itertools.pairwise([channels, *widths]))
        )
        self.features = widths[-1] * (height >> len(widths)) * (width >> len(widths))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x).flatten(1)


class ConvolutionalDecoder(nn.Module):
    """The way back, in fused blocks, the first of which spreads a latent over the innermost feature maps.

    The planes of a condition enter every block in its size, and a convolution after the last one, which gives the
    details; without a condition the last block ends in the parameters.
    """

    def __init__(self, inputs: int, planes: int, shape: tuple[int, int, int], num_filters: int) -> None:
        super().__init__()
        params, height, width = shape
        widths = filters(height, width, num_filters)[::-1]
        inner = (height >> len(widths), width >> len(widths))
        # A linear layer as a transposed convolution of one pixel, with a constant input for a bias of every output.
        self.first = ConvTransposeBNAct(inputs + 1, widths[0], inner, bias=False, batch_norm=False)
        nn.init.uniform_(self.first[0].weight, -(inputs**-0.5), inputs**-0.5)
        self.blocks = nn.ModuleList(
            ConvTransposeBNAct(a + planes, b, 4, 2, 1, bias=False) for a, b in itertools.pairwise(widths)
        )
        if planes:
            self.blocks.append(ConvTransposeBNAct(widths[-1] + planes, widths[-1], 4, 2, 1, bias=False))
            self.last: nn.Module = nn.Conv2d(widths[-1] + planes, params, 3, padding=1)
        else:
            self.last = ConvTransposeBNAct(widths[-1], params, 4, 2, 1, batch_norm=False, activation="none")

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        # Of one image each further call counts, and so does the Python code of `F.pad`.
        x = self.first(torch.constant_pad_nd(z, (0, 1), 1.0).view(z.shape[0], -1, 1, 1))
        for block in self.blocks:
            x = block(_beside(x, condition))
        return self.last(_beside(x, condition))


def filters(height: int, width: int, num_filters: int) -> list[int]:
    """Feature maps of each level of a convolutional network, from the image inwards.

    Raises:
        ValueError: the image cannot be halved once.
    """
    halvings = 0
    while all(size % 2 == 0 and size // 2 >= SMALLEST for size in (height >> halvings, width >> halvings)):
        halvings += 1
    if halvings == 0:
        raise ValueError(
            f"image_shape: a convolutional network needs even sizes of at least {2 * SMALLEST}, got {height}x{width}"
        )
    return [num_filters << i for i in range(halvings)]


def _beside(x: Tensor, condition: Tensor | None) -> Tensor:
    """Feature maps with the condition's planes, in their size, behind them."""
    if condition is None:
        return x
    factor = condition.shape[2] // x.shape[2]
    return torch.cat((x, F.avg_pool2d(condition, factor) if factor > 1 else condition), dim=1)
