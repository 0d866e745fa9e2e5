"""PixelCNN (van den Oord, Kalchbrenner, Kavukcuoglu 2016, "Pixel Recurrent Neural Networks", arXiv:1601.06759)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import nn
from fastgen._arguments import positive
from fastgen.models.autoregressive.base import AutoregressiveModel


class ResidualBlock(torch.nn.Module):
    """Bottleneck of figure 5, left: 2h -> 1x1 h -> 3x3 h -> 1x1 2h with a ReLU before each, plus the input."""

    def __init__(self, num_filters: int, colors: int) -> None:
        super().__init__()
        h = num_filters
        self.reduce = nn.MaskedConv2d(2 * h, h, 1, mask_type="B", colors=colors)
        self.conv = nn.MaskedConv2d(h, h, 3, mask_type="B", colors=colors)
        self.expand = nn.MaskedConv2d(h, 2 * h, 1, mask_type="B", colors=colors)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.expand(F.relu(self.conv(F.relu(self.reduce(F.relu(x))))))


class PixelCNN(AutoregressiveModel):
    """PixelCNN of table 1: a 7x7 masked convolution, residual blocks, two 1x1 layers, a softmax over the levels.

    The masks order the colours inside a pixel (section 3.4).  The receptive field has the blind spot that
    `GatedPixelCNN` removes: pixels above and to the right, outside a diagonal.

    Args:
        image_shape: (C, H, W); any sizes.
        levels: number of levels, 2..256.
        head: "categorical", or "bernoulli" for two levels.
        num_filters: the paper's h (128 for CIFAR-10); the trunk has 2h feature maps.
        num_blocks: residual blocks (15 for CIFAR-10).
        num_features: feature maps of the first 1x1 output layer (1024 for CIFAR-10, 32 for MNIST).

    Raises:
        ValueError: an argument is out of range.
    """

    name = "pixelcnn"

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        levels: int = 256,
        head: str = "categorical",
        num_filters: int = 128,
        num_blocks: int = 15,
        num_features: int = 1024,
    ) -> None:
        super().__init__(
            image_shape=image_shape,
            levels=levels,
            head=head,
            num_classes=None,
            num_filters=positive("num_filters", num_filters),
            num_blocks=positive("num_blocks", num_blocks),
            num_features=positive("num_features", num_features),
        )
        colors = self.image_shape[0]
        outputs = self.head.num_params(colors)
        self.input = nn.MaskedConv2d(colors, 2 * num_filters, 7, mask_type="A", colors=colors)
        self.blocks = torch.nn.Sequential(*(ResidualBlock(num_filters, colors) for _ in range(num_blocks)))
        self.features = nn.MaskedConv2d(2 * num_filters, num_features, 1, mask_type="B", colors=colors)
        self.output = nn.MaskedConv2d(num_features, outputs, 1, mask_type="B", colors=colors)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Encoded images [N, C, H, W] -> head parameters [N, C*K, H, W]; the model takes no labels."""
        if labels is not None:
            raise ValueError("labels: this model is unconditional (num_classes=None), expected None")
        x = self.blocks(self.input(x))
        return self.output(F.relu(self.features(F.relu(x))))
