"""Variational autoencoders: a decoder that maps latents to images, trained with an encoder that maps them back."""

from __future__ import annotations

from fastgen.models.vae.conditional import ConditionalVAE
from fastgen.models.vae.vae import VAE
from fastgen.models.vae.vqvae import VQVAE

__all__ = ["VAE", "VQVAE", "ConditionalVAE"]
