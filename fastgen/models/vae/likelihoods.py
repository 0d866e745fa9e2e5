"""What a decoder's output says about an image: channels of the output, likelihood of levels, mean image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastgen import losses
from fastgen.ops.logistic_mixture_nll import split_params

NAMES = ("bernoulli", "gaussian", "logistic", "categorical")


class Likelihood:
    """p(image | parameters), the elements independent but for the colours of `Logistic`.

    Attributes:
        channels: of the parameters, [N, channels, H, W].
    """

    channels: int

    def __init__(self, image_channels: int, levels: int) -> None:
        self.image_channels, self.levels = image_channels, levels
        self.channels = image_channels

    def nll(self, params: Tensor, images: Tensor) -> Tensor:
        """Parameters [N, channels, H, W], levels uint8 [N, C, H, W] -> [N] nats."""
        raise NotImplementedError

    def mean(self, params: Tensor) -> Tensor:
        """Parameters -> [N, C, H, W]: the expected image, levels as 0..1."""
        raise NotImplementedError

    def mean_levels(self, params: Tensor) -> Tensor:
        """Parameters -> uint8 [N, C, H, W]: the levels nearest to the expected image.

        Raises:
            RuntimeError: it holds NaN or infinity.
        """
        x = self.mean(params)
        if not torch.isfinite(x).all():
            raise RuntimeError("the decoded images hold NaN or infinity: are the weights finite?")
        return (x * (self.levels - 1)).round().clamp(0, self.levels - 1).to(torch.uint8)

    def scaled(self, images: Tensor, like: Tensor) -> Tensor:
        """Levels as 0..1, in the dtype of another tensor."""
        return images.to(like.dtype) * (1.0 / (self.levels - 1))


class Bernoulli(Likelihood):
    """Elements are on or off.  Levels between count as probabilities: a bound of the likelihood of drawing them."""

    def nll(self, params: Tensor, images: Tensor) -> Tensor:
        return losses.bernoulli_nll(params, self.scaled(images, params))

    def mean(self, params: Tensor) -> Tensor:
        return torch.sigmoid(params)


class Gaussian(Likelihood):
    """A normal density over levels in 0..1, of a fixed scale, or of one learned for each element.

    Learned scales are at least half a level: the density of constant pixels would grow without limit.
    """

    def __init__(self, image_channels: int, levels: int, scale: float | None) -> None:
        super().__init__(image_channels, levels)
        self.log_scale = None if scale is None else math.log(scale)
        self.channels = image_channels * (2 if scale is None else 1)

    def nll(self, params: Tensor, images: Tensor) -> Tensor:
        mean, log_scale = params, self.log_scale
        if log_scale is None:
            mean, raw = params.chunk(2, dim=1)
            return losses.gaussian_nll(mean, self.scaled(images, params), raw.clamp(min=-math.log(2 * self.levels - 2)))
        return losses.gaussian_nll(mean, self.scaled(images, params), log_scale)

    def mean(self, params: Tensor) -> Tensor:
        return params[:, : self.image_channels]


class Logistic(Likelihood):
    """The discretised logistic distribution; the mean of a colour depends linearly on the colours before it."""

    def __init__(self, image_channels: int, levels: int) -> None:
        super().__init__(image_channels, levels)
        self.channels = 10 if image_channels == 3 else 3

    def nll(self, params: Tensor, images: Tensor) -> Tensor:
        return losses.discretized_logistic_nll(params, images, levels=self.levels)

    def mean(self, params: Tensor) -> Tensor:
        _, means, _, coefficients = split_params(params, self.image_channels)
        colours = list(means[:, :, 0].unbind(1))  # in -1..1
        if len(colours) == 3:
            in_green, red_in_blue, green_in_blue = coefficients[:, :, 0].unbind(1)
            colours[1] = colours[1] + in_green * colours[0]
            colours[2] = colours[2] + red_in_blue * colours[0] + green_in_blue * colours[1]
        return (torch.stack(colours, dim=1) + 1) / 2


class Categorical(Likelihood):
    """Any distribution over the levels of an element."""

    def __init__(self, image_channels: int, levels: int) -> None:
        super().__init__(image_channels, levels)
        self.channels = image_channels * levels

    def nll(self, params: Tensor, images: Tensor) -> Tensor:
        return losses.categorical_nll(self._logits(params), images)

    def mean(self, params: Tensor) -> Tensor:
        level = torch.linspace(0, 1, self.levels, dtype=params.dtype, device=params.device)
        return torch.einsum("nkchw,k->nchw", torch.softmax(self._logits(params), dim=1), level)

    def _logits(self, params: Tensor) -> Tensor:
        return params.unflatten(1, (self.levels, self.image_channels))


def make(name: str, image_channels: int, levels: int, scale: float | None) -> Likelihood:
    """
    Raises:
        ValueError: the image has neither 1 nor 3 channels, the name is not one of `NAMES`, or the scale is not above 0
            or not of a Gaussian.
    """
    if image_channels not in (1, 3):
        raise ValueError(f"image_shape: expected 1 or 3 channels, got {image_channels}")
    if name not in NAMES:
        raise ValueError(f"likelihood: expected one of {', '.join(NAMES)}, got {name!r}")
    if scale is not None and (name != "gaussian" or isinstance(scale, bool) or not scale > 0):
        raise ValueError(f"scale: expected None, or a number above 0 for a gaussian likelihood, got {scale!r}")
    if name == "gaussian":
        return Gaussian(image_channels, levels, scale)
    return {"bernoulli": Bernoulli, "logistic": Logistic, "categorical": Categorical}[name](image_channels, levels)
