"""What runs in eval mode leaves every submodule in the mode it was in: a frozen BatchNorm in a model that trains."""

from __future__ import annotations

import pytest
import torch

import fastgen
from fastgen import models

IMAGES = torch.arange(192, dtype=torch.uint8).reshape(3, 1, 8, 8)


def pixelcnnpp():
    return models.PixelCNNpp(image_shape=(1, 8, 8), num_filters=4, num_blocks=1, num_mixtures=2, dropout=0.3)


def dcgan():
    return models.DCGAN(image_shape=(1, 16, 16), num_filters=4, latent_dim=3)


def vae():
    return models.VAE(image_shape=(1, 8, 8), latent_dim=2, architecture="convolutional")


CALLS = {
    "bits_per_dim": (pixelcnnpp, lambda model: fastgen.bits_per_dim(model, IMAGES)),
    "bits_per_dim, refused": (pixelcnnpp, lambda model: fastgen.bits_per_dim(model, IMAGES[..., :4])),
    "PixelCNNpp.initialize": (pixelcnnpp, lambda model: model.initialize(IMAGES)),
    "DCGAN.sample": (dcgan, lambda model: model.sample(2)),
    "VAE.sample": (vae, lambda model: model.sample(2)),
    "VAE.reconstruct": (vae, lambda model: model.reconstruct(IMAGES)),
}


@pytest.mark.parametrize("name", CALLS)
def test_modes_are_left_as_they_were(name):
    make, call = CALLS[name]
    model = make().train()
    for module in list(model.modules())[2::2]:
        module.training = False
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    if "refused" in name:
        with pytest.raises(ValueError, match="images"):
            call(model)
    else:
        call(model)
    assert [module.training for module in model.modules()] == modes
