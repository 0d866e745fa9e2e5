"""Training of a variational autoencoder on its evidence lower bound.

A step is a function of (weights, optimiser state, seed, number of the step), as in `fastgen.training.train`; the noise
of the latents, too.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from fastgen.models import VAE
from fastgen.training.batches import Data, check_kind, labels_for, subseed
from fastgen.training.run import SampleGrid
from fastgen.training.state import State
from fastgen.training.trainer import LikelihoodRun, TrainResult
from fastgen.training.vae.config import VAEConfig

VALIDATION_BATCH = 256


def train_vae(
    model: VAE,
    train_data: Data,
    val_data: Data | None,
    config: VAEConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    sample_grid: SampleGrid | None = None,
) -> TrainResult:
    """Trains a variational autoencoder to its limit of steps or seconds, and leaves the best weights in it.

    Weights are averaged over the steps (exponential moving average); the average is validated by its evidence lower
    bound, sampled and kept.  Each line of the log has both terms of the bound, the weight of the divergence, and of
    the validation images the bound and the tighter importance-weighted one (`VAE.log_prob`).  A model that is
    conditioned on a part of the image is given that of the images it is trained on.

    Arguments, result and errors are those of `fastgen.training.train`.
    """
    check_kind(model, VAE, "train_vae")
    run = _Run(_State(model, config), config, train_data, val_data, out, resume, sample_grid)
    return run.train(resume, progress)


class _State(State):
    """What a step makes larger is the bound with the divergence weighted; `figures` are both terms, nats per image, and
    the weight.
    """

    config: VAEConfig

    def __init__(self, model: VAE, config: VAEConfig) -> None:
        super().__init__(model, config)
        self.vae = model

    def log_likelihood(self, images: Tensor, labels: Tensor | None) -> Tensor:
        config, step = self.config, self.step
        seed = subseed(config.seed, "latent", step)
        likelihood, kl = self.vae.elbo_terms(images, labels, num_samples=config.num_samples, seed=seed)
        beta = config.beta_at(step, self.seconds)
        self.figures = {"log_likelihood": likelihood.mean().item(), "kl": kl.mean().item(), "beta": beta}
        return likelihood - beta * kl


class _Run(LikelihoodRun):
    """One call of `train_vae`."""

    state: _State
    config: VAEConfig

    def validate(self, data: Data) -> tuple[float, dict[str, float]]:
        elbo, iwae = bounds(cast(VAE, self.state.average), data, self.config)
        return elbo, {"val_elbo_bits_per_dim": elbo, "val_iwae_bits_per_dim": iwae}

    def progress_text(self, means: dict[str, float]) -> str:
        best = self.state.best_bits
        validation = "" if best is None else f", best validation {best:.3f} bits/dim"
        return f"{means['log_likelihood']:.1f} - {means['kl']:.1f} nats{validation}"


@torch.no_grad()
def bounds(model: VAE, data: Data, config: VAEConfig) -> tuple[float, float]:
    """The evidence lower bound and the importance-weighted one, in bits/dim.

    How far the latter is above the former is measured on the first images alone: it differs less between images than
    the bounds do.
    """
    device, labels = next(model.parameters()).device, labels_for(model, data)

    def each(count: int, bound: Callable[..., Tensor]) -> Tensor:
        nats = []
        for first in range(0, count, VALIDATION_BATCH):
            part = slice(first, min(count, first + VALIDATION_BATCH))
            own = None if labels is None else labels[part].to(device)
            nats.append(bound(data.images[part].to(device), own, seed=config.seed, start=first).double())
        return torch.cat(nats)

    elbo = each(len(data.images), model.elbo)
    count = min(len(elbo), config.iwae_images)
    gain = each(count, partial(model.log_prob, num_samples=config.iwae_samples)) - elbo[:count]
    per_nat = -1 / (math.prod(model.image_shape) * math.log(2))
    return float(elbo.mean()) * per_nat, float(elbo.mean() + gain.mean()) * per_nat
