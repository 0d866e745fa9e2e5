"""Models: ordinary `torch.nn.Module`s, one file per model, and a registry of their names.

The names are the ones of checkpoints and of the command line.  `convert` reads weights from elsewhere.
"""

from __future__ import annotations

from fastgen.models import convert
from fastgen.models.autoregressive import (
    AutoregressiveModel,
    GatedPixelCNN,
    ImageGPT,
    PixelCNN,
    PixelCNNpp,
    PixelRNN,
    PixelSNAIL,
)
from fastgen.models.gan import DCGAN, GAN, AdversarialModel
from fastgen.models.vae import VAE, VQVAE, ConditionalVAE

__all__ = [
    "DCGAN",
    "GAN",
    "VAE",
    "VQVAE",
    "AdversarialModel",
    "AutoregressiveModel",
    "ConditionalVAE",
    "GatedPixelCNN",
    "ImageGPT",
    "PixelCNN",
    "PixelCNNpp",
    "PixelRNN",
    "PixelSNAIL",
    "convert",
    "get",
    "names",
]

Model = AutoregressiveModel | AdversarialModel | VAE | VQVAE

_MODELS: dict[str, type[Model]] = {
    model.name: model
    for model in (
        *(PixelCNN, GatedPixelCNN, PixelCNNpp, PixelRNN, PixelSNAIL, ImageGPT),
        *(GAN, DCGAN, VAE, ConditionalVAE, VQVAE),
    )
}


def names() -> list[str]:
    """The registered model names, sorted."""
    return sorted(_MODELS)


def get(name: str) -> type[Model]:
    """The class of a model by its registered name, e.g. ``get("gated_pixelcnn")(image_shape=(1, 28, 28))``.

    Raises:
        ValueError: the name is not registered.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}; known models: {', '.join(names())}")
    return _MODELS[name]
