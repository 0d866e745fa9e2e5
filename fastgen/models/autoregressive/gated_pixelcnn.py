"""Gated PixelCNN (van den Oord et al. 2016, "Conditional Image Generation with PixelCNN Decoders", 1606.05328)."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import nn, ops
from fastgen._arguments import positive
from fastgen.models.autoregressive.base import AutoregressiveModel, odd

FIRST_KERNEL_SIZE = 7


class GatedLayer(torch.nn.Module):
    """The layer of figure 2: a vertical stack that sees the rows above, a horizontal one that sees this row too.

    ``v[y]`` already stands for the rows above y (the model shifts its input once), so the vertical convolution may read
    ``v`` in its own row, and everything goes to the horizontal stack without further shifts.  All colours of the rows
    above are known, so only the horizontal stack has masks; ``splits=2`` keeps the colour groups in both halves of a
    gate.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        num_filters: int,
        kernel_size: int,
        mask_type: str,
        colors: int,
        num_classes: int | None,
    ) -> None:
        super().__init__()
        k, p = kernel_size, num_filters
        self.vertical = nn.ShiftedConv2d(in_channels, 2 * p, (k // 2 + 1, k), left=k // 2)
        self.vertical_to_horizontal = nn.ShiftedConv2d(2 * p, 2 * p, 1, left=0)
        self.horizontal = nn.MaskedConv2d(in_channels, 2 * p, (1, k), mask_type=mask_type, colors=colors, splits=2)
        self.output = nn.MaskedConv2d(p, p, 1, mask_type="B", colors=colors)
        self.label_bias = None if num_classes is None else torch.nn.Embedding(num_classes, 4 * p)
        self.residual = mask_type == "B"

    def forward(self, v: Tensor, h: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        v = self.vertical(v)
        x = self.horizontal(h) + self.vertical_to_horizontal(v)
        if self.label_bias is not None:
            bias_v, bias_h = self.label_bias(labels)[:, :, None, None].chunk(2, dim=1)  # equation 4, [N, 2p, 1, 1] each
            v, x = v + bias_v, x + bias_h
        x = self.output(ops.gated_unit(x))  # equation 2
        return ops.gated_unit(v), h + x if self.residual else x


class GatedPixelCNN(AutoregressiveModel):
    """Gated PixelCNN with class conditioning by a bias per layer, stack and gate (equation 4).

    Args:
        image_shape: (C, H, W); any sizes.
        levels: number of levels, 2..256; with ``embedding_dim`` to 65,536.
        head: "categorical", or "bernoulli" for two levels.
        num_filters: the paper's p, feature maps of each stack (384 for ImageNet).
        num_blocks: gated layers (20 for ImageNet); the first has a 7x7 kernel of mask type A.
        kernel_size: the paper's n, odd (5 for ImageNet).
        num_classes: number of classes, or None for an unconditional model.
        embedding_dim: None, or for a prior over codes, in images (1, H, W), the dimension of their embedding.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "gated_pixelcnn"

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        levels: int = 256,
        head: str = "categorical",
        num_filters: int = 384,
        num_blocks: int = 20,
        kernel_size: int = 5,
        num_classes: int | None = None,
        embedding_dim: int | None = None,
    ) -> None:
        super().__init__(
            image_shape=image_shape,
            levels=levels,
            head=head,
            num_classes=num_classes,
            embedding_dim=embedding_dim,
            num_filters=positive("num_filters", num_filters),
            num_blocks=positive("num_blocks", num_blocks),
            kernel_size=odd("kernel_size", kernel_size),
        )
        p, colors = num_filters, self.image_shape[0]
        layer = functools.partial(GatedLayer, num_filters=p, colors=colors, num_classes=num_classes)
        first = layer(self.in_channels, kernel_size=FIRST_KERNEL_SIZE, mask_type="A")
        others = [layer(p, kernel_size=kernel_size, mask_type="B") for _ in range(num_blocks - 1)]
        self.layers = torch.nn.ModuleList([first, *others])
        self.features = nn.MaskedConv2d(p, p, 1, mask_type="B", colors=colors)
        self.output = nn.MaskedConv2d(p, self.head.num_params(colors), 1, mask_type="B", colors=colors)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Encoded images [N, C, H, W], labels int64 [N] if conditional -> head parameters [N, C*K, H, W]."""
        self._check_conditional(labels)
        x = self.embedded(x)
        v = F.pad(x, (0, 0, 1, 0))[:, :, :-1]  # down by one row: v[y] stands for the rows above y
        h = x
        for layer in self.layers:
            v, h = layer(v, h, labels)
        return self.output(F.relu(self.features(F.relu(h))))
