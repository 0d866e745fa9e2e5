"""Frechet distance and Inception score of features, with jackknife estimates of standard error and bias."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPLITS = 10


@dataclass(frozen=True)
class Estimate:
    """A score of a sample of images.

    Attributes:
        value: of the sample, as it is customarily given.
        error: its standard error, by which it varies between samples of this size.
        bias: how far it is, on average, above (below, if negative) that of infinitely many images.
    """

    value: float
    error: float
    bias: float

    def __str__(self) -> str:
        digits = 2 if not 0 < self.error < 0.05 else min(6, 1 - math.floor(math.log10(self.error)))
        return f"{self.value:.{digits}f} ± {self.error:.{digits}f}"


def frechet_distance(real: Tensor, fake: Tensor, *, splits: int = SPLITS) -> Estimate:
    """Frechet distance between normal distributions with the moments of two samples of features.

    ||m_r - m_f||^2 + tr(C_r + C_f - 2 (C_r C_f)^(1/2)): on Inception's features the FID of Heusel et al. 2017
    (1706.08500).  It is biased: finite samples of one distribution, too, lie apart, the more so the fewer images and
    the more features there are (Binkowski et al. 2018, 1801.01401).  So compare values for samples of one size only,
    and read `bias`, which is of first order in 1/N and worth little where there are fewer images than features.

    Args:
        real, fake: floating point [N, D], [M, D]; computed in float64.
        splits: groups that the jackknife leaves out in turn, of each sample: 2..min(N, M) - 1.

    Raises:
        TypeError, ValueError: the features or the splits are not as above, or not finite.
        RuntimeError: torchmetrics is missing.
    """
    for name, features in (("real", real), ("fake", fake)):
        _check(name, features, splits)
    if real.shape[1] != fake.shape[1]:
        raise ValueError(f"real and fake: expected as many features, got {real.shape[1]} and {fake.shape[1]}")
    return _jackknife(_frechet, (real.double(), fake.double()), splits)


def inception_score(logits: Tensor, *, splits: int = SPLITS) -> Estimate:
    """exp of the mean Kullback-Leibler divergence of p(y|x) from p(y) (Salimans et al. 2016, 1606.03498, section 4).

    Between 1 and the number of classes, which is reached by sure and evenly spread predictions.  The value is that of
    the whole sample, not the mean over ten parts that is often given, which is lower.

    Args:
        logits: floating point [N, K], of the classes of each image; computed in float64.
        splits: groups that the jackknife leaves out in turn: 2..N - 1.

    Raises:
        TypeError, ValueError: the logits or the splits are not as above, or not finite.
        RuntimeError: torchmetrics is missing.
    """
    _check("logits", logits, splits)
    return _jackknife(_inception, (logits.double(),), splits)


def _jackknife(score: Callable[..., float], samples: Sequence[Tensor], splits: int) -> Estimate:
    """Standard error and bias by leaving out one group of a sample at a time (Efron & Tibshirani 1993, chapter 11).

    Samples are independent of each other, so their variances and biases add up.  Groups are consecutive: generated
    images may have their classes in turn, and a group should hold all of them.
    """
    value = score(*samples)
    variance = bias = 0.0
    for index, sample in enumerate(samples):
        parts = sample.tensor_split(splits)
        left = []
        for out in range(splits):
            kept = torch.cat([part for number, part in enumerate(parts) if number != out])
            left.append(score(*samples[:index], kept, *samples[index + 1 :]))
        mean = sum(left) / splits
        variance += (splits - 1) / splits * sum((x - mean) ** 2 for x in left)
        bias += (splits - 1) * (mean - value)
    return Estimate(value, math.sqrt(variance), bias)


def _frechet(real: Tensor, fake: Tensor) -> float:
    metric = torchmetrics_image().fid.FrechetInceptionDistance(feature=_Given(real.shape[1]))
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return float(metric.compute())


def _inception(logits: Tensor) -> float:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # it shuffles, which a single part does not need
        warnings.simplefilter("ignore")  # of the memory of the features, and of a deviation between parts
        metric = torchmetrics_image().inception.InceptionScore(feature=_Given(logits.shape[1]), splits=1)
        metric.update(logits)
        return float(metric.compute()[0])


class _Given(torch.nn.Module):
    """A network, for torchmetrics, whose features are its input."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def torchmetrics_image() -> Any:
    """torchmetrics' modules for images.

    Raises:
        RuntimeError: torchmetrics is missing.
    """
    try:
        import torchmetrics.image.fid
        import torchmetrics.image.inception
    except ImportError as error:
        raise RuntimeError(f"scores need torchmetrics: pip install 'fastgen[scores]' ({error})") from error
    return torchmetrics.image


def _check(name: str, features: Tensor, splits: int) -> None:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        found = features.dtype if isinstance(features, Tensor) else type(features).__name__
        raise TypeError(f"{name}: expected a floating point tensor [N, D], got {found}")
    if features.dim() != 2 or 0 in features.shape:
        raise ValueError(f"{name}: expected shape [N, D], got {list(features.shape)}")
    if not torch.isfinite(features).all():
        raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    if isinstance(splits, bool) or not isinstance(splits, int) or not 2 <= splits < len(features):
        raise ValueError(f"splits: expected an integer in 2..{len(features) - 1} for [N, D] {name}, got {splits!r}")
