"""Measures of how good a model is."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from fastgen.sampling.precision import weights_in
from fastgen.sampling.subject import evaluating, private


def bits_per_dim(
    model: torch.nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
) -> float:
    """Negative log-likelihood in bits per image element, averaged over all elements of all images.

    The model is evaluated in eval mode, without autocast, on the device of its parameters, and left as it was.

    Args:
        model: has ``log_prob(images, labels) -> [n]`` nats per image.
        images: uint8 levels [N, C, H, W], N >= 1.
        labels: int64 [N] for a conditional model.
        batch_size: images per forward pass.
        precision: of the weights, as for `Sampler`.

    Raises:
        TypeError: the model has no likelihood.
        ValueError: there is no image, batch_size is below 1, or the precision is unknown.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if images.numel() == 0:
        raise ValueError(f"images: bits per dimension need at least one image, got shape {list(images.shape)}")
    if not hasattr(model, "log_prob"):
        raise TypeError(f"model: expected one with a likelihood (log_prob), got {type(model).__name__}")
    device = next(model.parameters()).device
    model = private(model)
    nats = 0.0
    with evaluating(model), weights_in(precision):
        for i in range(0, len(images), batch_size):
            batch_labels = None if labels is None else labels[i : i + batch_size].to(device)
            batch_nats = cast(Any, model).log_prob(images[i : i + batch_size].to(device), batch_labels)
            nats += float(batch_nats.double().sum())
    return -nats / (images.numel() * math.log(2))


def two_stages_bits_per_dim(
    vqvae: torch.nn.Module, prior: torch.nn.Module, images: Tensor, labels: Tensor | None = None, **options: Any
) -> tuple[float, float]:
    """The bound of a `models.VQVAE` and a prior over its codes, log p(x | z_q(x)) + log p(z_q(x)), in bits per image
    element, and the share of the codes in it.

    Args:
        vqvae: the first stage.
        prior: has ``log_prob(codes, labels) -> [n]`` nats.
        images, labels, options: as for `bits_per_dim`; labels are the prior's.  Weights of both are in the precision.
    """
    both, codes = _TwoStages(vqvae, prior, whole=True), _TwoStages(vqvae, prior, whole=False)
    return bits_per_dim(both, images, labels, **options), bits_per_dim(codes, images, labels, **options)


class _TwoStages(torch.nn.Module):
    """whole: or the codes alone."""

    def __init__(self, vqvae: torch.nn.Module, prior: torch.nn.Module, whole: bool) -> None:
        super().__init__()
        self.vqvae, self.prior, self.whole = vqvae, prior, whole

    def log_prob(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        vqvae, prior = cast(Any, self.vqvae), cast(Any, self.prior)
        codes = vqvae.encode(images)
        nats = prior.log_prob(codes, labels)
        return vqvae.log_likelihood(images, codes) + nats if self.whole else nats
