"""Losses: operations of `fastgen.ops` that models are trained with, likelihoods of images, adversarial losses."""

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
from fastgen.losses.likelihoods import bernoulli_nll, categorical_nll, discretized_logistic_nll, gaussian_nll
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
    "bernoulli_nll",
    "categorical_nll",
    "discretized_logistic_nll",
    "gaussian_nll",
    "gradient_penalty",
    "logistic_mixture_nll",
]
