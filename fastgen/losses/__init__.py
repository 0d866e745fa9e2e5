"""Losses: the operations of `fastgen.ops` that models are trained with, and the adversarial losses."""

from __future__ import annotations

from fastgen.losses.gan import (
    AdversarialLoss,
    BEGANLoss,
    HingeLoss,
    LeastSquaresLoss,
    MinimaxLoss,
    NonSaturatingLoss,
    WassersteinGPLoss,
    WassersteinLoss,
    gradient_penalty,
)
from fastgen.ops.logistic_mixture_nll import logistic_mixture_nll

__all__ = [
    "AdversarialLoss",
    "BEGANLoss",
    "HingeLoss",
    "LeastSquaresLoss",
    "MinimaxLoss",
    "NonSaturatingLoss",
    "WassersteinGPLoss",
    "WassersteinLoss",
    "gradient_penalty",
    "logistic_mixture_nll",
]
