"""What all adversarial models share: levels, labels, and images as a function of (weights, seed, index, label)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import ops
from fastgen._arguments import check_image_shape, check_images, check_labels, check_levels, describe, positive
from fastgen.models.chunks import CHUNK, in_chunks
from fastgen.sampling.subject import evaluating


class AdversarialModel(torch.nn.Module):
    """A generator and a discriminator; images are [-1, 1] for both, and levels outside.

    Subclasses set ``generator(z, labels=None)``: latents [N, latent_dim], labels int64 [N] or None -> images
    [N, C, H, W] in [-1, 1], and ``discriminator(x, labels=None)``: images -> [N], scores (logits), or reconstruction
    errors where the discriminator is an autoencoder.  Both are modules of their own, for training and for export.

    Args:
        image_shape: (C, H, W).
        levels: number of levels of an element, 2..256.
        latent_dim: dimension of the latents, which are standard normal.
        num_classes: number of classes that both networks are conditioned on, or None.
        discriminator: "score" or "autoencoder".
        options: the other constructor arguments of the subclass, kept in `config`.

    Attributes:
        name: the registered name of the class.
        config: the constructor arguments, JSON-able: ``type(model)(**model.config)`` builds the same architecture.
    """

    name: ClassVar[str]
    generator: torch.nn.Module
    discriminator: torch.nn.Module

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int],
        levels: int,
        latent_dim: int,
        num_classes: int | None,
        discriminator: str,
        **options: Any,
    ) -> None:
        super().__init__()
        self.image_shape, self.levels = check_image_shape(image_shape), check_levels(levels)
        self.latent_dim = positive("latent_dim", latent_dim)
        self.num_classes = None if num_classes is None else positive("num_classes", num_classes)
        one_of("discriminator", discriminator, ("score", "autoencoder"))
        if discriminator == "autoencoder" and num_classes is not None:
            raise ValueError(f"num_classes: expected None with an autoencoder as discriminator, got {num_classes}")
        self.config: dict[str, Any] = {
            "image_shape": list(self.image_shape),
            "levels": levels,
            "latent_dim": latent_dim,
            "discriminator": discriminator,
            **options,
        }
        if num_classes is not None:
            self.config["num_classes"] = num_classes

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """The generator: latents [N, latent_dim], labels int64 [N] if conditional -> images [N, C, H, W] in [-1, 1]."""
        return self.generator(z, labels)

    def encode(self, images: Tensor) -> Tensor:
        """Levels uint8 [N, C, H, W] -> [N, C, H, W] in [-1, 1], in the dtype and on the device of the weights."""
        check_images(images, self.image_shape, self.levels)
        return images.to(next(self.parameters())) * (2.0 / (self.levels - 1)) - 1.0

    def decode(self, x: Tensor) -> Tensor:
        """Images [N, C, H, W] in [-1, 1] -> the nearest levels, uint8; what lies outside is clamped.

        Raises:
            RuntimeError: a value is NaN or infinite.
        """
        if not torch.isfinite(x).all():
            raise RuntimeError("the generator's images hold NaN or infinity: are its weights finite?")
        return ((x + 1.0) * (0.5 * (self.levels - 1))).round().clamp(0, self.levels - 1).to(torch.uint8)

    def latents(self, n: int, *, seed: int = 0, start: int = 0) -> Tensor:
        """The latents that `sample` draws for the same arguments: float32 [n, latent_dim], on the CPU."""
        return ops.normal(n, (self.latent_dim,), seed=seed, start=start)

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        start: int = 0,
        labels: Tensor | int | None = None,
        progress: bool = False,
    ) -> Tensor:
        """Draws the images start .. start+n-1 of a seed, in eval mode.

        An image is a function of (weights, seed, index, label), bit for bit: a convolution may round differently for
        another batch size, so the generator always works on `CHUNK` samples at a time, sample i in place i % CHUNK of
        its chunk, and what was not asked for is thrown away.  The fused blocks of DCGAN give the same bits on any
        number of threads; in PyTorch's linear layers, which `GAN` has, that may change a last bit and so, rarely, a
        level.

        Args:
            n: number of images.
            seed: 0..2^64-1.
            start: index of the first image.
            labels: int64 [n] or one integer for all, for a conditional model.
            progress: show a progress bar on stderr.

        Returns:
            uint8 levels [n, C, H, W], on the CPU.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
            RuntimeError: the weights are not finite.
        """
        z = self.latents(n, seed=seed, start=start)
        place = start % CHUNK
        if n and place:  # whole chunks: with the samples before
            z = torch.cat((self.latents(place, seed=seed, start=start - place), z))
        known = check_labels(labels, n, self.num_classes)
        known = None if known is None else F.pad(known, (len(z) - n, 0))
        return self.render(z, known, progress=progress)[len(z) - n :].clone()

    @torch.no_grad()
    def render(self, z: Tensor, labels: Tensor | int | None = None, *, progress: bool = False) -> Tensor:
        """The images of given latents, in eval mode: float [N, latent_dim] -> uint8 levels [N, C, H, W], on the CPU.

        In chunks, as in `sample`: ``render(latents(n, seed=s)) == sample(n, seed=s)``.  The other arguments and the
        errors are those of `sample`.
        """
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(f"z: expected a floating point tensor, got {describe(z)}")
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z: expected shape [N, {self.latent_dim}], got {list(z.shape)}")
        known = check_labels(labels, len(z), self.num_classes)
        like = next(self.generator.parameters())

        def draw(z: Tensor, labels: Tensor | None) -> Tensor:
            return self.decode(self.generator(z.to(like), None if labels is None else labels.to(like.device)))

        with evaluating(self.generator):
            return in_chunks(draw, z, known, shape=self.image_shape, progress=progress)

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config.items())


def with_labels(x: Tensor, labels: Tensor | None, num_classes: int | None) -> Tensor:
    """One-hot labels beside an input of a network (Mirza & Osindero 2014, section 3.2 and figure 1).

    [N, C, ...] -> [N, C + num_classes, ...]: the class's channel holds ones; unchanged for an unconditional network.
    """
    if (labels is None) != (num_classes is None):
        expected = "None" if num_classes is None else "class labels"
        raise ValueError(f"labels: expected {expected} with num_classes={num_classes}")
    if labels is None or num_classes is None:
        return x
    planes = F.one_hot(labels, num_classes).to(x.dtype)
    return torch.cat((x, planes[(...,) + (None,) * (x.dim() - 2)].expand(-1, -1, *x.shape[2:])), dim=1)


def one_of(name: str, value: str, choices: tuple[str, ...]) -> str:
    """The argument itself, when it is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value
