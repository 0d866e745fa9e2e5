"""Mixtures of discretised logistic distributions over the colours of a whole pixel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastgen.ops.logistic_mixture_nll import MIN_LOG_SCALE, logistic_mixture_nll, split_params
from fastgen.sampling.heads.base import Group, Head, outside

_MAX_LOG_SCALE = 700.0  # e^700 is near the largest float64; all levels but the outer two have long lost their mass


class LogisticMixture(Head):
    """A mixture of discretised logistic distributions, of images with one or three colours.

    Salimans, Karpathy, Chen, Kingma 2017, "PixelCNN++", sections 2.1 and 2.2.  The colours of a pixel share the mixture
    index; within a component the mean of green depends linearly on red, that of blue on red and green.  Networks read
    levels in [-1, 1].

    A pixel is drawn with 1 + C uniforms: the first picks the component by inversion of the mixture probabilities, the
    others become logistic variables, each rounded to the nearest level: exactly the distribution of `log_prob`.
    The temperature divides the mixture logits and multiplies the scales.

    The meaning of the parameters and of `levels` is that of `fastgen.ops.logistic_mixture_nll`.

    Args:
        components: number of mixture components, at least 1.
        levels: number of levels, 2..256.
    """

    def __init__(self, components: int, levels: int = 256):
        super().__init__(levels, (-1.0, 1.0))
        if isinstance(components, bool) or not isinstance(components, int) or components < 1:
            raise ValueError(f"components must be a positive integer, got {components!r}")
        self.components = components

    def __repr__(self) -> str:
        return f"LogisticMixture(components={self.components}, levels={self.levels})"

    def groups(self, channels: int) -> list[Group]:
        if channels not in (1, 3):
            raise ValueError(f"{self} is for images with 1 or 3 channels, got {channels}")
        params = self.components * (10 if channels == 3 else 3)
        return [Group(range(channels), range(params), range(1 + channels))]

    def log_prob(self, params: Tensor, images: Tensor) -> Tensor:
        self._check(params, images.shape[1])
        return -logistic_mixture_nll(params, images.to(torch.uint8), levels=self.levels).unsqueeze(1)

    def draw(self, params: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        channels = uniforms.shape[1] - 1
        mixture = self._mixture(params, channels, temperature)
        component = (mixture.cdf < uniforms[:, :1]).sum(1, keepdim=True)
        encoding = self.encoding().double().to(params.device)
        drawn: list[Tensor] = []
        for c in range(channels):
            mean = mixture.mean(c, [encoding[level.long()] for level in drawn]).gather(1, component)
            scale = mixture.scales[:, c].gather(1, component)
            x = mean + scale * torch.logit(uniforms[:, 1 + c : 2 + c].double())
            drawn.append(self._nearest(x))
        return torch.cat(drawn, dim=1).to(torch.uint8)

    def boundaries(self, params: Tensor, images: Tensor, temperature: float = 1.0) -> Tensor:
        """[N, (1 + 2*C) * components, H, W]: the cumulative mixture probabilities, then for each colour the lower and
        the upper bound of its level in every component.
        """
        channels = images.shape[1]
        mixture = self._mixture(params, channels, temperature)
        values = self.encode(images).double()
        result = [mixture.cdf]
        for c in range(channels):
            level, step = images[:, c : c + 1].double(), 2.0 / (self.levels - 1)
            mean = mixture.mean(c, [values[:, i : i + 1] for i in range(c)])
            for edge in (level - 0.5, level + 0.5):
                inner = torch.sigmoid((edge * step - 1.0 - mean) / mixture.scales[:, c])
                result.append(torch.where(edge < 0, 0.0, torch.where(edge > self.levels - 1, 1.0, inner)))
        return torch.cat(result, dim=1)

    def margins(self, boundaries: Tensor, images: Tensor, uniforms: Tensor) -> Tensor:
        """[N, 1, H, W]: the smallest, over the components that might have been picked, of the largest distance of a
        uniform from its interval.
        """
        cdf, *bounds = boundaries.split(self.components, dim=1)
        lower = torch.cat([torch.zeros_like(cdf[:, :1]), cdf[:, :-1]], dim=1)
        distance = outside(lower, cdf, uniforms[:, :1])
        for c in range(images.shape[1]):
            own = outside(bounds[2 * c], bounds[2 * c + 1], uniforms[:, 1 + c : 2 + c])
            distance = torch.maximum(distance, own)
        return distance.amin(1, keepdim=True)

    def _nearest(self, x: Tensor) -> Tensor:
        """The level whose bin holds x; a bin holds its upper bound."""
        return ((x + 1.0) * ((self.levels - 1) / 2) - 0.5).ceil().clamp(0, self.levels - 1)

    def _mixture(self, params: Tensor, channels: int, temperature: float) -> _Mixture:
        self._check(params, channels)
        logits, means, log_scales, coefficients = split_params(params.double(), channels)
        cdf = torch.softmax(logits / temperature, dim=1).cumsum(1)
        cdf[:, -1:] = 1.0
        scales = temperature * log_scales.clamp(MIN_LOG_SCALE, _MAX_LOG_SCALE).exp()
        return _Mixture(cdf, means, scales, coefficients)

    def _check(self, params: Tensor, channels: int) -> None:
        if params.shape[1] != self.num_params(channels):
            raise ValueError(
                f"the network gives {params.shape[1]} output channels; {self} needs {self.num_params(channels)} for "
                f"{channels}-channel images"
            )


class _Mixture(NamedTuple):
    """float64. cdf: [N, components, ...]; means, scales, coefficients: [N, C, components, ...]."""

    cdf: Tensor
    means: Tensor
    scales: Tensor
    coefficients: Tensor

    def mean(self, colour: int, earlier: list[Tensor]) -> Tensor:
        """[N, components, ...] of a colour, given the encoded values [N, 1, ...] of the colours before it."""
        mean = self.means[:, colour]
        for i, value in enumerate(earlier):
            mean = mean + self.coefficients[:, i + colour - 1] * value
        return mean
