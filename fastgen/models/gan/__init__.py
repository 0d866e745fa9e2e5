"""Generative adversarial networks: a generator that maps latents to images, trained against a discriminator."""

from __future__ import annotations

from fastgen.models.gan.base import AdversarialModel
from fastgen.models.gan.dcgan import DCGAN
from fastgen.models.gan.gan import GAN

__all__ = ["DCGAN", "GAN", "AdversarialModel"]
