"""Image GPT (Chen, Radford, Child, Wu, Jun, Luan, Sutskever 2020, "Generative Pretraining from Pixels", ICML)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import init

from fastgen._arguments import positive
from fastgen.models.autoregressive.base import AutoregressiveModel
from fastgen.models.autoregressive.weight_normed import dropout_share

EPS = 1e-5  # of the norms


def linear(inputs: int, outputs: int, *, std: float, bias: bool) -> torch.nn.Linear:
    layer = torch.nn.Linear(inputs, outputs, bias=bias)
    init.normal_(layer.weight, std=std)
    if bias:
        init.zeros_(layer.bias)
    return layer


class Block(torch.nn.Module):
    """Attention and a perceptron of one hidden layer, each behind a norm and added to what it reads (section 2.2)."""

    def __init__(self, width: int, num_blocks: int, num_heads: int, dropout: float, bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = torch.nn.RMSNorm(width, eps=EPS)
        self.query_key_value = linear(width, 3 * width, std=width**-0.5, bias=bias)
        self.attention_output = linear(width, width, std=(width * num_blocks) ** -0.5, bias=bias)
        self.mlp_norm = torch.nn.RMSNorm(width, eps=EPS)
        self.hidden = linear(width, 4 * width, std=0.02, bias=bias)
        self.output = linear(4 * width, width, std=0.02, bias=bias)
        self.dropout = torch.nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, width] -> [N, T, width]; what stands at t depends on x up to t."""
        parts = self.query_key_value(self.attention_norm(x)).chunk(3, dim=2)
        query, keys, values = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        found = F.scaled_dot_product_attention(query, keys, values, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.dropout(self.attention_output(found))
        h = self.hidden(self.mlp_norm(x))
        return x + self.dropout(self.output(h * torch.sigmoid(1.702 * h)))


class ImageGPT(AutoregressiveModel):
    """A transformer over the pixels, or codes, of an image in raster order.

    What stands at a position of the sequence is the pixel before it; at the first, a learned vector. Norms without
    means or biases, the approximation of GELU and the initial weights are those of the published code
    (github.com/openai/image-gpt). Its models are ``ImageGPT(image_shape=(1, 32, 32), levels=512, embedding_dim=512,
    ...)`` with (num_filters, num_blocks) of (512, 24) (iGPT-S, 76 million parameters), (1024, 36) (iGPT-M) and
    (1536, 48) (iGPT-L, 16 heads), over the nearest of 512 colours; `convert.image_gpt_from_port` reads them. Images of
    several channels, for which the head draws the colours of a pixel, class labels and dropout are additions.

    Args:
        image_shape: (C, H, W).
        levels: number of levels, 2..256; with ``embedding_dim`` to 65,536.
        head: "categorical", or "bernoulli" for two levels, which draw the colours of a pixel independently of each
            other; or "logistic_mixture", for 1 or 3 channels.
        num_filters: width of the layers, the paper's d.
        num_blocks: layers, the paper's L.
        num_heads: heads of the attention, a divisor of ``num_filters``.
        num_mixtures: components of the logistic mixture.
        num_classes: number of classes, each with a first vector of its own, or None for an unconditional model.
        dropout: of what a layer adds, and of the sums of embeddings and positions.
        embedding_dim: None, where pixels are numbers, or for images (1, H, W) with the categorical head the dimension
            of an embedding of each level; of another than ``num_filters``, a linear layer follows.
        bias: whether linear layers have one; those of the published models have none.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "image_gpt"

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (1, 32, 32),
        levels: int = 256,
        head: str = "categorical",
        num_filters: int = 512,
        num_blocks: int = 24,
        num_heads: int = 8,
        num_mixtures: int = 10,
        num_classes: int | None = None,
        dropout: float = 0.0,
        embedding_dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(
            image_shape=image_shape,
            levels=levels,
            head=head,
            num_classes=num_classes,
            embedding_dim=embedding_dim,
            num_filters=positive("num_filters", num_filters),
            num_blocks=positive("num_blocks", num_blocks),
            num_heads=positive("num_heads", num_heads),
            num_mixtures=positive("num_mixtures", num_mixtures),
            dropout=dropout_share(dropout),
            bias=bool(bias),
        )
        if num_filters % num_heads:
            raise ValueError(f"num_heads: expected a divisor of {num_filters=}, got {num_heads}")
        channels, height, width = self.image_shape
        self.input = None if embedding_dim == num_filters else torch.nn.Linear(self.in_channels, num_filters)
        self.start = torch.nn.Embedding(num_classes or 1, num_filters)
        self.position = torch.nn.Parameter(0.01 * torch.randn(height * width, num_filters))
        self.dropout = torch.nn.Dropout(dropout)
        self.blocks = torch.nn.ModuleList(
            Block(num_filters, num_blocks, num_heads, dropout, bias) for _ in range(num_blocks)
        )
        self.norm = torch.nn.RMSNorm(num_filters, eps=EPS)
        self.output = linear(num_filters, self.head.num_params(channels), std=0.0, bias=bias)
        init.normal_(self.start.weight, std=0.02)
        if self.embedding is not None:
            init.normal_(self.embedding.weight, std=0.02)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Encoded images [N, C, H, W], labels int64 [N] if conditional -> head parameters [N, P, H, W]."""
        self._check_conditional(labels)
        h = self.embedded(x).flatten(2).transpose(1, 2)  # [N, H * W, channels]
        if self.input is not None:
            h = self.input(h)
        first = self.start.weight.expand(len(x), -1) if labels is None else self.start(labels)
        h = self.dropout(torch.cat([first[:, None], h[:, :-1]], dim=1) + self.position)
        for block in self.blocks:
            h = block(h)
        return self.output(self.norm(h)).transpose(1, 2).unflatten(2, self.image_shape[1:])
