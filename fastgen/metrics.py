"""Measures of how good a model is."""

from __future__ import annotations

import inspect
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
        RuntimeError: the likelihood of an image is NaN.
    """
    return float(_bits_per_dim(model, images, labels, batch_size, precision))


def two_stages_bits_per_dim(
    vqvae: torch.nn.Module,
    prior: torch.nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    batch_size: int = 64,
    precision: str = "fp32",
) -> tuple[float, float]:
    """The bound of a `models.VQVAE` and a prior over its codes, log p(x | z_q(x)) + log p(z_q(x)), in bits per image
    element, and the share of the codes in it.

    Args:
        vqvae: the first stage.
        prior: has ``log_prob(codes, labels) -> [n]`` nats.
        images, labels, batch_size, precision: as for `bits_per_dim`; labels are the prior's, the precision is of both.
    """
    both, of_codes = _bits_per_dim(_TwoStages(vqvae, prior), images, labels, batch_size, precision).tolist()
    return both, of_codes


class _TwoStages(torch.nn.Module):
    """``log_prob``: [N, 2] nats, of the whole and of the codes alone."""

    def __init__(self, vqvae: torch.nn.Module, prior: torch.nn.Module) -> None:
        super().__init__()
        self.vqvae, self.prior = vqvae, prior

    def log_prob(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        vqvae, prior = cast(Any, self.vqvae), cast(Any, self.prior)
        codes = vqvae.encode(images)
        of_codes = prior.log_prob(codes, labels)
        return torch.stack((vqvae.log_likelihood(images, codes) + of_codes, of_codes), dim=1)


def _bits_per_dim(
    model: torch.nn.Module, images: Tensor, labels: Tensor | None, batch_size: int, precision: str
) -> Tensor:
    """`bits_per_dim` of each column of ``log_prob``: float64, [] for [n], [k] for [n, k]."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if images.numel() == 0:
        raise ValueError(f"images: bits per dimension need at least one image, got shape {list(images.shape)}")
    if not hasattr(model, "log_prob"):
        raise TypeError(f"model: expected one with a likelihood (log_prob), got {type(model).__name__}")
    device = next(model.parameters()).device
    model = private(model)
    log_prob = cast(Any, model).log_prob
    noisy = "start" in inspect.signature(log_prob).parameters  # of latents: every image has its own, in whatever batch
    nats = []
    with evaluating(model), weights_in(precision):
        for i in range(0, len(images), batch_size):
            batch_labels = None if labels is None else labels[i : i + batch_size].to(device)
            batch_nats = log_prob(
                images[i : i + batch_size].to(device), batch_labels, **({"start": i} if noisy else {})
            )
            nats.append(batch_nats.double().sum(0).cpu())
    bits = -torch.stack(nats).sum(0) / (images.numel() * math.log(2))
    if bits.isnan().any():
        raise RuntimeError("the likelihood of an image is NaN")
    return bits
