"""The multilayer GAN of Goodfellow et al. 2014 (1406.2661), also conditional (Mirza & Osindero 2014, 1411.1784)."""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn

from fastgen._arguments import positive
from fastgen.models.gan.base import AdversarialModel, with_labels

PIECES = 5  # linear pieces of a maxout unit, as in the authors' code
UNITS_PER_MAXOUT = 5  # of the generator for each maxout unit of the discriminator: 1200 and 240


class GAN(AdversarialModel):
    """Generative adversarial nets (Goodfellow et al. 2014, section 5): perceptrons without convolutions.

    The generator has rectified linear layers, and tanh at its output: the paper's sigmoid, for images in [-1, 1].  The
    discriminator has maxout layers with dropout.  Defaults are those of the authors' MNIST experiment: 1200 rectifiers
    twice against 240 maxout units of 5 pieces twice.  A conditional model has one-hot labels beside the latent and
    beside the image.

    Args:
        image_shape: (C, H, W); any sizes.
        levels: number of levels, 2..256.
        latent_dim: dimension of the latents, standard normal (the paper's are uniform).
        num_filters: units of a hidden layer of the generator; the discriminator has a fifth of them, of 5 pieces each.
        num_blocks: hidden layers of each network.
        num_classes: number of classes, or None for an unconditional model.
        dropout: share of hidden units that the discriminator drops in training.
        discriminator: "score", or "autoencoder" for `losses.BEGANLoss`: perceptrons as encoder and as decoder, without
            dropout; its output is the mean absolute error of each image.  That says nothing about a label, so such a
            model cannot be conditional.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "gan"

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (1, 28, 28),
        levels: int = 256,
        latent_dim: int = 100,
        num_filters: int = 1200,
        num_blocks: int = 2,
        num_classes: int | None = None,
        dropout: float = 0.5,
        discriminator: str = "score",
    ) -> None:
        super().__init__(
            image_shape=image_shape,
            levels=levels,
            latent_dim=latent_dim,
            num_classes=num_classes,
            num_filters=positive("num_filters", num_filters),
            num_blocks=positive("num_blocks", num_blocks),
            dropout=dropout,
            discriminator=discriminator,
        )
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a number of at least 0 and below 1, got {dropout!r}")
        hidden = [num_filters] * num_blocks
        self.generator = Generator(self.image_shape, latent_dim, hidden, num_classes)
        if discriminator == "score":
            maxout = [max(1, num_filters // UNITS_PER_MAXOUT)] * num_blocks
            self.discriminator = Discriminator(self.image_shape, maxout, num_classes, dropout)
        else:
            self.discriminator = Autoencoder(self.image_shape, latent_dim, hidden)


class Generator(nn.Module):
    """Latents [N, latent_dim] -> images [N, C, H, W] in [-1, 1]."""

    def __init__(
        self, image_shape: tuple[int, int, int], latent_dim: int, hidden: list[int], num_classes: int | None
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        pixels = math.prod(image_shape)
        layers = _perceptron([latent_dim + (num_classes or 0), *hidden, pixels])
        self.layers = nn.Sequential(*layers, nn.Tanh(), nn.Unflatten(1, image_shape))

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(with_labels(z, labels, self.num_classes))


class Discriminator(nn.Module):
    """Images [N, C, H, W] -> scores [N]."""

    def __init__(
        self, image_shape: tuple[int, int, int], hidden: list[int], num_classes: int | None, dropout: float
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        sizes = [math.prod(image_shape) + (num_classes or 0), *hidden]
        blocks = [nn.Sequential(Maxout(a, b), nn.Dropout(dropout)) for a, b in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*blocks, nn.Linear(hidden[-1], 1))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.layers(with_labels(x.flatten(1), labels, self.num_classes)).flatten()


class Autoencoder(nn.Module):
    """Images [N, C, H, W] -> mean absolute error [N] of their reconstruction (Berthelot et al. 2017)."""

    def __init__(self, image_shape: tuple[int, int, int], latent_dim: int, hidden: list[int]) -> None:
        super().__init__()
        pixels = math.prod(image_shape)
        self.encoder = nn.Sequential(*_perceptron([pixels, *hidden, latent_dim]))
        self.decoder = nn.Sequential(*_perceptron([latent_dim, *hidden, pixels]), nn.Tanh())

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images -> images."""
        return self.decoder(self.encoder(x.flatten(1))).view_as(x)

    def forward(self, x: Tensor, labels: None = None) -> Tensor:
        return (x - self.reconstruct(x)).abs().mean(dim=(1, 2, 3))


class Maxout(nn.Module):
    """[N, a] -> [N, b]: the largest of `PIECES` linear functions (Goodfellow et al. 2013, "Maxout networks")."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, PIECES * out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(1, (-1, PIECES)).amax(dim=2)


def _perceptron(sizes: list[int]) -> list[nn.Module]:
    """Linear layers with rectifiers between them; none after the last."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return layers[:-1]
