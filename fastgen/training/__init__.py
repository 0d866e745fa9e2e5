"""Training of likelihood models: `train` (one function, one `TrainConfig`) and ready recipes; of GANs: `train_gan`;
of variational autoencoders: `train_vae`; of those with discrete latents: `train_vqvae`, and `encoded` for their codes.

::

    from fastgen import training

    config = training.TrainConfig(max_steps=2000)      # or max_seconds=60.0, or both
    training.initialize(model, train_data, config)     # PixelCNNpp and PixelSNAIL want to see a batch first
    result = training.train(
        model, train_data, val_data, config, out="runs/a", resume=False, progress=True,
        sample_grid=lambda model, path: ...,           # writes a picture; called every config.sample_every steps
    )
    result.bits_per_dim                                # best validation bits/dim; the model now holds these weights
    result.steps, result.seconds, result.checkpoint    # checkpoint: path or None

    result = training.recipes.demo_digits(seconds=60.0, seed=0, out=None, progress=True)
    result.model          # GatedPixelCNN, 8x8, 17 levels, conditional on 10 classes

    config = training.GANConfig.of("wgan-gp", max_steps=20000)   # the loss, and what its paper trains it with
    result = training.train_gan(model, train_data, config, out="runs/b")    # models.DCGAN(norm="layer", ...)

    training.train_vqvae(model, train_data, val_data, config)               # models.VQVAE(...)
    codes, val_codes = (training.encoded(model, part) for part in (train_data, val_data))
    training.train(prior, codes, val_codes, config)     # models.GatedPixelCNN(image_shape=codes.image_shape, ...)

Data are objects with ``.images`` uint8 [N, C, H, W] and ``.labels`` int64 [N] or None (`fastgen.data.Dataset`).
``out`` gets ``checkpoint.safetensors`` (a `fastgen.load`-able model plus the state of training), ``log.jsonl``, and at
the end ``model.safetensors``; with ``out=None`` nothing is written.
"""

from __future__ import annotations

from fastgen.training import recipes
from fastgen.training.config import TrainConfig
from fastgen.training.gan import LOSSES, GANConfig, GANResult, train_gan
from fastgen.training.trainer import TrainResult, initialize, train
from fastgen.training.vae import VAEConfig, encoded, train_vae, train_vqvae

__all__ = [
    "LOSSES",
    "GANConfig",
    "GANResult",
    "TrainConfig",
    "TrainResult",
    "VAEConfig",
    "encoded",
    "initialize",
    "recipes",
    "train",
    "train_gan",
    "train_vae",
    "train_vqvae",
]
