"""Draws of the likeliest levels alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from numbers import Real

import torch
from torch import Tensor

from fastgen._arguments import integer

NEAR = 1e-5  # probabilities of the last kept level that differ by less may be in another order for an executor


@dataclass(frozen=True)
class Truncation:
    """Which levels of a `Categorical` head are drawn at all; the probabilities of the others are shared out.

    top_k: only so many, the likeliest (Fan, Lewis, Dauphin 2018, "Hierarchical Neural Story Generation", section 5.1).
    top_p: of these the fewest whose probabilities sum to at least so much of theirs (Holtzman et al. 2020, "The Curious
    Case of Neural Text Degeneration", section 3.1).
    slack: takes part of the threshold of both, to find draws that rounding decides.

    With the last one that is kept, all levels are that are as likely as it.
    """

    top_k: int | None = None
    top_p: float = 1.0
    slack: float = 0.0

    def __bool__(self) -> bool:
        """Whether some levels may be left out."""
        return self.top_k is not None or self.top_p < 1

    def of(self, probabilities: Tensor) -> Tensor:
        """Probabilities [N, C, levels, ...], float64, of what is kept."""
        p = probabilities
        if self.top_k is not None and self.top_k < p.shape[2]:
            p = self._from(p, p.topk(self.top_k, dim=2).values[:, :, -1:])
        if self.top_p < 1:
            ordered = p.sort(dim=2, descending=True).values
            sums = ordered.cumsum(2)
            enough = sums >= (self.top_p + self.slack) * sums[:, :, -1:]
            enough[:, :, -1] = True
            p = self._from(p, ordered.gather(2, enough.int().argmax(2, keepdim=True)))
        return p / p.sum(2, keepdim=True)

    def _from(self, p: Tensor, least: Tensor) -> Tensor:
        return torch.where(p >= torch.minimum(least * (1 - self.slack), p.amax(2, keepdim=True)), p, 0.0)

    def nearby(self) -> list[Truncation]:
        """Where rounding may have put the threshold."""
        return [replace(self, slack=slack) for slack in (NEAR, -NEAR)] if self else []


EVERY_LEVEL = Truncation()


def make_truncation(top_k: int | None, top_p: float | None) -> Truncation:
    """
    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    top_k = None if top_k is None else integer("top_k", top_k, 1, 2**31 - 1)
    if top_p is None:
        return Truncation(top_k)
    if isinstance(top_p, bool) or not isinstance(top_p, Real):
        raise TypeError(f"top_p must be a number, got {type(top_p).__name__}")
    if not 0 < top_p <= 1 or math.isnan(top_p):
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    return Truncation(top_k, float(top_p))
