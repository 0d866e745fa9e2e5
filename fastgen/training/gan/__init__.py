"""Training of adversarial models: `train_gan`, one function, one `GANConfig`; `LOSSES` are the kinds of training."""

from __future__ import annotations

from fastgen.training.gan.config import DIGITS, LOSSES, GANConfig
from fastgen.training.gan.trainer import GANResult, train_gan

__all__ = ["DIGITS", "LOSSES", "GANConfig", "GANResult", "train_gan"]
