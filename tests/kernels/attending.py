"""Causal networks with attention, as people write it: of as many heads and channels as a test asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen.nn import MaskedConv2d

LEVELS = 5
Attend = Callable[["Attending", Tensor, Tensor, Tensor], Tensor]


class Attending(nn.Module):
    """A masked convolution, attention to what it makes of the pixels before, and what was there besides.

    attend: of query, keys [N, heads, positions, depth] and values [N, heads, positions, width].
    """

    def __init__(
        self, attend: Attend, size: tuple[int, int], heads: int, depth: int, width: int, channels: int = 6
    ) -> None:  # fmt: skip
        super().__init__()
        self.attend, self.size, self.heads = attend, size, heads
        self.conv = MaskedConv2d(1, channels, 3, mask_type="A")
        self.queries, self.keys = nn.Linear(channels, heads * depth), nn.Linear(channels, heads * depth)
        self.values = nn.Linear(channels, heads * width)
        positions = size[0] * size[1]
        self.relative = nn.Parameter(2 * torch.randn(heads, 2 * positions))
        self.halve = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.out = nn.Conv2d(heads * width + channels, LEVELS, 1)

    def of(self, x: Tensor) -> Tensor:
        """[N, channels, h, w] -> [N, heads * width, h, w]"""
        tokens = x.flatten(2).transpose(1, 2)
        operands = self.queries(tokens), self.keys(tokens), self.values(tokens)
        result = self.attend(self, *(t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in operands))
        return result.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        return self.out(torch.cat([F.elu(self.of(h)), h], dim=1))


class Padded(Attending):
    """Not to positions that the condition hides."""

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        self.hidden = hidden
        return super().forward(x)


class Above(Attending):
    """Of rows above, so that whole rows attend."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        return self.out(torch.cat([F.elu(self.of(F.pad(h, (0, 0, 1, -1)))), h], dim=1))


class Halved(Attending):
    """At a stride of two, moved so far that no position sees a pixel that is drawn later."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(x))
        half = self.of(self.halve(F.pad(h, (0, 0, 3, -3))))
        whole = F.interpolate(half, scale_factor=2)[:, :, : x.shape[2], : x.shape[3]]
        return self.out(torch.cat([torch.tanh(whole), h], dim=1))


class Tokens(nn.Module):
    """A transformer of pixels in raster order, which come one later."""

    def __init__(self, size: tuple[int, int], heads: int, depth: int, width: int, channels: int = 8) -> None:
        super().__init__()
        self.split, self.heads = (heads * depth, heads * depth, heads * width), heads
        self.code, self.start = nn.Embedding(LEVELS, channels), nn.Parameter(torch.randn(1, 1, channels))
        self.place = nn.Parameter(torch.randn(1, size[0] * size[1], channels))
        self.norm, self.last = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.operands = nn.Linear(channels, sum(self.split))
        self.back = nn.Linear(heads * width, channels)
        self.out = nn.Linear(channels, LEVELS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.start.expand(len(x), -1, -1), self.code(x.flatten(1))[:, :-1]], dim=1) + self.place
        operands = self.operands(self.norm(tokens)).split(self.split, dim=2)
        seen = causal(*(t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in operands))
        tokens = tokens + self.back(seen.transpose(1, 2).flatten(2))
        return self.out(self.last(tokens)).transpose(1, 2).unflatten(2, x.shape[1:])


def before(query: Tensor, diagonal: int = 0) -> Tensor:
    """Whether a query (row) sees a key (column)."""
    return torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril(diagonal)


def causal(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = query @ keys.transpose(2, 3) * query.shape[3] ** -0.5
    return scores.masked_fill(~before(query), float("-inf")).softmax(3) @ values


def itself(net: Attending, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return causal(query, keys, values)


def earlier(net: Attending, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """As PixelSNAIL does: the first position sees nothing."""
    scores = query @ keys.transpose(2, 3) / query.shape[3] ** 0.5
    seen = before(query, -1)
    return (scores.masked_fill(~seen, -1e4).softmax(3) * seen.any(1)[:, None]) @ values


def not_hidden(net: Attending, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    seen = before(query) & (net.hidden == 0)[:, None, None]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen)


def capped(net: Attending, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    scores = torch.tanh(query @ keys.transpose(2, 3) / 1.5) * 1.5
    return scores.masked_fill(~before(query), float("-inf")).softmax(3) @ values


def mixed(net: Attending, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """By a matrix, as gMLP does."""
    positions = torch.arange(query.shape[2], device=query.device)
    return (net.relative[:, positions[:, None] - positions] * before(query)) @ values


def at_a_distance(net: Attending, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """A number for each head and distance; the first head sees every second key, and at first none."""
    positions = torch.arange(query.shape[2], device=query.device)
    bias = net.relative[:, positions[:, None] - positions]
    seen = before(query).repeat(net.heads, 1, 1)
    seen[0] &= (positions % 2 == 1) & (positions[:, None] > 2)
    return F.scaled_dot_product_attention(query, keys, values, bias.masked_fill(~seen, float("-inf")))


def rows_above(net: Attending, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    row = torch.arange(query.shape[2], device=query.device) // net.size[1]
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=row <= row[:, None])
