"""Heads that draw one colour after the other."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.sampling.heads.base import Group, Head, outside
from fastgen.sampling.truncation import EVERY_LEVEL, Truncation


class ColourWise(Head):
    """Heads that draw one colour after the other, each from `params_per_channel` outputs of its own: channels
    ``[c*K, (c+1)*K)`` of the network's output belong to colour ``c``.  One uniform per element draws the smallest level
    whose cumulative probability is at least the uniform.
    """

    def __init__(self, levels: int, params_per_channel: int, input_range: tuple[float, float] | None):
        super().__init__(levels, input_range)
        self.params_per_channel = params_per_channel

    def groups(self, channels: int) -> list[Group]:
        count = self.params_per_channel
        return [Group(range(c, c + 1), range(c * count, (c + 1) * count), range(c, c + 1)) for c in range(channels)]

    def draw(self, params: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        cdf = self.cdf(params, temperature)
        return (cdf < uniforms.unsqueeze(2)).sum(2).to(self.dtype)

    def cdf(self, params: Tensor, temperature: float = 1.0) -> Tensor:
        """Cumulative probabilities, float64: params [N, C*K, ...] -> [N, C, levels, ...], last one exactly 1."""
        raise NotImplementedError

    def boundaries(self, params: Tensor, images: Tensor, temperature: float = 1.0) -> Tensor:
        return self.cdf(params, temperature)

    def margins(self, boundaries: Tensor, images: Tensor, uniforms: Tensor) -> Tensor:
        level = images.long().unsqueeze(2)
        upper = boundaries.gather(2, level).squeeze(2)
        lower = torch.where(level > 0, boundaries.gather(2, (level - 1).clamp(min=0)), 0.0).squeeze(2)
        return outside(lower, upper, uniforms)

    def _split(self, params: Tensor) -> Tensor:
        """[N, C*K, ...] -> [N, C, K, ...]."""
        if params.shape[1] % self.params_per_channel:
            raise ValueError(
                f"the network gives {params.shape[1]} output channels; {self} needs a multiple of "
                f"{self.params_per_channel}"
            )
        return params.unflatten(1, (-1, self.params_per_channel))


class Categorical(ColourWise):
    """Softmax over the levels (van den Oord et al. 2016, "Pixel Recurrent Neural Networks", section 3.3).

    Args:
        levels: number of levels, 2..65536.
        input_range: network input of level 0 and of level ``levels - 1``; the others lie evenly between. None: the
            network reads the levels themselves, as int64, to look them up in an embedding (a prior over the codes of a
            VQ-VAE, say).
    """

    max_levels = 1 << 16

    def __init__(self, levels: int, input_range: tuple[float, float] | None = (-1.0, 1.0)):
        super().__init__(levels, levels, input_range)
        self.truncation = EVERY_LEVEL

    def keeping(self, truncation: Truncation) -> Categorical:
        head = copy.copy(self)
        head.truncation = truncation
        return head

    def log_prob(self, params: Tensor, images: Tensor) -> Tensor:
        logits = self._split(params).transpose(1, 2)  # [N, levels, C, H, W]
        return -F.cross_entropy(logits, images.long(), reduction="none")

    def cdf(self, params: Tensor, temperature: float = 1.0) -> Tensor:
        logits = self._split(params).double() / temperature
        probabilities = torch.softmax(logits, dim=2)
        if self.truncation:
            probabilities = self.truncation.of(probabilities)
        cdf = probabilities.cumsum(2)
        cdf[:, :, -1] = 1.0
        return cdf


class Bernoulli(ColourWise):
    """Two levels from one logit: P(level = 1) = sigmoid(logit).

    Args:
        input_range: network input of level 0 and of level 1.
    """

    def __init__(self, input_range: tuple[float, float] = (0.0, 1.0)):
        super().__init__(2, 1, input_range)

    def log_prob(self, params: Tensor, images: Tensor) -> Tensor:
        logits = self._split(params).squeeze(2)
        return -F.binary_cross_entropy_with_logits(logits, images.to(logits.dtype), reduction="none")

    def cdf(self, params: Tensor, temperature: float = 1.0) -> Tensor:
        zero = torch.sigmoid(-self._split(params).double() / temperature)
        return torch.cat([zero, torch.ones_like(zero)], dim=2)
