"""Output heads: what a network's outputs mean, and how a level is drawn from them.

A head maps network outputs (its *parameters*) to a distribution over the levels ``0..levels-1`` of one image element,
and levels to the floats that the network reads.  Parameters are colour-major: channels ``[c*K, (c+1)*K)`` of the
network's output belong to colour channel ``c``, with ``K = params_per_channel``.

Drawing is by inversion of the cumulative distribution with one uniform per element (the draw table of
`fastgen.ops.philox`), so the drawn level is a function of (parameters, uniform) alone.  `draw` is the definition;
executors follow it, and differ only where two float sums round to different sides of a decision.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Head:
    """A distribution over the levels of one image element.

    Attributes:
        levels: number of levels K; images hold the integers 0..K-1.
        params_per_channel: network outputs per colour channel.
    """

    levels: int
    params_per_channel: int

    def __init__(self, levels: int, params_per_channel: int, input_range: tuple[float, float]):
        if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= 256:
            raise ValueError(f"levels must be an integer in 2..256, got {levels!r}")
        low, high = input_range
        self.levels = levels
        self.params_per_channel = params_per_channel
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

    def _split(self, params: Tensor) -> Tensor:
        """[N, C*K, ...] -> [N, C, K, ...]."""
        if params.shape[1] % self.params_per_channel:
            raise ValueError(
                f"the network gives {params.shape[1]} output channels; {self} needs a multiple of "
                f"{self.params_per_channel}"
            )
        return params.unflatten(1, (-1, self.params_per_channel))

    def log_prob(self, params: Tensor, images: Tensor) -> Tensor:
        """Log-probability in nats of each element: params [N, C*K, H, W], levels [N, C, H, W] -> [N, C, H, W]."""
        raise NotImplementedError

    def cdf(self, params: Tensor, temperature: float = 1.0) -> Tensor:
        """Cumulative probabilities, float64: params [N, C*K, ...] -> [N, C, levels, ...], last one exactly 1."""
        raise NotImplementedError

    def draw(self, params: Tensor, uniform: Tensor, temperature: float = 1.0) -> Tensor:
        """Draw by inversion: the smallest level whose cumulative probability is at least ``uniform``.

        Args:
            params: [N, C*K, ...] network outputs.
            uniform: [N, C, ...] in (0, 1).
            temperature: > 0; divides the logits.

        Returns:
            uint8 levels [N, C, ...].
        """
        cdf = self.cdf(params, temperature)
        return (cdf < uniform.unsqueeze(2)).sum(2).to(torch.uint8)


class Categorical(Head):
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


class Bernoulli(Head):
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
