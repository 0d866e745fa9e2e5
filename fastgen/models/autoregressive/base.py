"""What all autoregressive models share: their attributes, input checks and the log-likelihood."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from fastgen._arguments import check_image_shape, check_images, check_levels, describe, positive
from fastgen.sampling.heads import Bernoulli, Categorical, Head, LogisticMixture


class AutoregressiveModel(torch.nn.Module):
    """A network whose output at an image element depends on earlier elements only, and a head that reads it.

    Subclasses implement ``forward(x, labels=None)``: encoded images [N, C, H, W] float, labels int64 [N] or None ->
    head parameters [N, head.num_params(C), H, W].  That function is all a sampler needs to know.
    Encoded images are integers where the model has an embedding.

    Args:
        image_shape: (C, H, W).
        levels: number of levels of an element, 2..256; of codes, to 65,536.
        head: "categorical", "bernoulli" for two levels, or "logistic_mixture" where there are ``num_mixtures``.
        num_classes: number of classes that the model is conditioned on, or None.
        num_mixtures: components of the logistic mixture; None for a model that does not offer this head.
        embedding_dim: for codes such as those of a `models.VQVAE`, in images of one channel with a categorical head:
            the network reads an embedding of this dimension of each, rather than a number.
        options: the other constructor arguments of the subclass, kept in `config`.

    Attributes:
        name: the registered name of the class.
        config: the constructor arguments, JSON-able: ``type(model)(**model.config)`` builds the same architecture.
        codes_of: of a prior over codes, `VQVAE.fingerprint` of the model that they are of, to be set by who trains it;
            kept in checkpoints, where it keeps the codes of one model from being rendered by another. Or None.
    """

    name: ClassVar[str]
    codes_of: str | None = None

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        levels: int,
        head: str,
        num_classes: int | None,
        num_mixtures: int | None = None,
        embedding_dim: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.image_shape = check_image_shape(image_shape)
        self.head = _head(head, levels, num_mixtures, codes=embedding_dim is not None)
        self.levels = levels
        self.embedding = None
        if embedding_dim is not None:
            if self.image_shape[0] != 1:
                raise ValueError(f"image_shape: expected one channel with {embedding_dim=}, got {image_shape!r}")
            self.embedding = torch.nn.Embedding(levels, positive("embedding_dim", embedding_dim))
        self.in_channels = self.image_shape[0] if embedding_dim is None else embedding_dim  # of the first layer
        self.num_classes = None if num_classes is None else positive("num_classes", num_classes)
        self.config: dict[str, Any] = {"image_shape": list(self.image_shape), "levels": levels, "head": head, **options}
        if num_classes is not None:
            self.config["num_classes"] = num_classes
        if num_mixtures is not None:
            self.config["num_mixtures"] = num_mixtures
        if embedding_dim is not None:
            self.config["embedding_dim"] = embedding_dim

    def log_prob(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Log-likelihood of whole images.

        Args:
            images: uint8 levels [N, C, H, W] of the model's ``image_shape``, each below ``levels``; int64 where there
                are more than 256.
            labels: int64 [N] in 0..num_classes-1 for a conditional model, otherwise None.

        Returns:
            [N] in the dtype of the weights, nats per image.

        Raises:
            TypeError: images or labels have another dtype.
            ValueError: a shape or a value is out of range, or labels are missing or not wanted.
            RuntimeError: the result is not finite, because weights are not or because activations overflowed.
        """
        self._check_images(images)
        self._check_labels(labels, len(images))
        nats = self.head.log_prob(self(self._encode(images), labels), images).sum(dim=(1, 2, 3))
        if not torch.isfinite(nats).all():
            raise RuntimeError(f"log_prob is not finite: {_why_not_finite(self)}")
        return nats

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config.items())

    def embedded(self, x: Tensor) -> Tensor:
        """What the first layer reads of encoded images: [N, in_channels, H, W]."""
        return x if self.embedding is None else self.embedding(x[:, 0]).movedim(-1, 1)

    def _check_images(self, images: Tensor) -> None:
        check_images(images, self.image_shape, self.levels, dtype=self.head.dtype)

    def _encode(self, images: Tensor) -> Tensor:
        """What `forward` reads for levels."""
        x = self.head.encode(images)
        return x.to(next(self.parameters()).dtype) if x.is_floating_point() else x

    def _check_conditional(self, labels: Tensor | None) -> None:
        """For `forward`: labels are there if and only if the model is conditional; their values are not looked at."""
        if (labels is None) != (self.num_classes is None):
            expected = "None" if self.num_classes is None else "class labels"
            raise ValueError(f"labels: expected {expected} with num_classes={self.num_classes}")

    def _check_labels(self, labels: Tensor | None, count: int) -> None:
        if self.num_classes is None:
            if labels is not None:
                raise ValueError("labels: this model is unconditional (num_classes=None), expected None")
            return
        if labels is None:
            raise ValueError(f"labels: this model is conditional on {self.num_classes} classes, got None")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            raise TypeError(f"labels: expected an int64 tensor, got {describe(labels)}")
        if labels.shape != (count,):
            raise ValueError(f"labels: expected shape [{count}], got {list(labels.shape)}")
        if count and (int(labels.min()) < 0 or int(labels.max()) >= self.num_classes):
            low, high = int(labels.min()), int(labels.max())
            raise ValueError(f"labels: expected values in 0..{self.num_classes - 1}, got {low}..{high}")


def odd(name: str, value: int) -> int:
    """The argument itself, when it is an odd integer of at least 1."""
    if positive(name, value) % 2 == 0:
        raise ValueError(f"{name}: expected an odd integer, got {value!r}")
    return value


def _head(name: str, levels: int, num_mixtures: int | None, *, codes: bool) -> Head:
    if codes:
        if name != "categorical":
            raise ValueError(f'head: expected "categorical" with embedding_dim, got {name!r}')
        return Categorical(check_levels(levels, Categorical.max_levels), input_range=None)
    if name == "categorical":
        return Categorical(check_levels(levels))
    if name == "bernoulli":
        if levels != 2:
            raise ValueError(f'head: "bernoulli" is for 2 levels, got levels={levels!r}')
        return Bernoulli()
    if num_mixtures is None:
        raise ValueError(f'head: expected "categorical" or "bernoulli", got {name!r}')
    if name == "logistic_mixture":
        return LogisticMixture(num_mixtures, levels)
    raise ValueError(f'head: expected "logistic_mixture", "categorical" or "bernoulli", got {name!r}')


def _why_not_finite(model: torch.nn.Module) -> str:
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            return f"parameter {name!r} holds NaN or infinity"
    return "all parameters are finite, so the activations overflowed"
