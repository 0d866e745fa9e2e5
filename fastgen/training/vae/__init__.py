"""Training of variational autoencoders, and of those with discrete latents."""

from __future__ import annotations

from fastgen.training.vae.config import VAEConfig
from fastgen.training.vae.trainer import train_vae
from fastgen.training.vae.vqvae import encoded, train_vqvae

__all__ = ["VAEConfig", "encoded", "train_vae", "train_vqvae"]
