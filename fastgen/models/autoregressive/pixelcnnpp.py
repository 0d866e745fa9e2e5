"""PixelCNN++ (Salimans, Karpathy, Chen, Kingma 2017, "PixelCNN++: Improving the PixelCNN with Discretized Logistic
Mixture Likelihood and Other Modifications", arXiv:1701.05517).
"""

from __future__ import annotations

import functools
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen._arguments import positive
from fastgen.models.autoregressive.weight_normed import (
    HORIZONTAL,
    VERTICAL,
    Convolution,
    GatedResidual,
    WeightNormed,
    WeightNormedModel,
    Window,
    dropout_share,
    shift_down,
    shift_right,
)

RESOLUTIONS = 3  # full, half and quarter resolution

Streams = tuple[Tensor, Tensor]  # vertical, horizontal: [N, num_filters, H, W] each


class Upsampling(WeightNormed):
    """A transposed convolution of stride 2: [N, C, ceil(H/2), ceil(W/2)] -> [N, C', H, W].

    Row y of the input has seen rows up to 2y, and goes to rows 2y and later; columns of the horizontal stream likewise.
    """

    def __init__(self, inputs: int, outputs: int, window: Window) -> None:
        super().__init__((inputs, outputs, window.rows, window.columns), 1, init_scale=1.0)
        self.right = window.right

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = F.conv_transpose2d(x, self.weight(), self.bias, stride=2)
        return y[:, :, :height, self.right : self.right + width]


class InputLayer(torch.nn.Module):
    """The only layer that looks at pixels, and the only one with shifts: after it, no stream can see its own pixel.

    The shifts move in zeros, without a bias, and the channel of ones tells the image from the zeros around it.
    """

    def __init__(self, colors: int, p: int) -> None:
        super().__init__()
        self.vertical = Convolution(colors + 1, p, VERTICAL)
        self.above = Convolution(colors + 1, p, Window(1, 3, left=1))
        self.left = Convolution(colors + 1, p, Window(2, 1, left=0))

    def forward(self, x: Tensor) -> Streams:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        return shift_down(self.vertical(x)), shift_down(self.above(x)) + shift_right(self.left(x))


class Block(torch.nn.Module):
    """A residual block per stream; the horizontal one reads the vertical one, and in the decoder (``mirrored``) both
    read the encoder's block at the same place.
    """

    def __init__(self, p: int, *, mirrored: bool, num_classes: int | None, dropout: float) -> None:
        super().__init__()
        skips = int(mirrored)
        layer = functools.partial(GatedResidual, p, negate=True, num_classes=num_classes, dropout=dropout)
        self.vertical = layer(VERTICAL, skip_channels=skips * p)
        self.horizontal = layer(HORIZONTAL, skip_channels=(1 + skips) * p)

    def forward(self, streams: Streams, mirror: Streams | tuple[()], labels: Tensor | None) -> Streams:
        v = self.vertical(streams[0], mirror[:1], labels)
        return v, self.horizontal(streams[1], (v, *mirror[1:]), labels)


class Downsample(torch.nn.Module):
    """To half the resolution; odd sizes are rounded up."""

    def __init__(self, p: int) -> None:
        super().__init__()
        self.vertical = Convolution(p, p, VERTICAL, stride=2)
        self.horizontal = Convolution(p, p, HORIZONTAL, stride=2)

    def forward(self, streams: Streams) -> Streams:
        return self.vertical(streams[0]), self.horizontal(streams[1])


class Upsample(torch.nn.Module):
    """Back to the resolution before a `Downsample`."""

    def __init__(self, p: int) -> None:
        super().__init__()
        self.vertical = Upsampling(p, p, VERTICAL)
        self.horizontal = Upsampling(p, p, HORIZONTAL)

    def forward(self, streams: Streams, height: int, width: int) -> Streams:
        return self.vertical(streams[0], height, width), self.horizontal(streams[1], height, width)


class PixelCNNpp(WeightNormedModel):
    """PixelCNN++: whole pixels from a mixture of discretised logistics, in a network shaped like a U.

    An encoder of residual blocks at full, half and quarter resolution, and a decoder back up; each block of the decoder
    also reads its mirror image in the encoder (figure 2).  Two streams run through both: the vertical one sees the rows
    above, the horizontal one also what is to the left in this row.

    Call `initialize` on some images before training.  The defaults are the published model for CIFAR-10, 53,659,080
    parameters.

    Args:
        image_shape: (C, H, W); any sizes, 1 or 3 channels for the logistic mixture.
        levels: number of levels, 2..256.
        head: "logistic_mixture"; or "categorical", or "bernoulli" for two levels, which draw the colours of a pixel
            independently of each other.
        num_filters: feature maps of each stream.
        num_blocks: residual blocks of the encoder at each resolution; the decoder has one more at all but the lowest.
        num_mixtures: components of the logistic mixture.
        num_classes: number of classes, or None for an unconditional model.
        dropout: of the features between the two convolutions of a block.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "pixelcnnpp"

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        levels: int = 256,
        head: str = "logistic_mixture",
        num_filters: int = 160,
        num_blocks: int = 5,
        num_mixtures: int = 10,
        num_classes: int | None = None,
        dropout: float = 0.5,
    ) -> None:
        super().__init__(
            image_shape=image_shape,
            levels=levels,
            head=head,
            num_classes=num_classes,
            num_filters=positive("num_filters", num_filters),
            num_blocks=positive("num_blocks", num_blocks),
            num_mixtures=positive("num_mixtures", num_mixtures),
            dropout=dropout_share(dropout),
        )
        colors, p = self.image_shape[0], num_filters

        def blocks(count: int, mirrored: bool) -> torch.nn.ModuleList:
            return torch.nn.ModuleList(
                Block(p, mirrored=mirrored, num_classes=num_classes, dropout=dropout) for _ in range(count)
            )

        self.input = InputLayer(colors, p)
        self.encoder = torch.nn.ModuleList(blocks(num_blocks, False) for _ in range(RESOLUTIONS))
        self.downsample = torch.nn.ModuleList(Downsample(p) for _ in range(RESOLUTIONS - 1))
        self.decoder = torch.nn.ModuleList(blocks(num_blocks + (level > 0), True) for level in range(RESOLUTIONS))
        self.upsample = torch.nn.ModuleList(Upsample(p) for _ in range(RESOLUTIONS - 1))
        self.output = Convolution(p, self.head.num_params(colors))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Encoded images [N, C, H, W], labels int64 [N] if conditional -> head parameters [N, P, H, W]."""
        self._check_conditional(labels)
        saved: list[Streams] = [self.input(x)]  # what every layer of the encoder gives; the decoder takes them back
        for level, blocks in enumerate(cast("list[list[Block]]", self.encoder)):
            if level:
                saved.append(self.downsample[level - 1](saved[-1]))
            for block in blocks:
                saved.append(block(saved[-1], (), labels))
        streams = saved.pop()
        for level, blocks in enumerate(cast("list[list[Block]]", self.decoder)):
            if level:
                streams = self.upsample[level - 1](streams, *saved[-1][0].shape[2:])
            for block in blocks:
                streams = block(streams, saved.pop(), labels)
        return self.output(F.elu(streams[1]))
