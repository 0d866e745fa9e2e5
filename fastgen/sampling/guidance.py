"""Classifier-free guidance: logits that are led away from those of nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from fastgen.sampling.heads import ColourWise, Head
from fastgen.sampling.subject import Conditions


@dataclass(frozen=True)
class Guidance:
    """The logits of a sample become null + scale * (logits - null), null being those of the same pixels for other
    labels or another condition, as a rule those of nothing: Ho and Salimans 2022, "Classifier-Free Diffusion Guidance",
    equation 6, whose w is scale - 1; with autoregressive models, Gafni et al. 2022, "Make-A-Scene".

    labels, conditions: of nothing, for each sample.
    """

    scale: float
    labels: Tensor | None
    conditions: Conditions

    def of(self, params: Tensor, null: Tensor) -> Tensor:
        """In the dtype of both. What `null` forbids, by -inf, stays forbidden."""
        return torch.where(null == -torch.inf, null, null + self.scale * (params - null))


def check_scale(scale: float, head: Head) -> float:
    """
    Raises:
        TypeError, ValueError: it is no number, or the head's parameters are no logits.
    """
    if isinstance(scale, bool) or not isinstance(scale, Real):
        raise TypeError(f"guidance_scale must be a number, got {type(scale).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"guidance_scale must be finite, got {scale}")
    if scale != 1 and not isinstance(head, ColourWise):
        raise ValueError(f"guidance_scale must be 1 for {head}, whose parameters are not logits, got {scale}")
    return float(scale)
