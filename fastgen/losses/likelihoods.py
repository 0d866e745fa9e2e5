"""Negative log-likelihoods of images under what a decoder says of them: [N] nats, summed over each image.

Which of them are kernels was measured (bench/LOG.md): in a training step the others take a few per cent.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.ops import logistic_mixture_nll


def bernoulli_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-sum of x log p + (1 - x) log(1 - p), p = sigmoid(logits).

    Args:
        logits: [N, ...], floating.
        targets: [N, ...] of the same dtype, in 0..1; values between count as probabilities.

    Returns:
        [N]; finite, and so are the gradients, for all finite logits.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes("targets", targets, logits)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").flatten(1).sum(1)


def gaussian_nll(mean: Tensor, targets: Tensor, log_scale: Tensor | float) -> Tensor:
    """Of independent normal densities: sum of ((x - mean) / scale)^2 / 2 + log scale + log(2 pi) / 2.

    Args:
        mean: [N, ...], floating.
        targets: [N, ...] of the same dtype.
        log_scale: logarithm of the standard deviation: a number, or a tensor that broadcasts to [N, ...].

    Returns:
        [N].  A density may be above 1, so this may be negative.

    Raises:
        ValueError: the shapes differ.
    """
    _check_shapes("targets", targets, mean)
    log_scale = torch.as_tensor(log_scale, dtype=mean.dtype, device=mean.device)
    terms = 0.5 * ((targets - mean) * torch.exp(-log_scale)) ** 2 + (log_scale + 0.5 * math.log(2 * math.pi))
    return terms.flatten(1).sum(1)


def discretized_logistic_nll(params: Tensor, images: Tensor, *, levels: int = 256) -> Tensor:
    """`ops.logistic_mixture_nll` summed over each image; one component makes it the discretised logistic distribution.

    Args:
        params: [N, P, H, W], see there: for one component 3 channels of grey images and 10 of colour images.
        images: uint8 levels [N, C, H, W], C 1 or 3.
        levels: 2..256.
    """
    return logistic_mixture_nll(params, images, levels=levels).flatten(1).sum(1)


def categorical_nll(logits: Tensor, images: Tensor) -> Tensor:
    """Of independent levels: -sum of log softmax(logits)[level].

    Args:
        logits: [N, K, C, H, W], floating.
        images: levels [N, C, H, W], integers in 0..K-1.

    Returns:
        [N].

    Raises:
        ValueError: the shapes do not fit.
    """
    expected = (*logits.shape[:1], *logits.shape[2:])
    if images.shape != expected:
        raise ValueError(f"images: expected shape {list(expected)} as the logits have, got {list(images.shape)}")
    return F.cross_entropy(logits, images.long(), reduction="none").flatten(1).sum(1)


def _check_shapes(name: str, value: Tensor, like: Tensor) -> None:
    if value.shape != like.shape:
        raise ValueError(f"{name}: expected shape {list(like.shape)}, got {list(value.shape)}")
