"""Output heads: what a network's outputs mean, and how a level is drawn from them.

A head maps network outputs (its *parameters*) to a distribution over the levels ``0..levels-1`` of the elements of a
pixel, and levels to what the network reads.  The colours of a pixel are drawn in *groups*, one after the other: the
parameters of a group may depend on all groups before it.

Drawing is by inversion with the uniforms of the draw table of `fastgen.ops.philox`, so the drawn levels are a function
of (parameters, uniforms) alone.  `draw` is the definition; executors follow it, and differ only where two float sums
round to different sides of a decision.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """Colours of a pixel that are drawn together.

    colours: image channels. params: output channels of the network that they are drawn from. uniforms: which of the
    pixel's uniforms.
    """

    colours: range
    params: range
    uniforms: range


class Head:
    """A distribution over the levels of the elements of a pixel.

    Attributes:
        levels: number of levels K; images hold the integers 0..K-1.
    """

    levels: int

    def __init__(self, levels: int, input_range: tuple[float, float]):
        if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= 256:
            raise ValueError(f"levels must be an integer in 2..256, got {levels!r}")
        low, high = input_range
        self.levels = levels
        self.input_range = (float(low), float(high))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(levels={self.levels}, input_range={self.input_range})"

    def encoding(self) -> Tensor:
        """The network input of each level: float32 [levels] on the CPU, evenly spaced over ``input_range``."""
        low, high = self.input_range
        return (
            torch.arange(self.levels, dtype=torch.float64, device="cpu") * ((high - low) / (self.levels - 1)) + low
        ).float()

    def encode(self, images: Tensor) -> Tensor:
        """Levels [N, C, H, W] (any integer dtype) -> float32 network input of the same shape."""
        return self.encoding().to(images.device)[images.long()]

    def groups(self, channels: int) -> list[Group]:
        """The groups of a pixel with `channels` colours, in the order in which they are drawn."""
        raise NotImplementedError

    def num_params(self, channels: int) -> int:
        """Output channels of a network for images with `channels` colours."""
        return self.groups(channels)[-1].params.stop

    def num_uniforms(self, channels: int) -> int:
        """Uniforms that a pixel with `channels` colours is drawn with."""
        return self.groups(channels)[-1].uniforms.stop

    def log_prob(self, params: Tensor, images: Tensor) -> Tensor:
        """Log-probability in nats: params [N, parameters, H, W], levels [N, C, H, W] -> [N, C, H, W], or [N, 1, H, W]
        where the colours of a pixel have no separate probabilities.
        """
        raise NotImplementedError

    def draw(self, params: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        """Draw the colours of a group, or of several groups whose parameters are known.

        Args:
            params: [N, parameters, ...] network outputs.
            uniforms: [N, uniforms, ...] in (0, 1).
            temperature: > 0; divides the logits.

        Returns:
            uint8 levels [N, colours, ...].
        """
        raise NotImplementedError


class ColourWise(Head):
    """Heads that draw one colour after the other, each from `params_per_channel` outputs of its own: channels
    ``[c*K, (c+1)*K)`` of the network's output belong to colour ``c``.  One uniform per element draws the smallest level
    whose cumulative probability is at least the uniform.
    """

    def __init__(self, levels: int, params_per_channel: int, input_range: tuple[float, float]):
        super().__init__(levels, input_range)
        self.params_per_channel = params_per_channel

    def groups(self, channels: int) -> list[Group]:
        count = self.params_per_channel
        return [Group(range(c, c + 1), range(c * count, (c + 1) * count), range(c, c + 1)) for c in range(channels)]

    def draw(self, params: Tensor, uniforms: Tensor, temperature: float = 1.0) -> Tensor:
        cdf = self.cdf(params, temperature)
        return (cdf < uniforms.unsqueeze(2)).sum(2).to(torch.uint8)

    def cdf(self, params: Tensor, temperature: float = 1.0) -> Tensor:
        """Cumulative probabilities, float64: params [N, C*K, ...] -> [N, C, levels, ...], last one exactly 1."""
        raise NotImplementedError

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
        levels: number of levels, 2..256.
        input_range: network input of level 0 and of level ``levels - 1``; the others lie evenly between.
    """

    def __init__(self, levels: int, input_range: tuple[float, float] = (-1.0, 1.0)):
        super().__init__(levels, levels, input_range)

    def log_prob(self, params: Tensor, images: Tensor) -> Tensor:
        logits = self._split(params).transpose(1, 2)  # [N, levels, C, H, W]
        return -F.cross_entropy(logits, images.long(), reduction="none")

    def cdf(self, params: Tensor, temperature: float = 1.0) -> Tensor:
        logits = self._split(params).double() / temperature
        cdf = torch.softmax(logits, dim=2).cumsum(2)
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
