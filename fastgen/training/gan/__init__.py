"""Training of adversarial models: `train_gan`, one function, one `GANConfig`; `LOSSES` are the kinds of training."""

from __future__ import annotations

from fastgen.training.gan.config import DIGITS, DIGITS_MODEL, LOSSES, GANConfig
from fastgen.training.gan.trainer import GANResult, train_gan

__all__ = ["DIGITS", "DIGITS_MODEL", "LOSSES", "GANConfig", "GANResult", "train_gan"]
