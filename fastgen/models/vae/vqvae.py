"""The autoencoder with discrete latents of van den Oord, Vinyals, Kavukcuoglu 2017 ("Neural Discrete Representation
Learning", 1711.00937).
"""

from __future__ import annotations

import hashlib
import math
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import ops
from fastgen._arguments import check_image_shape, check_images, check_levels, describe, positive
from fastgen.models.chunks import in_chunks
from fastgen.models.vae import likelihoods
from fastgen.nn import ConvTransposeBNAct, VectorQuantizer
from fastgen.sampling.heads import Categorical
from fastgen.sampling.subject import evaluating

ENCODED = 256  # images at a time


class Terms(NamedTuple):
    """log_likelihood: log p(x | z_q(x)), [N] nats. codes: [N, h, w]. loss: of the quantiser, a scalar."""

    log_likelihood: Tensor
    codes: Tensor
    loss: Tensor


class VQVAE(nn.Module):
    """An encoder, a codebook and a decoder: an image is a small map of integer codes (section 3).

    The networks are those of section 4.1: strided 4x4 convolutions and residual blocks (ReLU, 3x3, ReLU, 1x1), and the
    way back with transposed convolutions.  The likelihood is a distribution over levels, so that images have a bound in
    bits; codes are a priori uniform, as in training (section 3.1), until an autoregressive model of them is trained:
    `models.GatedPixelCNN`, `models.PixelSNAIL` and `models.ImageGPT` with ``embedding_dim``.  Draw its codes, and
    `render` them::

        prior = models.GatedPixelCNN(image_shape=(1, *model.code_shape), levels=model.num_codes, embedding_dim=64)
        images = model.render(fastgen.Sampler(prior).sample(64, seed=0))

    Args:
        image_shape: (C, H, W), C 1 or 3, H and W multiples of ``downsampling``.
        levels: number of levels of an element, 2..256.
        num_codes: K, codes of the codebook, 2..65536.
        latent_dim: D, length of a code.
        num_filters: hidden feature maps.
        num_blocks: residual blocks of the encoder, and of the decoder.
        downsampling: pixels a side for one code: 2, 4, 8, ...
        decay: of the codes as moving averages (appendix A.1), or None to learn them by gradients.
        commitment: beta, weight of the loss that keeps the encoder near the codes.
        min_usage: restarts codes that are used less than this share of the mean, see `nn.VectorQuantizer`; the paper
            does not, and few codes may then be in use.
        likelihood: "bernoulli", "gaussian", "logistic" (discretised) or "categorical", see `VAE`.
        scale: standard deviation of the gaussian likelihood, or None to learn one for each element.

    Attributes:
        name: the registered name of the class.
        config: the constructor arguments, JSON-able: ``type(model)(**model.config)`` builds the same architecture.
        code_shape: (h, w) of the codes of an image.
        code_dtype: of codes: uint8, or int64 where there are more than 256; what a prior over them reads.

    In training mode calls of `terms` move the codes, and restart some at random, by PyTorch's generator.

    Raises:
        ValueError: an argument is out of range.
    """

    name: ClassVar[str] = "vqvae"
    num_classes: None = None

    def __init__(
        self,
        *,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        levels: int = 256,
        num_codes: int = 512,
        latent_dim: int = 64,
        num_filters: int = 256,
        num_blocks: int = 2,
        downsampling: int = 4,
        decay: float | None = 0.99,
        commitment: float = 0.25,
        min_usage: float = 0.1,
        likelihood: str = "logistic",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.image_shape, self.levels = check_image_shape(image_shape), check_levels(levels)
        channels, height, width = self.image_shape
        if positive("downsampling", downsampling) < 2 or downsampling & (downsampling - 1):
            raise ValueError(f"downsampling: expected a power of two of at least 2, got {downsampling}")
        if height % downsampling or width % downsampling:
            raise ValueError(f"image_shape: expected multiples of {downsampling=}, got {height}x{width}")
        most = Categorical.max_levels
        if not 2 <= positive("num_codes", num_codes) <= most:
            raise ValueError(f"num_codes: expected an integer in 2..{most}, got {num_codes}")
        self.num_codes, self.code_shape = num_codes, (height // downsampling, width // downsampling)
        self.code_dtype = Categorical(num_codes, input_range=None).dtype
        self.likelihood = likelihoods.make(likelihood, channels, levels, scale)
        self.config: dict[str, Any] = {
            "image_shape": list(self.image_shape), "levels": levels, "num_codes": num_codes,
            "latent_dim": positive("latent_dim", latent_dim), "num_filters": positive("num_filters", num_filters),
            "num_blocks": positive("num_blocks", num_blocks), "downsampling": downsampling, "decay": decay,
            "commitment": commitment, "min_usage": min_usage, "likelihood": likelihood, "scale": scale,
        }  # fmt: skip
        halvings = downsampling.bit_length() - 1
        self.encoder = Encoder(channels, latent_dim, num_filters, num_blocks, halvings)
        self.quantizer = VectorQuantizer(num_codes, latent_dim, decay=decay, commitment=commitment, min_usage=min_usage)
        self.decoder = Decoder(latent_dim, self.likelihood.channels, num_filters, num_blocks, halvings)

    def forward(self, images: Tensor) -> Tensor:
        """`log_prob`."""
        return self.log_prob(images)

    def terms(self, images: Tensor) -> Terms:
        """What training is made of; in training mode the codes move.

        Args:
            images: uint8 levels [N, C, H, W].
        """
        check_images(images, self.image_shape, self.levels)
        features, codes, loss = self.quantizer(self._features(images))
        return Terms(-self.likelihood.nll(self.decoder(features), images), codes, loss)

    def log_prob(self, images: Tensor, labels: None = None) -> Tensor:
        """A lower bound of log p(x), [N] nats: log p(x | z_q(x)) + log p(z_q(x)), all codes equally likely (section
        3.2).  Of a trained prior take `log_likelihood` plus ``prior.log_prob(model.encode(images))``.

        Args:
            images: uint8 levels [N, C, H, W].
            labels: None, for this model has no classes.
        """
        if labels is not None:
            raise ValueError("labels: expected None, this model has no classes")
        return self.log_likelihood(images) - math.prod(self.code_shape) * math.log(self.num_codes)

    def log_likelihood(self, images: Tensor, codes: Tensor | None = None) -> Tensor:
        """log p(x | z_q(x)), [N] nats, of uint8 levels [N, C, H, W].  No codes move, and no gradient reaches the
        encoder: `terms` are for training.

        Args:
            images: uint8 levels [N, C, H, W].
            codes: what `encode` says of them, where it is known.

        Raises:
            RuntimeError: as `encode`.
        """
        return -self.likelihood.nll(self.decode(self.encode(images) if codes is None else codes), images)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 levels [N, C, H, W] -> the codes, [N, 1, h, w] of `code_dtype`: images of a prior.

        Raises:
            TypeError, ValueError: naming what was expected and what came.
            RuntimeError: what the encoder says of an image is not finite.
        """
        check_images(images, self.image_shape, self.levels)
        return torch.cat([self._codes(part) for part in images.split(ENCODED)])

    def _codes(self, images: Tensor) -> Tensor:
        features = self._features(images)
        if not torch.isfinite(features).all():
            raise RuntimeError("the encoder's features hold NaN or infinity: are its weights finite?")
        return ops.nearest_code(features, self.quantizer.codebook).unsqueeze(1).to(self.code_dtype)

    def decode(self, codes: Tensor) -> Tensor:
        """Integer codes [N, 1, h, w] -> parameters of the likelihood, [N, P, H, W].  `render` makes images of codes."""
        self._check_codes(codes)
        return self.decoder(self.quantizer.look_up(codes[:, 0]))

    @torch.no_grad()
    def render(self, codes: Tensor, *, progress: bool = False) -> Tensor:
        """The mean images of codes, in eval mode: integers [N, 1, h, w] -> uint8 levels [N, C, H, W], on the CPU.

        An image depends on the weights and its codes alone, bit for bit.

        Args:
            codes: each in 0..num_codes-1, as `encode` and a prior's `Sampler` give them.
            progress: show a progress bar on stderr.

        Raises:
            TypeError, ValueError: naming what was expected and what came.
            RuntimeError: the images hold NaN or infinity.
        """
        self._check_codes(codes)
        device = self.quantizer.codebook.device

        def draw(codes: Tensor) -> Tensor:
            features = self.quantizer.look_up(codes[:, 0].to(device))
            return self.likelihood.mean_levels(self.decoder(features))

        with evaluating(self):
            return in_chunks(draw, codes, shape=self.image_shape, progress=progress)

    def reconstruct(self, images: Tensor, labels: None = None) -> Tensor:
        """Images after encoding and decoding, in eval mode: uint8 [N, C, H, W]."""
        if labels is not None:
            raise ValueError("labels: expected None, this model has no classes")
        with evaluating(self):
            return self.render(self.encode(images))

    @torch.no_grad()
    def perplexity(self, images: Tensor) -> float:
        """e to the entropy of the codes of images: how many codes are in use, 1..num_codes.

        Raises:
            ValueError: there is no image.
        """
        if len(images) == 0:
            raise ValueError(f"images: a perplexity needs at least one, got shape {list(images.shape)}")
        return perplexity(self.encode(images), self.num_codes)

    @torch.no_grad()
    def initialize(self, images: Tensor, labels: None = None) -> None:
        """Makes codes of what the untrained encoder says of uint8 levels [N, C, H, W]; `labels` are not used."""
        check_images(images, self.image_shape, self.levels)
        self.quantizer.initialize(self._features(images))

    def fingerprint(self) -> str:
        """What tells this codebook from others: 16 hexadecimal digits.  A prior keeps that of its codes."""
        values = self.quantizer.codebook.detach().to("cpu", torch.float32).contiguous()
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]

    def _features(self, images: Tensor) -> Tensor:
        """z_e(x): [N, D, h, w], where the weights are."""
        return self.encoder(images.to(self.quantizer.codebook) * (2.0 / (self.levels - 1)) - 1.0)

    def _check_codes(self, codes: Tensor) -> None:
        if not isinstance(codes, Tensor) or codes.dtype not in (torch.uint8, torch.int32, torch.int64):
            raise TypeError(f"codes: expected a tensor of uint8, int32 or int64, got {describe(codes)}")
        check_images(codes, (1, *self.code_shape), self.num_codes, dtype=codes.dtype, name="codes")

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.config.items())


class Residual(nn.Module):
    """x + Conv1x1(ReLU(Conv3x3(ReLU(x))))."""

    def __init__(self, num_filters: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_filters, num_filters, 3, padding=1)
        self.point = nn.Conv2d(num_filters, num_filters, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = ops.conv2d_bn_act(F.relu(x), self.conv.weight, self.conv.bias, padding=1, activation="relu")
        return self.point(inner).add_(x)


class Encoder(nn.Module):
    """Images [N, C, H, W] in [-1, 1] -> [N, D, h, w]."""

    def __init__(self, channels: int, latent_dim: int, num_filters: int, num_blocks: int, halvings: int) -> None:
        super().__init__()
        sizes = [channels] + [num_filters] * halvings
        self.down = nn.ModuleList(nn.Conv2d(a, b, 4, 2, 1) for a, b in zip(sizes, sizes[1:], strict=False))
        self.blocks = nn.Sequential(*(Residual(num_filters) for _ in range(num_blocks)))
        self.last = nn.Conv2d(num_filters, latent_dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # what convolutions prefer
        conv: Any
        for i, conv in enumerate(self.down, 1):
            activation = "none" if i == len(self.down) else "relu"
            x = ops.conv2d_bn_act(x, conv.weight, conv.bias, stride=2, padding=1, activation=activation)
        return self.last(F.relu(self.blocks(x)))


class Decoder(nn.Module):
    """Vectors [N, D, h, w] -> parameters [N, P, H, W]."""

    def __init__(self, latent_dim: int, params: int, num_filters: int, num_blocks: int, halvings: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(latent_dim, num_filters, 3, padding=1)
        self.blocks = nn.Sequential(*(Residual(num_filters) for _ in range(num_blocks)))
        sizes = [num_filters] * halvings + [params]
        last = [False] * (halvings - 1) + [True]
        self.up = nn.Sequential(
            *(
                ConvTransposeBNAct(a, b, 4, 2, 1, batch_norm=False, activation="none" if end else "relu")
                for a, b, end in zip(sizes, sizes[1:], last, strict=False)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        x = ops.conv2d_bn_act(x, self.first.weight, self.first.bias, padding=1)
        return self.up(F.relu(self.blocks(x)))


def perplexity(codes: Tensor, num_codes: int) -> float:
    """e to the entropy of how often each code occurs; codes of any shape, not empty."""
    share = torch.bincount(codes.flatten().long(), minlength=num_codes).double() / codes.numel()
    return math.exp(float(torch.special.entr(share).sum()))
