"""Output heads: what a network's outputs mean, and how a level is drawn from them."""

from __future__ import annotations

from fastgen.sampling.heads.base import Group, Head
from fastgen.sampling.heads.colour_wise import Bernoulli, Categorical, ColourWise
from fastgen.sampling.heads.logistic_mixture import LogisticMixture

__all__ = ["Bernoulli", "Categorical", "ColourWise", "Group", "Head", "LogisticMixture"]
