"""The variational autoencoder of Kingma & Welling 2014 (1312.6114)."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import ops
from fastgen._arguments import check_image_shape, check_images, check_labels, check_levels, describe, positive
from fastgen.models.chunks import CHUNK, in_chunks
from fastgen.models.vae import likelihoods
from fastgen.models.vae.networks import (
    ConvolutionalDecoder,
    ConvolutionalEncoder,
    PerceptronDecoder,
    PerceptronEncoder,
)
from fastgen.ops.normal import normals
from fastgen.sampling.subject import evaluating

MAX_DECODED = 256  # images that `log_prob` decodes at a time
ARCHITECTURES = ("perceptron", "convolutional")

Conditions = tuple[Tensor | None, Tensor | None]  # vectors [N, V], planes [N, P, H, W]


class VAE(nn.Module):
    """A latent normal distribution, an encoder and a decoder (Kingma & Welling 2014, section 3 and appendix C).

    Of one kind, perceptrons with tanh units as in the paper; of the other, strided convolutions with BatchNorm and ReLU
    and, as decoder, the fused blocks of `fastgen.nn.ConvTransposeBNAct`.

    Args:
        image_shape: (C, H, W), C 1 or 3; of a convolutional network, even sizes of at least 8.
        levels: number of levels of an element, 2..256.
        latent_dim: dimension of the latents, which are standard normal.
        num_filters: units of a hidden layer, 500 as published; or feature maps beside the image, 32.
        num_blocks: hidden layers of each perceptron; a convolutional network has as many blocks as the size can be
            halved, down to 4 to 7 pixels.
        architecture: "perceptron" or "convolutional".
        likelihood: "bernoulli" (levels between 0 and the highest count as probabilities), "gaussian" (a density, levels
            as 0..1), "logistic" (discretised), or "categorical".
        scale: standard deviation of the gaussian likelihood, or None to learn one for each element.

    Attributes:
        name: the registered name of the class.
        config: the constructor arguments, JSON-able: ``type(model)(**model.config)`` builds the same architecture.
        encoder: images -> features, `to_latent`: features -> means and log variances, `decoder`: latents -> parameters
            of the likelihood.

    Raises:
        ValueError: an argument is out of range.
    """

    name: ClassVar[str] = "vae"
    num_classes: int | None = None
    condition: str | None = None

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
    ) -> None:
        super().__init__()
        channels, height, width = check_image_shape(image_shape)
        if architecture not in ARCHITECTURES:
            raise ValueError(f"architecture: expected one of {', '.join(ARCHITECTURES)}, got {architecture!r}")
        convolutional = architecture == "convolutional"
        if num_filters is None:
            num_filters = 32 if convolutional else 500
        self.image_shape, self.levels = (channels, height, width), check_levels(levels)
        self.latent_dim = positive("latent_dim", latent_dim)
        self.likelihood = likelihoods.make(likelihood, channels, levels, scale)
        self.config: dict[str, Any] = {
            "image_shape": list(self.image_shape), "levels": levels, "latent_dim": latent_dim,
            "num_filters": positive("num_filters", num_filters), "num_blocks": positive("num_blocks", num_blocks),
            "architecture": architecture, "likelihood": likelihood, "scale": scale,
        }  # fmt: skip

        vector, planes = self._condition_sizes()
        shape = (self.likelihood.channels, height, width)
        inputs = channels + vector + planes
        encoder: PerceptronEncoder | ConvolutionalEncoder
        if convolutional:
            encoder = ConvolutionalEncoder(inputs, height, width, num_filters)
            self.decoder: nn.Module = ConvolutionalDecoder(latent_dim + vector, planes, shape, num_filters)
        else:
            units = [num_filters] * num_blocks
            encoder = PerceptronEncoder(inputs, height, width, units)
            self.decoder = PerceptronDecoder(latent_dim + vector, planes, shape, units)
        self.encoder = encoder
        self.to_latent = nn.Linear(encoder.features, 2 * latent_dim)

    # What conditional models have more

    def _condition_sizes(self) -> tuple[int, int]:
        """Length of the vector and number of the planes that both networks are conditioned on."""
        return 0, 0

    def _conditions(self, n: int, labels: Tensor | int | None, condition: Tensor | None) -> Conditions:
        """The checked conditions of n images: vectors [N, V] and planes [N, P, H, W], in the dtype of the weights."""
        if labels is not None or condition is not None:
            raise ValueError("labels, condition: expected None, this model is unconditional")
        return None, None

    # The model

    def forward(self, images: Tensor, labels: Tensor | int | None = None, **options: Any) -> Tensor:
        """`elbo`."""
        return self.elbo(images, labels, **options)

    def encode(self, images: Tensor, labels: Tensor | int | None = None) -> tuple[Tensor, Tensor]:
        """Means and log variances of the latents, [N, latent_dim] each.

        Args:
            images: uint8 levels [N, C, H, W].
            labels: of a `ConditionalVAE` with classes, int64 [N] or one for all.
        """
        return self._encode(images, self._conditions_of(images, labels))

    def decode(self, z: Tensor, labels: Tensor | int | None = None, condition: Tensor | None = None) -> Tensor:
        """Parameters of the likelihood, [N, P, H, W], of latents [N, latent_dim].  `render` makes images of latents."""
        self._check_latents(z)
        return self._decode(z.to(self._weight), *self._conditions(len(z), labels, condition))

    def elbo(
        self,
        images: Tensor,
        labels: Tensor | int | None = None,
        *,
        num_samples: int = 1,
        beta: float = 1.0,
        seed: int | None = None,
        start: int = 0,
    ) -> Tensor:
        """The evidence lower bound, [N] nats: E log p(x | z) - beta KL(q(z | x), p(z)) (equation 3).

        Args:
            images: uint8 levels [N, C, H, W].
            labels: of a `ConditionalVAE` with classes, int64 [N] or one for all.
            num_samples: latents drawn for each image.
            beta: weight of the divergence (Higgins et al. 2017, "beta-VAE", equation 4); 1 for the bound.
            seed, start: of the noise, see `ops.reparameterize`; without a seed new noise in each call.
        """
        likelihood, kl = self.elbo_terms(images, labels, num_samples=num_samples, seed=seed, start=start)
        return likelihood - beta * kl

    def elbo_terms(
        self,
        images: Tensor,
        labels: Tensor | int | None = None,
        *,
        num_samples: int = 1,
        seed: int | None = None,
        start: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """E log p(x | z) and KL(q(z | x), p(z)), [N] nats each; arguments as for `elbo`."""
        conditions = self._conditions_of(images, labels)
        mu, logvar = self._encode(images, conditions)
        z, kl = ops.reparameterize(mu, logvar, seed=seed, start=start, num_samples=num_samples)
        return -self._nll(z, images, conditions).mean(0), kl

    @torch.no_grad()
    def log_prob(
        self,
        images: Tensor,
        labels: Tensor | int | None = None,
        *,
        num_samples: int = 100,
        seed: int = 0,
        start: int = 0,
    ) -> Tensor:
        """A lower bound of log p(x), [N] nats, that rises to it with the number of samples, without a gradient.

        log of the mean of p(x | z) p(z) / q(z | x) over latents drawn from q (Burda, Grosse, Salakhutdinov 2016,
        1509.00519, equation 8).  `MAX_DECODED` images are decoded at a time, whatever the number of samples.  Arguments
        as for `elbo`, but for the seed, which has a value; draw s of image i is the same for any number of samples.
        """
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples: expected an integer of at least 1, got {num_samples!r}")
        conditions = self._conditions_of(images, labels)
        mu, logvar = self._encode(images, conditions)
        at_once = max(1, MAX_DECODED // max(1, len(images)))
        total = mu.new_full((len(images),), -math.inf)
        for first in range(0, num_samples, at_once):
            draws = range(first, min(num_samples, first + at_once))
            noise = [normals(len(images), self.latent_dim, seed=seed, start=start, draw=draw) for draw in draws]
            eps = torch.stack(noise).to(mu)
            z = mu + torch.exp(0.5 * logvar) * eps
            ratio = 0.5 * (eps * eps + logvar - z * z).sum(2)  # log p(z) - log q(z | x)
            weights = torch.logsumexp(ratio - self._nll(z, images, conditions), dim=0)
            total = torch.logaddexp(total, weights)
        return total - math.log(num_samples)

    # Images

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
        condition: Tensor | None = None,
        progress: bool = False,
    ) -> Tensor:
        """The mean images of the latents start .. start+n-1 of a seed, in eval mode.

        An image is a function of (weights, seed, index, conditions); PyTorch's linear layers, which the perceptron is
        made of, may change a last bit with the number of threads and so, rarely, a level.

        Args:
            n: number of images.
            seed: 0..2^64-1.
            start: index of the first image.
            labels: of a `ConditionalVAE` with classes, int64 [n] or one for all.
            condition: of one that is given a part of the image, uint8 [n, C, H, W], see there.
            progress: show a progress bar on stderr.

        Returns:
            uint8 levels [n, C, H, W], on the CPU.
        """
        z = self.latents(n, seed=seed, start=start)
        place = start % CHUNK if n else 0  # whole chunks: from their first sample on, in whose place are zeros
        known = check_labels(labels, n, self.num_classes)
        labels = None if known is None else F.pad(known, (place, 0))
        if condition is not None and place:
            condition = torch.cat((condition[:1].expand(place, -1, -1, -1), condition))
        return self.render(F.pad(z, (0, 0, place, 0)), labels, condition, progress=progress)[place:].clone()

    @torch.no_grad()
    def render(
        self,
        z: Tensor,
        labels: Tensor | int | None = None,
        condition: Tensor | None = None,
        *,
        progress: bool = False,
    ) -> Tensor:
        """The mean images of latents, in eval mode: float [N, latent_dim] -> uint8 levels [N, C, H, W], on the CPU.

        Always `CHUNK` latents at a time, because a convolution may round differently for another batch size.

        Raises:
            RuntimeError: the images hold NaN or infinity.
        """
        self._check_latents(z)
        self._conditions(len(z), labels, condition)
        labels = check_labels(labels, len(z), self.num_classes)

        def draw(*given: Any) -> Tensor:
            return self.likelihood.mean_levels(self.decode(*given))

        with evaluating(self):
            return in_chunks(draw, z, labels, condition, shape=self.image_shape, progress=progress)

    def reconstruct(self, images: Tensor, labels: Tensor | int | None = None) -> Tensor:
        """Images after encoding and decoding, by the means of their latents, in eval mode: uint8 [N, C, H, W]."""
        with evaluating(self):
            mu, _ = self.encode(images, labels)
        return self.render(mu, labels, None if self.condition is None else images)

    # What the latents are used for

    @torch.no_grad()
    def kl_per_dimension(self, images: Tensor, labels: Tensor | int | None = None) -> Tensor:
        """Mean over the images of each latent dimension's share of the divergence, [latent_dim] nats."""
        mu, logvar = self.encode(images, labels)
        return 0.5 * (mu * mu + torch.expm1(logvar) - logvar).mean(0)

    @torch.no_grad()
    def active_units(self, images: Tensor, labels: Tensor | int | None = None, *, threshold: float = 0.01) -> Tensor:
        """Which latent dimensions say anything about the images, bool [latent_dim]: those whose means have a variance
        over the images above the threshold (Burda et al. 2016, section 5.2).

        Raises:
            ValueError: fewer than two images.
        """
        if len(images) < 2:
            raise ValueError(f"images: a variance needs at least 2, got {len(images)}")
        return self.encode(images, labels)[0].var(0) > threshold

    # Parts

    @property
    def _weight(self) -> Tensor:
        return self.to_latent.weight

    def _conditions_of(self, images: Tensor, labels: Tensor | int | None) -> Conditions:
        """The images are checked; of a model that is conditioned on a part of the image, it is theirs."""
        check_images(images, self.image_shape, self.levels)
        return self._conditions(len(images), labels, None if self.condition is None else images)

    def _encode(self, images: Tensor, conditions: Conditions) -> tuple[Tensor, Tensor]:
        vectors, planes = conditions
        x = images.to(self._weight) * (2.0 / (self.levels - 1)) - 1.0
        parts = [x]
        if vectors is not None:
            parts.append(vectors[:, :, None, None].expand(-1, -1, *x.shape[2:]))
        if planes is not None:
            parts.append(planes)
        features = self.encoder(torch.cat(parts, dim=1) if len(parts) > 1 else x)
        mu, logvar = self.to_latent(features).chunk(2, dim=1)
        return mu, logvar

    def _decode(self, z: Tensor, vectors: Tensor | None, planes: Tensor | None) -> Tensor:
        return self.decoder(z if vectors is None else torch.cat((z, vectors), dim=1), planes)

    def _nll(self, z: Tensor, images: Tensor, conditions: Conditions) -> Tensor:
        """-log p(x | z) of latents [S, N, D]: [S, N]."""
        draws = len(z)
        vectors, planes = (_repeated(value, draws) for value in conditions)
        params = self._decode(z.flatten(0, 1), vectors, planes)
        images = _repeated(images.to(params.device), draws)
        return self.likelihood.nll(params, images).unflatten(0, (draws, -1))

    def _check_latents(self, z: Tensor) -> None:
        if not isinstance(z, Tensor) or not z.is_floating_point():
            raise TypeError(f"z: expected a floating point tensor, got {describe(z)}")
        if z.dim() != 2 or z.shape[1] != self.latent_dim:
            raise ValueError(f"z: expected shape [N, {self.latent_dim}], got {list(z.shape)}")

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config.items())


def _repeated(values: Any, draws: int) -> Any:
    """[N, ...] -> [draws * N, ...], draw after draw; None stays None."""
    if values is None or draws == 1:
        return values
    return values.expand(draws, *values.shape).flatten(0, 1)
