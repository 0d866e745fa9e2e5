"""The state of an adversarial run: all that a step changes, and its way to a checkpoint and back."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
from torch import Tensor

from fastgen import checkpoint
from fastgen.checkpoint import TRAINING_PREFIX
from fastgen.models import AdversarialModel
from fastgen.training.gan.config import GANConfig
from fastgen.training.state import optimizer_tensors, part, read_run, restore_optimizer

GENERATOR, LOSS = (TRAINING_PREFIX + name for name in ("generator/", "loss/"))


class GANState:
    """Both networks, the generator's moving average, the optimiser, the loss, and the counters.

    Attributes:
        model: what is trained.
        average: a model that has the moving average of the generator, in eval mode, and the same discriminator.
        loss: its own state included.
        step: steps taken.
        seconds: seconds of training so far.
    """

    model: torch.nn.Module
    average: torch.nn.Module

    def __init__(self, model: AdversarialModel, config: GANConfig) -> None:
        self.model = self.networks = model
        self.config = config
        self.average = self.averaged = copy.deepcopy(model)
        self.averaged.generator.eval().requires_grad_(False)
        self.averaged.discriminator = model.discriminator
        self.loss = config.make_loss().to(next(model.parameters()).device)
        # One optimiser serves both: it leaves out what has no gradient, and counts steps for each parameter.
        self.optimizer = torch.optim.Adam(
            model.parameters(), lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True
        )
        self.step = 0
        self.seconds = 0.0

    def update_discriminator(self, images: Tensor, labels: Tensor | None) -> tuple[dict[str, float], Tensor]:
        """Takes a step of the discriminator on a batch; returns figures and the scores of the images.

        Raises:
            RuntimeError: the loss is not finite; the weights are left as they were.
        """
        model = self.networks
        real = model.encode(images)
        with torch.no_grad():
            fake = model.generator(self._latents(len(real)), labels)
        real_scores, fake_scores = model.discriminator(real, labels), model.discriminator(fake, labels)
        inputs = () if labels is None else (labels,)
        penalty = self.loss.penalty(model.discriminator, real, fake, *inputs)
        loss = self.loss.discriminator(real_scores, fake_scores) + penalty
        self._descend(loss, "discriminator")
        self.loss.constrain(model.discriminator)
        figures = {"loss_discriminator": loss, "score_real": real_scores.mean(), "score_fake": fake_scores.mean()}
        if penalty.requires_grad:
            figures["penalty"] = penalty
        return {name: figure.item() for name, figure in figures.items()}, real_scores.detach()

    def update_generator(self, real_scores: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Takes a step of the generator, with the labels and after the scores of a batch of images; returns figures.

        Raises:
            RuntimeError: the loss is not finite; the weights are left as they were.
        """
        model = self.networks
        model.discriminator.requires_grad_(False)
        try:
            scores = model.discriminator(model.generator(self._latents(len(real_scores)), labels), labels)
            loss = self.loss.generator(scores)
            self._descend(loss, "generator")
        finally:
            model.discriminator.requires_grad_(True)
        self._update_average()
        self.step += 1
        return {"loss_generator": loss.item()} | self.loss.update(real_scores, scores.detach())

    def _latents(self, n: int) -> Tensor:
        like = next(self.model.parameters())
        return torch.randn(n, self.networks.latent_dim, dtype=like.dtype, device=like.device)

    def _descend(self, loss: Tensor, name: str) -> None:
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"the {name}'s loss is {loss.item()}")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def _update_average(self) -> None:
        """BatchNorm's statistics are averaged as the weights are: the last batches' belong to other weights."""
        weight = 1.0 - self.config.ema_decay_at(self.step)
        new = self.networks.generator.state_dict()
        for name, mean in self.averaged.generator.state_dict().items():
            mean.lerp_(new[name], weight) if mean.is_floating_point() else mean.copy_(new[name])

    def adopt(self) -> None:
        """Puts the generator's average into the model."""
        self.networks.generator.load_state_dict(self.averaged.generator.state_dict())

    def save(self, path: Path, num_images: int) -> None:
        """Writes a checkpoint from which `fastgen.load` gives the averaged generator and `restore` the whole state."""
        tensors = self.average.state_dict()
        tensors |= {GENERATOR + name: tensor for name, tensor in self.networks.generator.state_dict().items()}
        tensors |= {LOSS + name: tensor for name, tensor in self.loss.state_dict().items()}
        tensors |= optimizer_tensors(self.model, self.optimizer)
        training = {
            "step": self.step, "seconds": self.seconds, "num_images": num_images, "config": self.config.as_dict()
        }  # fmt: skip
        checkpoint.write(path, tensors, {"fastgen": checkpoint.describe(self.model), "training": training})

    def restore(self, path: Path, num_images: int) -> None:
        """Takes over the state in a checkpoint.

        Raises:
            ValueError: the file is not a training checkpoint, or one of another model, configuration or data size.
        """
        tensors, training = read_run(path, self.model, self.config, num_images)
        self.averaged.load_state_dict({k: v for k, v in tensors.items() if not k.startswith(TRAINING_PREFIX)})
        self.networks.generator.load_state_dict(part(tensors, GENERATOR))
        self.loss.load_state_dict(part(tensors, LOSS))
        restore_optimizer(self.model, self.optimizer, tensors)
        self.step, self.seconds = training["step"], training["seconds"]
