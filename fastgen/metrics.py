"""Measures of how good a model is."""

from __future__ import annotations

import inspect
import math
from typing import Any, cast

import torch
from torch import Tensor

from fastgen.sampling.heads import Head
from fastgen.sampling.precision import weights_in
from fastgen.sampling.request import Condition, images_of, make_request
from fastgen.sampling.subject import Conditions, Subject, evaluating, make_subject, private


def bits_per_dim(
    model: torch.nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    image_shape: tuple[int, ...] | None = None,
    head: Head | None = None,
    num_classes: int | None = None,
    condition: Condition | None = None,
    batch_size: int = 64,
    precision: str = "fp32",
) -> float:
    """Negative log-likelihood in bits per image element, averaged over all elements of all images.

    The model is evaluated in eval mode, without autocast, on the device of its parameters, and left as it was.

    Args:
        model: has ``log_prob(images, labels) -> [n]`` nats per image; or it is any network that a `Sampler` takes, with
            what is said of it there.
        images: uint8 levels [N, C, H, W], N >= 1; int64 where there are more than 256.
        labels: int64 [N] for a conditional model.
        image_shape, head, num_classes: of a network, as for `Sampler`.
        condition: of a network that reads one, as for `Sampler`: tensors [N, ...], or [1, ...] for all images.
        batch_size: images per forward pass.
        precision: of the weights, as for `Sampler`.

    Raises:
        TypeError: the model has no likelihood.
        ValueError: there is no image, batch_size is below 1, or the precision is unknown; or the images, labels or
            condition are not those of the network.
        RuntimeError: the likelihood of an image is NaN.
    """
    named = any(given is not None for given in (image_shape, head, num_classes, condition))
    if named or not hasattr(model, "log_prob"):
        if head is None and getattr(model, "head", None) is None:
            raise TypeError(
                "model: expected one with a likelihood (log_prob), or a network and its head, got "
                f"{type(model).__name__}"
            )
        model = _Network(make_subject(model, image_shape, head, num_classes))
        images = images_of("images", images, model.subject)
        request = make_request(model.subject, len(images), labels=labels, condition=condition)
        return float(_bits_per_dim(model, images, request.labels, batch_size, precision, request.conditions))
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


class _Network(torch.nn.Module):
    """``log_prob`` of a network, by what its head makes of its outputs."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()
        self.network, self.subject = subject.module, subject

    def log_prob(self, images: Tensor, labels: Tensor | None, conditions: Conditions) -> Tensor:
        params = self.subject.params(images, labels, conditions).float()
        return self.subject.head.log_prob(params, images).sum((1, 2, 3))


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
    model: torch.nn.Module,
    images: Tensor,
    labels: Tensor | None,
    batch_size: int,
    precision: str,
    conditions: Conditions | None = None,
) -> Tensor:
    """`bits_per_dim` of each column of ``log_prob``: float64, [] for [n], [k] for [n, k]."""
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    if images.numel() == 0:
        raise ValueError(f"images: bits per dimension need at least one image, got shape {list(images.shape)}")
    device = next((p.device for p in model.parameters()), images.device)
    model = private(model)
    log_prob = cast(Any, model).log_prob
    noisy = "start" in inspect.signature(log_prob).parameters  # of latents: every image has its own, in whatever batch
    nats = []
    with evaluating(model), weights_in(precision):
        for i in range(0, len(images), batch_size):
            given: dict[str, Any] = {"start": i} if noisy else {}
            if conditions is not None:
                given["conditions"] = {key: value[i : i + batch_size] for key, value in conditions.items()}
            batch_labels = None if labels is None else labels[i : i + batch_size].to(device)
            batch_nats = log_prob(images[i : i + batch_size].to(device), batch_labels, **given)
            nats.append(batch_nats.double().sum(0).cpu())
    bits = -torch.stack(nats).sum(0) / (images.numel() * math.log(2))
    if bits.isnan().any():
        raise RuntimeError("the likelihood of an image is NaN")
    return bits
