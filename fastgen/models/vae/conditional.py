"""Conditional variational autoencoder: labels, or a part of the image, as condition."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen._arguments import check_images, check_labels, positive
from fastgen.images import half
from fastgen.models.vae.vae import VAE, Conditions

CONDITIONS = ("grey", "top", "bottom", "left", "right")


class ConditionalVAE(VAE):
    """A `VAE` whose encoder and decoder are told something about the image (Sohn, Lee, Yan 2015, "Learning Structured
    Output Representation using Deep Conditional Generative Models", section 4.1, with the prior independent of the
    condition; Kingma et al. 2014, 1406.5298, section 2, for labels).

    A condition is given as whole images, of which the model sees only its part: "grey", the mean of the colours, for
    colourisation; one half of the pixels, for completion.  Methods that take images take the condition from these.  The
    likelihood is that of the whole image all the same.

    Args:
        num_classes: number of classes, or None.
        condition: None, "grey", or the half that is given: "top", "bottom", "left" or "right".
        options: those of `VAE`.

    Raises:
        ValueError: an argument is out of range, or there is nothing to be conditioned on.
    """

    name: ClassVar[str] = "conditional_vae"

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        levels: int = 256,
        latent_dim: int = 20,
        num_filters: int | None = None,
        num_blocks: int = 1,
        architecture: str = "perceptron",
        likelihood: str = "logistic",
        scale: float | None = None,
        num_classes: int | None = None,
        condition: str | None = None,
    ) -> None:
        if num_classes is None and condition is None:
            raise ValueError("num_classes, condition: expected at least one of them, got None for both")
        if condition is not None and condition not in CONDITIONS:
            raise ValueError(f"condition: expected None or one of {', '.join(CONDITIONS)}, got {condition!r}")
        self._sizes = (
            0 if num_classes is None else positive("num_classes", num_classes),
            0 if condition is None else 1 if condition == "grey" else image_shape[0] + 1,
        )
        super().__init__(
            image_shape=image_shape, levels=levels, latent_dim=latent_dim, num_filters=num_filters,
            num_blocks=num_blocks, architecture=architecture, likelihood=likelihood, scale=scale,
        )  # fmt: skip
        self.num_classes, self.condition = num_classes, condition
        self.config |= {"num_classes": num_classes, "condition": condition}

    def _condition_sizes(self) -> tuple[int, int]:
        return self._sizes

    def _conditions(self, n: int, labels: Tensor | int | None, condition: Tensor | None) -> Conditions:
        like: dict[str, Any] = {"dtype": self._weight.dtype, "device": self._weight.device}
        known = check_labels(labels, n, self.num_classes)
        vectors = None if known is None or self.num_classes is None else F.one_hot(known, self.num_classes).to(**like)
        if self.condition is None:
            if condition is not None:
                raise ValueError("condition: expected None, this model is conditioned on labels alone")
            return vectors, None
        if condition is None:
            raise ValueError(f"condition: expected images, of which the model is given {self.condition!r}, got None")
        check_images(condition, self.image_shape, self.levels, name="condition")
        if len(condition) != n:
            raise ValueError(f"condition: expected {n} images, got {len(condition)}")
        x = condition.to(**like) * (2.0 / (self.levels - 1)) - 1.0
        if self.condition == "grey":
            return vectors, x.mean(1, keepdim=True)
        mask = self.given_pixels().to(**like).expand(n, 1, -1, -1)
        return vectors, torch.cat((x * mask, mask), dim=1)

    def given_pixels(self) -> Tensor:
        """bool [H, W]: which pixels a model that is given a half sees; all for "grey", none for labels alone."""
        size = self.image_shape[1:]
        if self.condition in (None, "grey"):
            return torch.full(size, self.condition == "grey")
        return half(self.condition, *size)
