"""Training of an autoencoder with discrete latents, and data sets of its codes."""

from __future__ import annotations

import math
import os
from typing import cast

import torch
from torch import Tensor

from fastgen.data import Dataset
from fastgen.models import VQVAE
from fastgen.models.vae.vqvae import perplexity
from fastgen.sampling.subject import evaluating
from fastgen.training.batches import Data, check_data, check_kind
from fastgen.training.config import TrainConfig
from fastgen.training.run import SampleGrid
from fastgen.training.state import State
from fastgen.training.trainer import LikelihoodRun, TrainResult


def train_vqvae(
    model: VQVAE,
    train_data: Data,
    val_data: Data | None,
    config: TrainConfig,
    *,
    out: str | os.PathLike[str] | None = None,
    resume: bool = False,
    progress: bool = True,
    sample_grid: SampleGrid | None = None,
) -> TrainResult:
    """Trains a `VQVAE` to its limit of steps or seconds, and leaves the best weights in it.

    A step makes ``log p(x | z_q(x))`` larger and the loss of the quantiser smaller (van den Oord et al. 2017, equation
    3), both for each element of an image, nats and mean square distance.  Weights and codes are averaged over the
    steps; the average is validated by the bound with all codes equally likely (`VQVAE.log_prob`), pictured and kept.
    Each line of the log has the terms of the loss and how many codes are in use (perplexity), in a batch and in the
    validation images.  Call `initialize` on the data before.

    Arguments, result and errors are those of `fastgen.training.train`.
    """
    check_kind(model, VQVAE, "train_vqvae")
    run = _Run(_State(model, config), config, train_data, val_data, out, resume, sample_grid)
    return run.train(resume, progress)


def encoded(model: VQVAE, data: Data, name: str = "codes") -> Dataset:
    """The codes of a data set, in eval mode: images [N, 1, h, w] of ``model.num_codes`` levels, with the labels.

    Args:
        model: what encodes.
        data: images that it takes, at least one, and labels or None.
        name: of the data set, for messages.

    Raises:
        TypeError, ValueError, RuntimeError: as `VQVAE.encode`; the model is none, or there are no images.
    """
    check_kind(model, VQVAE, "encoded")
    check_data(model, data, "data")
    with evaluating(model):
        codes = model.encode(data.images).cpu()
    labels = data.labels
    num_classes = getattr(data, "num_classes", None)
    if num_classes is None and labels is not None:
        num_classes = int(labels.max()) + 1
    return Dataset(codes, labels, model.num_codes, num_classes, name)


class _State(State):
    """What a step makes larger is the likelihood, less the loss of the quantiser; `figures` are both, nats per image
    and mean square distance, and the perplexity of the codes.
    """

    def __init__(self, model: VQVAE, config: TrainConfig) -> None:
        super().__init__(model, config)
        self.vqvae = model

    def log_likelihood(self, images: Tensor, labels: Tensor | None) -> Tensor:
        nats, codes, loss = self.vqvae.terms(images)
        self.figures = {
            "log_likelihood": nats.mean().item(),
            "quantizer_loss": loss.item(),
            "perplexity": perplexity(codes, self.vqvae.num_codes),
        }
        return nats - images[0].numel() * loss

    @torch.no_grad()
    def _update_average(self) -> None:
        """Codes that are moving averages are averaged like the weights: the vectors of the mean encoder are far from
        today's codes.
        """
        mean, today = cast(VQVAE, self.average).quantizer, self.vqvae.quantizer
        codes = mean.codebook.clone()
        weight = 1.0 - self.config.ema_decay_at(self.step)
        super()._update_average()
        if today.decay is not None:
            mean.codebook.copy_(codes.lerp_(today.codebook, weight))
            mean.sums.copy_(mean.codebook * mean.counts[:, None])  # from which training that goes on makes the codes


class _Run(LikelihoodRun):
    """One call of `train_vqvae`."""

    state: _State

    def validate(self, data: Data) -> tuple[float, dict[str, float]]:
        bits, figures = super().validate(data)
        codes = encoded(cast(VQVAE, self.state.average), data).images
        return bits, figures | {"val_perplexity": perplexity(codes, self.state.vqvae.num_codes)}

    def progress_text(self, means: dict[str, float]) -> str:
        best = self.state.best_bits
        validation = "" if best is None else f", best validation {best:.3f}"
        bits = -means["log_likelihood"] / (math.prod(self.state.vqvae.image_shape) * math.log(2))
        return f"{bits:.3f} bits/dim without codes, {means['perplexity']:.0f} codes in use{validation}"
