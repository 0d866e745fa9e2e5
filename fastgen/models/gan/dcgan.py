"""Deep convolutional GAN (Radford, Metz, Chintala 2016, 1511.06434), also conditional (Mirza & Osindero 2014)."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from fastgen._arguments import positive
from fastgen.models.gan.base import AdversarialModel, one_of, with_labels
from fastgen.nn import ConvBNAct, ConvTransposeBNAct

START = 4  # pixels a side of the generator's first and the discriminator's last feature map
SLOPE = 0.2  # section 4
WEIGHT_STD = 0.02  # section 4
NORMS = ("batch", "layer", "none")


class DCGAN(AdversarialModel):
    """DCGAN after figure 1 and the guidelines of section 3.

    Strided and transposed 4x4 convolutions instead of pooling; BatchNorm everywhere but at the generator's output and
    the discriminator's input; ReLU and tanh in the generator, LeakyReLU of slope 0.2 in the discriminator; weights from
    N(0, 0.02^2).  The feature maps double in number where they halve in size, down to 4x4.  A conditional model has
    one-hot labels beside the latent and, as planes, beside the image.

    ``generator.blocks[i]`` is `nn.ConvTransposeBNAct`, the last one without BatchNorm and with tanh: its state dict is
    that of ``Sequential(ConvTranspose2d, BatchNorm2d, ReLU)``.

    Args:
        image_shape: (C, S, S), S a power of two of at least 16: 64 as published, 32 with one layer less, ...
        levels: number of levels, 2..256.
        latent_dim: dimension of the latents, standard normal (the paper's are 100 uniform numbers).
        num_filters: feature maps beside the image, 128 as published (so 1024 at 4x4 for 64 pixels).
        num_classes: number of classes, or None for an unconditional model.
        norm: of the discriminator: "batch"; "layer" or "none" for a gradient penalty, which is meant sample by sample
            (Gulrajani et al. 2017, section 4).
        discriminator: "score", or "autoencoder" for `losses.BEGANLoss`: the discriminator's layers as encoder, the
            generator's, without BatchNorm, as decoder; its output is the mean absolute error of each image.  That
            says nothing about a label, so such a model cannot be conditional.

    Raises:
        ValueError: an argument is out of range.
    """

    name = "dcgan"

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (3, 64, 64),
        levels: int = 256,
        latent_dim: int = 100,
        num_filters: int = 128,
        num_classes: int | None = None,
        norm: str = "batch",
        discriminator: str = "score",
    ) -> None:
        super().__init__(
            image_shape=image_shape,
            levels=levels,
            latent_dim=latent_dim,
            num_classes=num_classes,
            num_filters=positive("num_filters", num_filters),
            norm=one_of("norm", norm, NORMS),
            discriminator=discriminator,
        )
        channels, height, width = self.image_shape
        if height != width or height < 4 * START or height & (height - 1):
            raise ValueError(f"image_shape: expected squares of 16, 32, 64, ... pixels a side, got {height}x{width}")
        doublings = (height // START).bit_length() - 2
        widths = [num_filters << i for i in range(doublings + 1)]  # from the image inwards
        self.generator = Generator(channels, latent_dim, widths, num_classes)
        if discriminator == "score":
            self.discriminator = Discriminator(channels, widths, num_classes, norm)
        else:
            self.discriminator = Autoencoder(channels, latent_dim, widths, norm)
        self.generator.apply(_initialize)
        self.discriminator.apply(_initialize if discriminator == "score" else _initialize_autoencoder)


class Generator(nn.Module):
    """Latents [N, latent_dim] -> images [N, C, S, S] in [-1, 1]; ``widths``: feature maps from the image inwards."""

    def __init__(self, channels: int, latent_dim: int, widths: list[int], num_classes: int | None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.blocks = _upwards(channels, latent_dim + (num_classes or 0), widths, norm=True)

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.blocks(with_labels(z, labels, self.num_classes)[:, :, None, None])


class Discriminator(nn.Module):
    """Images [N, C, S, S] -> scores [N]."""

    def __init__(self, channels: int, widths: list[int], num_classes: int | None, norm: str) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.blocks = _downwards(channels + (num_classes or 0), 1, widths, norm)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.blocks(with_labels(x, labels, self.num_classes)).flatten()


class Autoencoder(nn.Module):
    """Images [N, C, S, S] -> mean absolute error [N] of their reconstruction (Berthelot et al. 2017)."""

    def __init__(self, channels: int, latent_dim: int, widths: list[int], norm: str) -> None:
        super().__init__()
        self.encoder = _downwards(channels, latent_dim, widths, norm)
        self.decoder = _upwards(channels, latent_dim, widths, norm=False)

    def reconstruct(self, x: Tensor) -> Tensor:
        """Images -> images."""
        return self.decoder(self.encoder(x))

    def forward(self, x: Tensor, labels: None = None) -> Tensor:
        return (x - self.reconstruct(x)).abs().mean(dim=(1, 2, 3))


def _upwards(channels: int, features: int, widths: list[int], norm: bool) -> nn.Sequential:
    """[N, features, 1, 1] -> [N, channels, S, S] in [-1, 1]."""
    blocks, inner = [], features
    for i, width in enumerate(reversed(widths)):
        stride, padding = (2, 1) if i else (1, 0)
        blocks.append(ConvTransposeBNAct(inner, width, 4, stride, padding, bias=not norm, batch_norm=norm))
        inner = width
    blocks.append(ConvTransposeBNAct(inner, channels, 4, 2, 1, batch_norm=False, activation="tanh"))
    return nn.Sequential(*blocks)


def _downwards(channels: int, features: int, widths: list[int], norm: str) -> nn.Sequential:
    """[N, channels, S, S] -> [N, features, 1, 1]."""
    leaky: dict[str, Any] = {"activation": "leaky_relu", "negative_slope": SLOPE}
    blocks: list[nn.Module] = [ConvBNAct(channels, widths[0], 4, 2, 1, batch_norm=False, **leaky)]
    for inner, width in zip(widths, widths[1:], strict=False):
        if norm == "layer":  # over all the features of a sample, with a gain and a bias for each channel
            conv = nn.Conv2d(inner, width, 4, 2, 1, bias=False)
            blocks.append(nn.Sequential(conv, nn.GroupNorm(1, width), nn.LeakyReLU(SLOPE)))
        else:
            batch = norm == "batch"
            blocks.append(ConvBNAct(inner, width, 4, 2, 1, bias=not batch, batch_norm=batch, **leaky))
    blocks.append(nn.Conv2d(widths[-1], features, START))
    return nn.Sequential(*blocks)


def _initialize_autoencoder(module: nn.Module) -> None:
    """He et al. 2015 (1502.01852): of weights from N(0, 0.02^2) no signal is left after six layers."""
    if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        return
    taps = math.prod(module.kernel_size)
    if isinstance(module, nn.ConvTranspose2d):  # those that reach one output; the first one's input is one pixel
        taps = taps // math.prod(module.stride) if module.stride[0] > 1 else 1
    nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / (taps * module.in_channels)))
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, WEIGHT_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, WEIGHT_STD)  # as in the authors' code
