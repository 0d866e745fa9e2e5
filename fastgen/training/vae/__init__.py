"""Training of variational autoencoders."""

from __future__ import annotations

from fastgen.training.vae.config import VAEConfig
from fastgen.training.vae.trainer import VAEResult, train_vae

__all__ = ["VAEConfig", "VAEResult", "train_vae"]
