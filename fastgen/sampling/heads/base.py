"""What a head is.

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
from torch import Tensor

from fastgen.sampling.truncation import Truncation


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
        input_range: network input of the first and of the last level; None: the network reads the levels themselves.
        dtype: of images: uint8, or int64 for more than 256 levels.
    """

    levels: int
    max_levels = 256

    def __init__(self, levels: int, input_range: tuple[float, float] | None):
        if isinstance(levels, bool) or not isinstance(levels, int) or not 2 <= levels <= self.max_levels:
            raise ValueError(f"levels must be an integer in 2..{self.max_levels}, got {levels!r}")
        self.levels = levels
        self.input_range = None if input_range is None else (float(input_range[0]), float(input_range[1]))
        self.dtype = torch.uint8 if levels <= 256 else torch.int64

    def __repr__(self) -> str:
        return f"{type(self).__name__}(levels={self.levels}, input_range={self.input_range})"

    def encoding(self) -> Tensor:
        """The network input of each level: float32 [levels] on the CPU, evenly spaced over ``input_range``."""
        low, high = (0, self.levels - 1) if self.input_range is None else self.input_range
        return (
            torch.arange(self.levels, dtype=torch.float64, device="cpu") * ((high - low) / (self.levels - 1)) + low
        ).float()

    def encode(self, images: Tensor) -> Tensor:
        """Levels [N, C, H, W] (any integer dtype) -> network input of the same shape, float32 (int64 where the network
        reads levels).
        """
        if self.input_range is None:
            return images.long()
        return self.encoding().to(images.device)[images.long()]

    def keeping(self, truncation: Truncation) -> Head:
        """The head that draws from the likeliest levels alone.

        Raises:
            ValueError: levels of this head have no probabilities of their own.
        """
        if truncation:
            raise ValueError(f"top_k and top_p are for Categorical heads, got {self}")
        return self

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
            levels [N, colours, ...] of `dtype`.
        """
        raise NotImplementedError

    def boundaries(self, params: Tensor, images: Tensor, temperature: float = 1.0) -> Tensor:
        """The cumulative probabilities that uniforms were compared with if `draw` gave these levels.

        Args:
            params: [N, parameters, H, W].
            images: levels [N, C, H, W].
            temperature: as for `draw`.

        Returns:
            float64 [N, ..., H, W], for `margins`.
        """
        raise NotImplementedError

    def margins(self, boundaries: Tensor, images: Tensor, uniforms: Tensor) -> Tensor:
        """How far, in probability, uniforms lie outside the region that draws these levels; 0 inside.

        Args:
            boundaries: of the same images.
            images: levels [N, C, H, W].
            uniforms: [N, num_uniforms(C), H, W].

        Returns:
            float64 [N, C, H, W], or [N, 1, H, W] where the colours of a pixel are drawn together.
        """
        raise NotImplementedError


def outside(lower: Tensor, upper: Tensor, uniforms: Tensor) -> Tensor:
    """The distance of uniforms from the interval (lower, upper], 0 inside."""
    below = torch.where(uniforms <= lower, lower - uniforms, 0.0)
    # A uniform equal to the lower bound draws the level below: a margin of its own rounding.
    below = torch.where(uniforms == lower, torch.finfo(torch.float64).tiny, below)
    return torch.maximum(below, uniforms - upper).clamp(min=0)
