"""PixelSNAIL (Chen, Mishra, Rohaninejad, Abbeel 2018, "PixelSNAIL: An Improved Autoregressive Generative Model",
arXiv:1712.09763).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen._arguments import positive
from fastgen.models.autoregressive.weight_normed import (
    HORIZONTAL,
    Convolution,
    GatedResidual,
    WeightNormedModel,
    Window,
    dropout_share,
    shift_down,
    shift_right,
)


def attend(query: Tensor, keys: Tensor, values: Tensor, num_heads: int) -> Tensor:
    """Softmax attention of every position to those before it in raster order, scaled by 1 / sqrt(K); zero at the first.

    query, keys: [N, num_heads * K, H, W]. values: [N, num_heads * V, H, W] -> [N, num_heads * V, H, W].
    """
    height, width = query.shape[2:]
    before = torch.ones(height * width, height * width, dtype=torch.bool, device=query.device).tril(-1)
    query, keys, values = (  # [N, num_heads, H * W, K or V]
        t.flatten(2).unflatten(1, (num_heads, -1)).transpose(2, 3) for t in (query, keys, values)
    )
    found = F.scaled_dot_product_attention(query, keys, values, attn_mask=before)
    return found.transpose(2, 3).flatten(1, 2).unflatten(2, (height, width))


def coordinates(x: Tensor) -> Tensor:
    """Row and column of each position of x [N, C, H, W], from -1/2 to below 1/2: [N, 2C, H, W], C copies of each."""
    rows, columns = (torch.arange(size).to(x) / size - 0.5 for size in x.shape[2:])
    return torch.cat([rows[:, None].expand_as(x), columns.expand_as(x)], dim=1)


class InputLayer(torch.nn.Module):
    """The only layer with shifts: after it, no feature can see its own pixel.

    The shifts move in zeros, without a bias, and the channel of ones tells the image from the zeros around it.
    """

    def __init__(self, inputs: int, p: int) -> None:
        super().__init__()
        self.above = Convolution(inputs + 1, p, Window(1, 3, left=1))
        self.left = Convolution(inputs + 1, p, Window(2, 1, left=0))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        return shift_down(self.above(x)) + shift_right(self.left(x))


class Attention(torch.nn.Module):
    """The attention block of section 2, and a gated residual layer of the features that reads what it found.

    Keys and values may be made of the pixel at their position, which is known to all that attend to them.
    """

    def __init__(
        self,
        inputs: int,
        colors: int,
        p: int,
        layer: Callable[..., GatedResidual],
        *,
        key_dim: int,
        value_dim: int,
        num_heads: int,
    ) -> None:
        super().__init__()
        self.colors = colors  # of the image, each with coordinates of its own
        self.dims, self.num_heads = (key_dim, value_dim), num_heads
        self.query_features = layer(p + 2 * colors)
        self.query = Convolution(p + 2 * colors, key_dim)
        self.content_features = layer(inputs + p + 2 * colors)
        self.content = Convolution(inputs + p + 2 * colors, key_dim + value_dim)
        self.output = layer(p, skip_channels=value_dim)

    def forward(self, x: Tensor, h: Tensor, labels: Tensor | None) -> Tensor:
        place = coordinates(x[:, : self.colors])
        query = self.query(self.query_features(torch.cat([h, place], dim=1), (), labels))
        content = self.content(self.content_features(torch.cat([x, h, place], dim=1), (), labels))
        keys, values = content.split(self.dims, dim=1)
        return self.output(h, (attend(query, keys, values, self.num_heads),), labels)


class Block(torch.nn.Module):
    """Gated residual layers, then attention (section 2)."""

    def __init__(
        self, inputs: int, colors: int, p: int, layer: Callable[..., GatedResidual], num_layers: int, **attention: int
    ) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layer(p, HORIZONTAL) for _ in range(num_layers))
        self.attention = Attention(inputs, colors, p, layer, **attention)

    def forward(self, x: Tensor, h: Tensor, labels: Tensor | None) -> Tensor:
        for layer in self.layers:
            h = layer(h, (), labels)
        return self.attention(x, h, labels)


class PixelSNAIL(WeightNormedModel):
    """PixelSNAIL: causal convolutions for what is near, attention for everything drawn before.

    One stream of 2x2 convolutions that see the pixels above and to the left, in blocks that each end with attention to
    all earlier pixels (section 2).  Call `initialize` on some images before training.

    The paper gives the layers of a block, its filters, the sizes of keys and values and the masks.  All else is as in
    the published code (github.com/neocxi/pixelsnail-public, ``h12_noup_smallkey``), of which the defaults are the model
    for CIFAR-10, 46,180,788 parameters.  Class labels, which that code leaves out, are a bias before each gate as in
    PixelCNN++; several heads are an addition.

    Args:
        image_shape: (C, H, W); any sizes, 1 or 3 channels for the logistic mixture.
        levels: number of levels, 2..256; with ``embedding_dim`` to 65,536.
        head: "logistic_mixture"; or "categorical", or "bernoulli" for two levels, which draw the colours of a pixel
            independently of each other.
        num_filters: feature maps.
        num_blocks: blocks of gated residual layers and attention.
        num_layers: gated residual layers of a block.
        key_dim: channels of queries and keys, of all heads together.
        value_dim: channels of values, of all heads together.
        num_heads: heads of the attention, a divisor of both.
        num_mixtures: components of the logistic mixture.
        num_classes: number of classes, or None for an unconditional model.
        dropout: of the features between the two convolutions of a layer.
        embedding_dim: None, or for a prior over codes, in images (1, H, W) with the categorical head, the dimension of
            their embedding.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "pixelsnail"

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        levels: int = 256,
        head: str = "logistic_mixture",
        num_filters: int = 256,
        num_blocks: int = 12,
        num_layers: int = 4,
        key_dim: int = 16,
        value_dim: int = 128,
        num_heads: int = 1,
        num_mixtures: int = 10,
        num_classes: int | None = None,
        dropout: float = 0.5,
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
            num_layers=positive("num_layers", num_layers),
            key_dim=positive("key_dim", key_dim),
            value_dim=positive("value_dim", value_dim),
            num_heads=positive("num_heads", num_heads),
            num_mixtures=positive("num_mixtures", num_mixtures),
            dropout=dropout_share(dropout),
        )
        if key_dim % num_heads or value_dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {key_dim=} and {value_dim=}, got {num_heads}")
        inputs, colors, p = self.in_channels, self.image_shape[0], num_filters
        layer = functools.partial(GatedResidual, negate=False, num_classes=num_classes, dropout=dropout)
        attention = {"key_dim": key_dim, "value_dim": value_dim, "num_heads": num_heads}
        self.input = InputLayer(inputs, p)
        self.blocks = torch.nn.ModuleList(
            Block(inputs, colors, p, layer, num_layers, **attention) for _ in range(num_blocks)
        )
        self.output = Convolution(p, self.head.num_params(colors))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Encoded images [N, C, H, W], labels int64 [N] if conditional -> head parameters [N, P, H, W]."""
        self._check_conditional(labels)
        x = self.embedded(x)
        h = self.input(x)
        for block in self.blocks:
            h = block(x, h, labels)
        return self.output(F.elu(h))
